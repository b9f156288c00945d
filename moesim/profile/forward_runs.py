"""A real MoE forward on one device: prefill and decode, all-resident and with experts streamed from host memory.

Ground truth for calibration: what a published architecture (a few of its layers, random weights) takes as a whole.
Streamed, the experts of all layers lie in host memory, pinned beside a GPU; two buffers on the device take turns, and
while one layer computes, the next layer's experts are copied on a stream of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesim.profile.forward_times import Forward, forward_grid
from moesim.profile.parts import cache_argument
from moesim.profile.rounds import Job, Lap, lap_since, now

_CUDA: Any = torch.cuda


def build(config: Any, device: str, dtype: torch.dtype, seed: int, implementation: str = "grouped_mm") -> nn.Module:
    """The causal language model of a transformers config, with random weights.

    Args:
        implementation: of the experts, as transformers names them.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        make: Any = AutoModelForCausalLM.from_config
        model: Any = make(config, dtype=dtype)
    model.set_experts_implementation(implementation)
    model.eval()
    found: nn.Module = model
    return found


def olmoe(layers: int) -> Any:
    """OLMoE-1B-7B's architecture, cut to its first layers."""
    from transformers import OlmoeConfig

    return OlmoeConfig(num_hidden_layers=layers)


class StreamedExperts:
    """Moves a model's experts to host memory, and has each layer's copied to the device before it needs them.

    Args:
        model: has `model.layers`, each with `mlp.experts` whose parameters are the experts' weights, all layers alike.
        device: "cuda" for a copy stream and pinned memory; "cpu" copies at once.

    Raises:
        ValueError: a layer has no such experts.
    """

    def __init__(self, model: Any, device: str) -> None:
        self._experts: list[nn.Module] = []
        for index, layer in enumerate(model.model.layers):
            found = getattr(layer.mlp, "experts", None)
            if found is None:
                raise ValueError(f"layer {index} has no mlp.experts; give a model whose layers are all MoE")
            self._experts.append(found)
        on_gpu = device == "cuda"
        self._stream = _CUDA.Stream() if on_gpu else None
        self._host: list[list[Tensor]] = []
        self._copied: list[Any] = [None, None]
        self._used: list[Any] = [None, None]
        self._next: int | None = None
        self._buffers: list[list[Tensor]] = [
            [torch.empty_like(weight.data) for weight in self._experts[0].parameters()] for _ in range(2)
        ]
        for index, module in enumerate(self._experts):
            kept = []
            for weight, buffer in zip(module.parameters(), self._buffers[index % 2], strict=True):
                host = torch.empty(weight.shape, dtype=weight.dtype, device="cpu", pin_memory=on_gpu)
                kept.append(host.copy_(weight.data))
                weight.data = buffer
            self._host.append(kept)
            module.register_forward_pre_hook(self._before(index))
            module.register_forward_hook(self._after(index))

    def _copy(self, index: int) -> None:
        """Start the copy of one layer's experts into its buffer, once the buffer's last user is done."""
        place = index % 2
        if self._stream is None:
            self._move(index)
        else:
            if self._used[place] is not None:
                self._stream.wait_event(self._used[place])
            with _CUDA.stream(self._stream):
                self._move(index)
                self._copied[place] = self._stream.record_event()
        self._next = index

    def _move(self, index: int) -> None:
        for buffer, host in zip(self._buffers[index % 2], self._host[index], strict=True):
            buffer.copy_(host, non_blocking=True)

    def _before(self, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any) -> None:
            if self._next != index:
                self._copy(index)
            if self._stream is not None:
                _CUDA.current_stream().wait_event(self._copied[index % 2])
            if index + 1 < len(self._experts):
                self._copy(index + 1)

        return hook

    def _after(self, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            if self._stream is not None:
                self._used[index % 2] = _CUDA.current_stream().record_event()

        return hook


@dataclass(frozen=True)
class Runner:
    """A model to run, and how to wait until its device is done."""

    model: Any
    device: str
    wait: Callable[[], object]

    def ids(self, batch: int, tokens: int, seed: int) -> Tensor:
        """Random tokens, [B, T]."""
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.model.config.vocab_size, (batch, tokens), generator=draw).to(self.device)

    def prepared(self, run: Forward, seed: int) -> Callable[[], Tensor]:
        """What is timed: one pass, that gives the logits of the last tokens, [B, vocabulary]."""
        ids = self.ids(run.batch, run.tokens, seed)
        kept: dict[str, Any] = {}
        if run.context:
            with torch.no_grad():
                told = self.model(self.ids(run.batch, run.context, seed + 1), use_cache=True, logits_to_keep=1)
            kept = {cache_argument(self.model): told.past_key_values}

        def call() -> Tensor:
            with torch.no_grad():
                logits: Tensor = self.model(ids, use_cache=True, logits_to_keep=1, **kept).logits
            return logits[:, -1]

        return call

    def timed(self, call: Callable[[], object]) -> Lap:
        """Wall seconds of a call, the device's work included."""
        self.wait()
        start = now()
        call()
        self.wait()
        wall_s = lap_since(start).wall_s
        return Lap(wall_s, wall_s)


def forward_jobs(make: Callable[[str], Runner], runs: Sequence[Forward], seed: int, rank: int) -> list[Job]:
    """Timings of passes; a model is made once for each mode, when it is first needed.

    Args:
        make: a runner for "resident" or "streamed".
    """
    made: dict[str, Runner] = {}

    def job(run: Forward) -> Job:
        def runner() -> Runner:
            return made.get(run.mode) or made.setdefault(run.mode, make(run.mode))

        def prepare(_turn: int) -> Callable[[], object]:
            call = runner().prepared(run, seed)
            return lambda: runner().timed(call)

        return Job(run.key, prepare, rank=rank, ready=runner)

    return [job(run) for run in runs]


def maker(config: Any, device: str, dtype: torch.dtype, seed: int, implementation: str) -> Callable[[str], Runner]:
    """Builds a model of that config for a mode."""

    def make(mode: str) -> Runner:
        model = build(config, device, dtype, seed, implementation)
        if mode == "streamed":
            StreamedExperts(model, device)
        return Runner(model, device, _CUDA.synchronize if device == "cuda" else lambda: None)

    return make


LAYERS = 4
"""Of OLMoE's 16, that are run: enough for a copy to hide behind a layer, few enough to be quick."""
FORWARD_RANK = 1


def cuda_forwards(seed: int) -> tuple[list[Forward], list[Job]]:
    """The passes of OLMoE-1B-7B's first layers in bf16, and their jobs."""
    runs = forward_grid("olmoe-1b-7b", LAYERS)
    return runs, forward_jobs(
        maker(olmoe(LAYERS), "cuda", torch.bfloat16, seed, "grouped_mm"), runs, seed, FORWARD_RANK
    )
