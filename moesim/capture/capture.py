"""Capture: run a Hugging Face MoE model over real prompts, let it write on, and keep what its routers chose.

Each batch is written to the trace file before the next begins, so memory is bounded by one batch, and a capture that
is interrupted leaves a trace of the batches that were done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from moesim.capture.hooks import RoutingRecorder, UnsupportedFamilyError
from moesim.capture.loading import load
from moesim.capture.passes import Batch, check_stack, run_batch, writes
from moesim.capture.prompts import cut_prompts, read_texts
from moesim.files.trace_rules import MAX_HORIZON
from moesim.files.traces import TraceWriter
from moesim.routing.trace import RoutingTrace


@dataclass(frozen=True)
class Watch:
    """What to record of a model.

    Attributes:
        horizons: how many layers ahead routers are asked; 3, or as many as the model allows, if None.
        predict_width: experts in each prediction; as many as the router chooses if None.
        scores: whether to keep the full router scores.
        stack: `encoder` or `decoder` of an encoder-decoder; its decoder if None.
    """

    horizons: int | None = None
    predict_width: int | None = None
    scores: bool = False
    stack: str | None = None

    def recorder(self, model: Any) -> RoutingRecorder:
        """A recorder for `model`.

        Raises:
            ValueError: the family cannot be captured, or not so.
        """
        return RoutingRecorder(
            model,
            stack=check_stack(model, self.stack),
            horizons=MAX_HORIZON if self.horizons is None else self.horizons,
            predict_width=self.predict_width,
            scores=self.scores,
        )


@dataclass(frozen=True)
class _Header:
    """What the trace says about itself."""

    name: str
    model: str
    origin: str
    provenance: Mapping[str, str]


def capture(
    model_dir: str | os.PathLike[str],
    texts: Sequence[str] | Path,
    out: str | os.PathLike[str],
    *,
    num_requests: int = 64,
    prompt_tokens: tuple[int, int] = (128, 128),
    output_tokens: int = 64,
    batch_size: int = 16,
    temperature: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    watch: Watch | None = None,
    name: str | None = None,
    model_name: str | None = None,
    origin: str = "trained",
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Capture the routing of the model in `model_dir` on `texts` into the Parquet file `out`.

    An exception, Ctrl-C among them, ends the capture; the file then holds the batches that were done, if any, and
    stderr says how many requests those are. A killed process leaves nothing that can be read.

    Args:
        model_dir: local folder with config, weights and tokenizer; nothing is downloaded.
        texts: the texts, or a file of them (see `read_texts`); prompts are cut from them.
        out: the trace file.
        num_requests: prompts to run.
        prompt_tokens: shortest and longest prompt; lengths are drawn evenly between.
        output_tokens: tokens that each request generates and runs through the model; no request ends early.
        batch_size: requests run together.
        temperature: of the sampling; 0 takes the likeliest token.
        seed: of prompt lengths and sampling.
        device: torch device.
        watch: what to record; all that the model allows without its router scores if None.
        name: of the trace; the file's stem if None.
        model_name: how reports call the model; the folder's name if None.
        origin: `trained` or `random`, whether the model's router was trained.
        provenance: facts to keep with the trace, beside model type, versions and settings.

    Raises:
        ValueError: the folder holds no model, its family cannot be captured, or an argument is wrong.
    """
    watch = watch or Watch()
    check_numbers(batch_size, output_tokens, temperature, watch)
    model, tokenizer = load(Path(model_dir), device)
    recorder, stack = watch.recorder(model), check_stack(model, watch.stack)
    check_room(model, prompt_tokens[1], output_tokens, stack)
    prompts = cut_prompts(
        tokenizer, read_texts(texts) if isinstance(texts, Path) else texts, num_requests, prompt_tokens, seed
    )
    choose = sampler(temperature, seed)
    with recorder:
        run_batch(model, recorder, [prompts[0][:2]], 0, choose, stack)
    check_recorded(model, recorder, watch)
    settings = {
        "model_type": str(model.config.model_type),
        "requests": f"asked for {num_requests} of {prompt_tokens[0]}-{prompt_tokens[1]} prompt "
        f"and {output_tokens} output tokens",
        "sampling": f"temperature {temperature}, seed {seed}, batches of {batch_size}",
        "versions": f"torch {torch.__version__}, transformers {version('transformers')}",
    }
    header = _Header(
        name or Path(out).stem,
        model_name or Path(model_dir).resolve().name,
        origin,
        settings | dict(provenance or {}),
    )
    header = _with_facts(header, recorder, stack)
    console = Console(stderr=True)
    done = 0
    try:
        with recorder, TraceWriter(out, keep_parts=True) as writer, Progress(console=console) as progress:
            bar = progress.add_task("capture", total=num_requests)
            for first in range(0, num_requests, batch_size):
                prompts_B = prompts[first : first + batch_size]
                batch = run_batch(model, recorder, prompts_B, output_tokens, choose, stack)
                writer.append(_trace(batch, first, recorder, header))
                done = first + len(prompts_B)
                progress.advance(bar, len(prompts_B))
    except BaseException:
        kept = f"{out} holds the first {done} of {num_requests} requests" if done else f"{out} was not written"
        console.print(f"capture interrupted; {kept}", markup=False, highlight=False, soft_wrap=True)
        raise
    if recorder.cannot_ask and watch.horizons is None:
        console.print(f"no predictions: {recorder.cannot_ask}", markup=False, highlight=False, soft_wrap=True)


def check_numbers(batch_size: int, output_tokens: int, temperature: float, watch: Watch) -> None:
    """Refuse what no model could do.

    Raises:
        ValueError: a number is out of range.
    """
    if batch_size < 1 or output_tokens < 0 or temperature < 0:
        raise ValueError(
            f"batch_size must be at least 1, output_tokens and temperature at least 0; "
            f"given {batch_size}, {output_tokens} and {temperature}"
        )
    if watch.horizons is not None and not 0 <= watch.horizons <= MAX_HORIZON:
        raise ValueError(f"horizons must be 0 to {MAX_HORIZON}; given {watch.horizons}")
    if watch.predict_width is not None and watch.predict_width < 1:
        raise ValueError(f"predict_width must be at least 1; given {watch.predict_width}")


def check_room(model: Any, longest_prompt: int, output_tokens: int, stack: str | None) -> None:
    """Refuse requests that the model has no positions, or no head, for.

    Raises:
        ValueError: prompts and output do not fit, or output is asked of what writes nothing.
    """
    if output_tokens and not writes(model, stack):
        what = "its encoder" if stack == "encoder" else "it"
        raise UnsupportedFamilyError(
            model, f"{what} writes no tokens, so output_tokens must be 0; given {output_tokens}"
        )
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    asked = max(longest_prompt, output_tokens + 1) if stack == "decoder" else longest_prompt + output_tokens
    if isinstance(room, int) and asked > room:
        raise ValueError(
            f"model family {model.config.model_type!r} has {room} positions (max_position_embeddings); "
            f"prompts of {longest_prompt} and output of {output_tokens} tokens need {asked}; ask for fewer"
        )


def check_recorded(model: Any, recorder: RoutingRecorder, watch: Watch) -> None:
    """Refuse predictions that were asked for and cannot be had.

    Raises:
        ValueError: the model has too few MoE layers or experts, or its routers cannot be asked.
    """
    if watch.predict_width is not None and watch.predict_width > recorder.num_experts:
        raise ValueError(f"predict_width must be at most {recorder.num_experts} experts; given {watch.predict_width}")
    if not watch.horizons:
        return
    if watch.horizons >= len(recorder.layers):
        raise ValueError(
            f"horizons must be below the {len(recorder.layers)} MoE layers of {type(model).__name__}; "
            f"given {watch.horizons}"
        )
    if recorder.cannot_ask:
        raise UnsupportedFamilyError(model, f"no predictions, as {recorder.cannot_ask}; ask for 0 horizons")


def sampler(temperature: float, seed: int) -> Callable[[Tensor], Tensor]:
    """Chooses one token for each request, [B, V] -> [B, 1]."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1, keepdim=True)
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)

    return choose


def _with_facts(header: _Header, recorder: RoutingRecorder, stack: str | None) -> _Header:
    """The header with what only a run tells: how the routers were read, and what the layers and ids mean."""
    facts = {"routers": recorder.adapter.name}
    if stack == "decoder":
        facts["layers"] = "of the decoder; prompts went through the encoder, whose routing is not recorded"
    elif stack == "encoder":
        facts["layers"] = "of the encoder"
    if recorder.layers_repeat:
        facts["layers"] = "numbered by turn, as some layers run more than once in a pass"
    if recorder.num_real_experts < recorder.num_experts:
        facts["experts"] = f"ids from {recorder.num_real_experts} on compute nothing (zero or skip experts)"
    if recorder.cannot_ask:
        facts["predictions"] = f"none: {recorder.cannot_ask}"
    return _Header(header.name, header.model, header.origin, facts | dict(header.provenance))


def _trace(batch: Batch, first_request: int, recorder: RoutingRecorder, header: _Header) -> RoutingTrace:
    """The real tokens as a trace; a boolean index keeps the order (request, position)."""
    real, routing = batch.real, batch.routing
    columns = torch.arange(real.shape[1]).expand_as(real)
    requests = torch.arange(first_request, first_request + len(real))[:, None].expand_as(real)
    small = np.uint8 if recorder.num_experts <= 256 else np.uint16

    def array(values: Tensor, dtype: type) -> NDArray[Any]:
        return values[real].numpy().astype(dtype)

    return RoutingTrace(
        name=header.name,
        model=header.model,
        origin=header.origin,
        num_experts=recorder.num_experts,
        expert_ids_TLK=array(routing.expert_ids, small),
        request_T=array(requests, np.int32),
        position_T=array(batch.positions, np.int32),
        is_decode_T=array(columns >= batch.num_prompt_columns, np.bool_),
        token_id_T=array(batch.tokens, np.int32),
        layers=recorder.layers,
        weights_TLK=array(routing.weights, np.float16),
        predicted_HTLW=tuple(array(ids, small) for ids in routing.predicted),
        scores_TLE=None if routing.scores is None else array(routing.scores, np.float16),
        provenance=header.provenance,
    )
