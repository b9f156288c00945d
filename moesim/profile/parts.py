"""A Hugging Face MoE model with random weights, its parts on their own, and whole passes with any routing.

The parts tile the pass: the attention modules, the MoE blocks, and the frame, which is the same model with these two
replaced by nothing. A part is timed on its own weights in several layers, one after another, so that they are as cold
as in a pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from moesim.profile.rounds import Job, Lap, lap_since, now
from moesim.profile.shapes import Cell, ModelShape, work

FLUSH_BYTES = 64 << 20
"""Read before every timing, to leave nothing of the last one in the caches."""
PASSING_BYTES = 16 << 20
"""Read in place of each module that the frame leaves out: far more than a core's private cache."""
_TIMING_S = 0.015
"""About what one timing of a part should take, at `_FLOPS_PER_S` and `_BYTES_PER_S`: several layers if one is short."""
_FLOPS_PER_S, _BYTES_PER_S = 80e9, 10e9


class _Nothing(nn.Module):
    """In place of an attention module (`pair`) or a MoE block: reads `weights` and hands back a copy of its input.

    What it takes is kept in `spent`: it is no part of the frame, and is there to leave the caches as the real module
    would.
    """

    def __init__(self, pair: bool, weights: Tensor, spent: list[Lap]) -> None:
        super().__init__()
        self.pair, self.weights, self.spent = pair, weights, spent

    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        """A copy of the input."""
        start = now()
        self.weights.sum()
        hidden_states = hidden_states.clone()
        self.spent.append(lap_since(start))
        return (hidden_states, None) if self.pair else hidden_states


class ModelParts:
    """The model of a shape, in fp32 on the CPU, ready to be timed whole or in parts.

    Args:
        shape: the model.
        max_batch, max_context: the most requests and cached tokens that will be asked for.
        seed: of weights and inputs.
    """

    def __init__(self, shape: ModelShape, max_batch: int, max_context: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.shape = shape
        self.model = _build(shape, shape.width, shape.experts)
        self._flushed = torch.zeros(FLUSH_BYTES // 4)
        self._passing = self._flushed[: PASSING_BYTES // 4]
        self._spent: list[Lap] = []
        self._frame = _build(shape, 8, shape.top_k)
        for layer in self._frame.model.layers:
            layer.self_attn, layer.mlp = (_Nothing(pair, self._passing, self._spent) for pair in (True, False))
        self._frame.model.embed_tokens, self._frame.lm_head = self.model.model.embed_tokens, self.model.lm_head
        self._layers = list(self.model.model.layers)
        pool = (shape.layers, 2, max_batch, shape.kv_heads, max_context, shape.head_dim)
        self._keys_values = torch.ones(pool)
        self._next_layer: dict[str, int] = {}
        self._next_expert = [0] * shape.layers
        self._forced: dict[int, tuple[Tensor, Tensor]] = {}
        self._chosen: dict[int, Tensor] = {}
        for index, layer in enumerate(self._layers):
            layer.mlp.gate.register_forward_hook(self._after_router(index))

    def _after_router(self, index: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, _inputs: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if index not in self._forced:
                self._chosen[index] = next(x for x in outputs if not x.is_floating_point())
                return None
            ids, weights = self._forced[index]
            logits = self.shape.experts
            return tuple(ids if not x.is_floating_point() else x if x.shape[-1] == logits else weights for x in outputs)

        return hook

    def job(self, cell: Cell) -> Job:
        """The timing of one cell of this model."""
        layers = 1
        if not cell.op.startswith("frame"):
            flops, num_bytes = work(self.shape, cell.op, cell.shape)
            layers = int(
                np.clip(_TIMING_S / max(flops / _FLOPS_PER_S, num_bytes / _BYTES_PER_S), 1, self.shape.layers - 1)
            )

        return Job(
            cell.key, lambda _turn: self._part(cell, self._places(cell.op.partition("_")[0], layers)), layers, cell.rank
        )

    def _places(self, op: str, layers: int) -> list[int]:
        """The layers that were timed longest ago, so that their weights are cold, after the last timed, to warm up."""
        first = self._next_layer.get(op, 0)
        self._next_layer[op] = (first + layers) % self.shape.layers
        return [(first + i) % self.shape.layers for i in range(-1, layers)]

    def _part(self, cell: Cell, places: list[int]) -> Callable[[], object]:
        if cell.op == "moe_block":
            active, rows = cell.shape
            return self._moe(active, rows, places)
        batch = cell.shape[0]
        decodes = cell.op.endswith("decode")
        tokens, context = (1, cell.shape[1] if len(cell.shape) > 1 else 1) if decodes else (cell.shape[1], 0)
        if cell.op.startswith("attention"):
            return self._attention(batch, tokens, context, places)
        return self._whole(self._frame, self._ids(batch, tokens), context)

    def _moe(self, active: int, rows: int, places: list[int]) -> Callable[[], object]:
        """`rows` tokens for each of `active` experts, those of each layer that were timed longest ago."""
        K, E = self.shape.top_k, self.shape.experts
        ids = (torch.arange(active * rows) % active).reshape(-1, K)
        warm, *timed = places
        self._force({i: (x + self._next_expert[i]) % E for i, x in [(warm, ids[:1] - K), *((i, ids) for i in timed)]})
        for i in timed:
            self._next_expert[i] = (self._next_expert[i] + active) % E
        hidden = torch.randn(1, len(ids), self.shape.hidden)
        return self._cold(
            partial(self._layers[warm].mlp, hidden[:, :1]), [partial(self._layers[i].mlp, hidden) for i in timed]
        )

    def _attention(self, batch: int, tokens: int, context: int, places: list[int]) -> Callable[[], object]:
        def call(place: int, batch: int, tokens: int, context: int) -> Callable[[], object]:
            positions = torch.arange(context, context + tokens)[None]
            hidden = torch.randn(batch, tokens, self.shape.hidden)
            module = self._layers[place].self_attn
            given = {
                "hidden_states": hidden,
                "position_embeddings": self.model.model.rotary_emb(hidden, position_ids=positions),
                "attention_mask": None,
                "position_ids": positions,
                cache_argument(module): self._cache(batch, context),
            }
            return partial(module, **given)

        warm, *timed = places
        return self._cold(call(warm, 1, 1, 1), [call(place, batch, tokens, context) for place in timed])

    def pass_job(
        self, key: str, batch: int, tokens: int, context: int, ids_LTK: NDArray[np.int64] | None, rank: int = 0
    ) -> Job:
        """The timing of a whole pass: `tokens` new tokens for each of `batch` requests after `context` cached ones.

        Args:
            key: its name.
            batch, tokens, context: its size.
            ids_LTK: experts of every token in each layer; None to leave the choice to the model.
            rank: how soon it is dropped.
        """
        inputs = self._ids(batch, tokens, key)

        def prepare(_turn: int) -> Callable[[], object]:
            self._force({} if ids_LTK is None else {i: torch.from_numpy(ids) for i, ids in enumerate(ids_LTK)})
            return self._whole(self.model, inputs, context)

        return Job(key, prepare, rank=rank)

    def natural_counts(self, job: Job) -> NDArray[np.int64]:
        """[L, E] tokens of each expert where the model chose itself; runs the pass."""
        job.prepare(0)()
        rows = [torch.bincount(self._chosen[i].flatten(), minlength=self.shape.experts) for i in sorted(self._chosen)]
        return np.stack([row.numpy() for row in rows])

    def _force(self, ids: dict[int, Tensor]) -> None:
        self._forced = {i: (x, torch.full(x.shape, 1 / self.shape.top_k)) for i, x in ids.items()}

    def _ids(self, batch: int, tokens: int, key: str = "") -> Tensor:
        seed = np.random.default_rng([*key.encode(), batch, tokens])
        return torch.from_numpy(seed.integers(0, self.shape.vocabulary, (batch, tokens)))

    def _cache(self, batch: int, context: int) -> Any:
        """A cache that holds `context` tokens of each request, another part of the pool for each layer."""
        cache: Any = transformers.DynamicCache(config=self.model.config)
        if context:
            for layer, (keys, values) in zip(cache.layers, self._keys_values, strict=True):
                keys, values = keys[:batch, :, :context], values[:batch, :, :context]
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
        return cache

    def _whole(self, model: Any, inputs: Tensor, context: int) -> Callable[[], object]:
        cache = {cache_argument(model): self._cache(inputs.shape[0], context)}
        self._flushed.sum()
        return partial(self._run, [partial(model, inputs, use_cache=True, logits_to_keep=1, **cache)])

    def _cold(self, warm: Callable[[], object], calls: list[Callable[[], object]]) -> Callable[[], Lap]:
        """The calls, after driving out what the caches hold and `warm`: code warm, weights cold."""
        self._flushed.sum()
        self._run([warm])
        return partial(self._run, calls)

    def _run(self, calls: list[Callable[[], object]]) -> Lap:
        """Time the calls, without gradients, less what was spent on standing in for modules.

        Before each, other memory is read, as other modules do in a pass: their code and data leave the nearest caches.
        """
        self._spent.clear()
        laps = []
        with torch.inference_mode():
            for call in calls:
                self._passing.sum()
                start = now()
                call()
                laps.append(lap_since(start))
        wall_s, cpu_s = (sum(x[i] for x in laps) - sum(x[i] for x in self._spent) for i in (0, 1))
        return Lap(wall_s, cpu_s)


def cache_argument(module: nn.Module) -> str:
    """The cache's argument: transformers 5.24 renamed it."""
    called = inspect.unwrap(type(module).forward)
    return "cache" if "cache" in inspect.signature(called).parameters else "past_key_values"


def _build(shape: ModelShape, width: int, experts: int) -> Any:
    common: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_experts_per_tok": shape.top_k,
        "max_position_embeddings": 8192,
        "sliding_window": None,
    }
    if shape.family == "mixtral":
        config: Any = transformers.MixtralConfig(num_local_experts=experts, intermediate_size=width, **common)
    else:
        config = transformers.Qwen3MoeConfig(num_experts=experts, moe_intermediate_size=width, **common)
    build: Any = transformers.AutoModelForCausalLM
    return build.from_config(config).eval()


def machine_job(cell: Cell) -> Job:
    """The timing of a matrix product or a copy, fp32, or of one small operator called from Python."""
    if cell.op == "launch":
        small, calls = torch.zeros(8), 200
        return Job(cell.key, lambda _turn: lambda: [small.add_(1.0) for _ in range(calls)], calls, cell.rank)
    if cell.op == "copy":
        source = torch.zeros(cell.shape[0] // 4)
        target = torch.ones_like(source)
        return Job(cell.key, lambda _turn: lambda: target.copy_(source), rank=cell.rank)
    rows, columns, inner = cell.shape
    left, right = torch.randn(rows, inner), torch.randn(columns, inner)
    return Job(cell.key, lambda _turn: lambda: nn.functional.linear(left, right), rank=cell.rank)
