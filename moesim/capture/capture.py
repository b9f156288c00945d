"""Capture: run a Hugging Face MoE model over real prompts, let it write on, and keep what its routers chose.

A batch of requests is prefilled once (padded on the left; pads are routed too, and dropped), then decodes one
token a step. Each batch is written to the trace file before the next begins, so memory is bounded by one
batch.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
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
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesim.capture.hooks import Routing, RoutingRecorder
from moesim.capture.prompts import cut_prompts, read_texts
from moesim.files.traces import TraceWriter
from moesim.routing.trace import RoutingTrace


@dataclass(frozen=True)
class Header:
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
    name: str | None = None,
    model_name: str | None = None,
    origin: str = "trained",
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Capture the routing of the model in `model_dir` on `texts` into the Parquet file `out`.

    Args:
        model_dir: local folder with config, weights and tokenizer; nothing is downloaded.
        texts: the texts, or a file of them (see `read_texts`); prompts are cut from them.
        out: the trace file; it appears whole or not at all.
        num_requests: prompts to run.
        prompt_tokens: shortest and longest prompt; lengths are drawn evenly between.
        output_tokens: tokens that each request generates and runs through the model; no request ends early.
        batch_size: requests run together.
        temperature: of the sampling; 0 takes the likeliest token.
        seed: of prompt lengths and sampling.
        device: torch device.
        name: of the trace; the file's stem if None.
        model_name: how reports call the model; the folder's name if None.
        origin: `trained` or `random`, whether the model's router was trained.
        provenance: facts to keep with the trace, beside model type, versions and settings.

    Raises:
        ValueError: the folder holds no model, its family cannot be captured, or an argument is wrong.
    """
    if batch_size < 1 or output_tokens < 0 or temperature < 0:
        raise ValueError(
            f"batch_size must be at least 1, output_tokens and temperature at least 0; "
            f"given {batch_size}, {output_tokens} and {temperature}"
        )
    model, tokenizer = _load(Path(model_dir), device)
    prompts = cut_prompts(
        tokenizer, read_texts(texts) if isinstance(texts, Path) else texts, num_requests, prompt_tokens, seed
    )
    settings = {
        "model_type": str(model.config.model_type),
        "requests": f"{num_requests} of {prompt_tokens[0]}-{prompt_tokens[1]} prompt and {output_tokens} output tokens",
        "sampling": f"temperature {temperature}, seed {seed}, batches of {batch_size}",
        "versions": f"torch {torch.__version__}, transformers {version('transformers')}",
    }
    header = Header(
        name or Path(out).stem,
        model_name or Path(model_dir).resolve().name,
        origin,
        settings | dict(provenance or {}),
    )
    generator = torch.Generator().manual_seed(seed)
    console = Console(stderr=True)
    with (
        RoutingRecorder(model) as recorder,
        TraceWriter(out) as writer,
        Progress(console=console) as progress,
    ):
        bar = progress.add_task("capture", total=num_requests)
        for first in range(0, num_requests, batch_size):
            batch = prompts[first : first + batch_size]
            writer.append(_run(model, recorder, batch, first, output_tokens, temperature, generator, header))
            progress.advance(bar, len(batch))


def _load(folder: Path, device: str) -> tuple[Any, Any]:
    """Model in evaluation mode and tokenizer, from local files only."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json; give a folder made by save_pretrained, with a tokenizer")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{folder}: transformers cannot load model and tokenizer: {error}") from error
    placed: Any = model
    return placed.to(device).eval(), tokenizer


@torch.no_grad()
def _run(
    model: Any,
    recorder: RoutingRecorder,
    prompts: list[NDArray[np.int64]],
    first_request: int,
    output_tokens: int,
    temperature: float,
    generator: torch.Generator,
    header: Header,
) -> RoutingTrace:
    """Prefill and decode one batch; the trace of its real tokens, rows by (request, position)."""
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, longest - len(prompt) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # Prefill needs the logits of the last position only; nearly every family lets us say so.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    fed, parts, cache = tokens, [], None
    for step in range(output_tokens + 1):
        output = model(
            input_ids=fed.to(device),
            attention_mask=mask.to(device),
            position_ids=positions[:, -fed.shape[1] :].to(device),
            past_key_values=cache,
            use_cache=True,
            **last_only,
        )
        cache = output.past_key_values
        parts.append(_by_request(recorder.take(fed.numel()), len(prompts)))
        if step == output_tokens:
            break
        fed = _next_tokens(output.logits[:, -1].float().cpu(), temperature, generator)
        tokens = torch.cat([tokens, fed], dim=1)
        mask = torch.cat([mask, torch.ones_like(fed)], dim=1)
        positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
    decode = torch.arange(tokens.shape[1]).expand_as(tokens) >= longest
    requests = torch.arange(first_request, first_request + len(prompts))[:, None].expand_as(tokens)
    return _trace(_join(parts), mask.bool(), requests, positions, decode, tokens, recorder, header)


def _next_tokens(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token for each request, [B, V] -> [B, 1]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


def _by_request(routing: Routing, num_requests: int) -> Routing:
    """[B x S, ...] -> [B, S, ...] on the CPU."""
    ids, weights, predicted = (
        None if part is None else part.cpu().reshape(num_requests, -1, *part.shape[1:]) for part in routing
    )
    assert ids is not None and weights is not None
    return Routing(ids, weights, predicted)


def _join(parts: list[Routing]) -> Routing:
    """Steps of [B, S, ...] side by side."""
    ids, weights, predicted = zip(*parts, strict=True)
    known = None if any(p is None for p in predicted) else torch.cat(predicted, dim=1)
    return Routing(torch.cat(ids, dim=1), torch.cat(weights, dim=1), known)


def _trace(
    routing: Routing,
    real: Tensor,
    requests: Tensor,
    positions: Tensor,
    decode: Tensor,
    tokens: Tensor,
    recorder: RoutingRecorder,
    header: Header,
) -> RoutingTrace:
    """The tokens where `real` is True, as a trace; a boolean index keeps the order (request, position)."""
    num_experts = _num_experts(recorder)
    small = np.uint8 if num_experts <= 256 else np.uint16
    return RoutingTrace(
        name=header.name,
        model=header.model,
        origin=header.origin,
        num_experts=num_experts,
        expert_ids_TLK=routing.expert_ids[real].numpy().astype(small),
        request_T=requests[real].numpy().astype(np.int32),
        position_T=positions[real].numpy().astype(np.int32),
        is_decode_T=decode[real].numpy(),
        token_id_T=tokens[real].numpy().astype(np.int32),
        layers=tuple(layer.index for layer in recorder.layers),
        weights_TLK=routing.weights[real].numpy().astype(np.float16),
        predicted_HTLW=() if routing.predicted is None else (routing.predicted[real].numpy().astype(small),),
        provenance=header.provenance,
    )


def _num_experts(recorder: RoutingRecorder) -> int:
    """E, from the experts modules, which must agree."""
    counts = {getattr(layer.experts, "num_experts", None) for layer in recorder.layers}
    if len(counts) != 1 or None in counts:
        raise ValueError(
            f"layers have {sorted(map(str, counts))} experts; a trace holds one number for all its "
            "layers, and the "
            "experts module must state it as num_experts"
        )
    return int(counts.pop())  # type: ignore[arg-type]
