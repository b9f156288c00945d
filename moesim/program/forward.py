"""Lowering a forward iteration (prefill or decode): the program once, its costs for every batch.

Per layer, on each rank: attention; with tensor parallelism an all-reduce; then a dense network, or router, dispatch,
shared experts beside it, experts, combine. With tp > 1 and spread experts the all-reduce is cut in its two halves,
around the experts, and each rank dispatches its share of the group's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
from numpy.typing import NDArray

from moesim.costs import network
from moesim.costs.operators import Operators, Timed, stacked
from moesim.hardware import SOURCES, Cluster
from moesim.layout import Layout
from moesim.mixers import Attention, LatentAttention, Mamba, Mixer
from moesim.model import BYTES_PER_PARAM, Dense, Experts, ModelSpec
from moesim.program.operation import Costs, Draft, Fragment, Program
from moesim.routing.counting import Counts

Floats = NDArray[np.float64]
Expand = Callable[[int, int, int], Fragment]
"""(MoE layer, id of the choice, id of the fragment's first operation) -> fragment."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The work of one iteration.

    Attributes:
        phase: "prefill" or "decode".
        lengths_Q: tokens of each request: the prompt (prefill), or the context it looks back on (decode).
        group_Q: data-parallel group of each request.
        rows_B: row of the trace for each token.
        group_B: data-parallel group of each token.
    """

    phase: str
    lengths_Q: NDArray[np.int64]
    group_Q: NDArray[np.int64]
    rows_B: NDArray[np.int64]
    group_B: NDArray[np.int64]

    def pairs_D(self, num_groups: int, window: int | None) -> Floats:
        """Query-key pairs of one layer in each group: causal in prefill, the whole context in decode."""
        n = self.lengths_Q.astype(np.float64)
        if self.phase == "decode":
            pairs = n if window is None else np.minimum(n, window)
        else:
            w = n if window is None else np.minimum(n, window)
            pairs = n * w - w * (w - 1) / 2
        return np.bincount(self.group_Q, pairs, num_groups).astype(np.float64)

    def kept_D(self, num_groups: int, window: int | None) -> Floats:
        """Cached tokens that the requests of each group read."""
        n = self.lengths_Q if window is None else np.minimum(self.lengths_Q, window)
        return np.bincount(self.group_Q, n, num_groups).astype(np.float64)


class Forward:
    """One model on one layout: a program, and its price for any batch.

    Args:
        slot_params_LRS: parameters of the expert (or slice of one) in each slot of each expert rank.
        expand: where given, experts are not one operation but a choice that falls when the router is done.
        operators: of the machine's device, for a bound; rooflines if None.
    """

    def __init__(
        self,
        model: ModelSpec,
        cluster: Cluster,
        layout: Layout,
        slot_params_LRS: Floats,
        expand: Expand | None = None,
        operators: Callable[[str], Operators] | None = None,
    ) -> None:
        self.model, self.cluster, self.layout = model, cluster, layout
        self._slot_params_LRS = slot_params_LRS
        self._operators = operators or partial(Operators, cluster.device)
        self._tp, self._dp, self._spread = layout.attention.tp, layout.attention.dp, layout.experts.ep > 1
        self._rows: dict[str, list[int]] = {}
        self.program = self._lower(expand)

    def _lower(self, expand: Expand | None) -> Program:
        ranks = np.arange(self.layout.num_ranks, dtype=np.int32)
        groups = {"tp": ranks // self._tp, "ep": ranks // (self.layout.experts.ep * self.layout.experts.etp)}
        draft = Draft(len(ranks), groups)

        def add(name: str, layer: int, resource: str, group: str = "rank", after: tuple[int, ...] = ()) -> int:
            op = draft.add(name, layer, resource, group, after)
            self._rows.setdefault(name, []).append(op)
            return op

        moe_layer, last = 0, cast(tuple[int, ...], ())
        for i, layer in enumerate(self.model.layers):
            routed = isinstance(layer.ffn, Experts)
            if layer.mixer:
                last = (add("attention", i, "compute", after=last),)
                if self._tp > 1:
                    name = "reduce_scatter" if routed and self._spread else "allreduce"
                    last = (add(name, i, "network", "tp", last),)
            if isinstance(layer.ffn, Dense):
                last = (add("dense", i, "compute", after=last),)
                if self._tp > 1:
                    last = (add("allreduce", i, "network", "tp", last),)
            elif isinstance(layer.ffn, Experts):
                last = (self._lower_experts(draft, add, layer.ffn, i, moe_layer, last, expand),)
                moe_layer += 1
        head = add("head", -1, "compute", after=last)
        if self._operators("value").calibration:
            add("host", -1, "host", after=(head,))
        return draft.program()

    def _lower_experts(
        self, draft: Draft, add: Callable[..., int], ffn: Experts, i: int, moe_layer: int,
        before: tuple[int, ...], expand: Expand | None,
    ) -> int:  # fmt: skip
        router = last = add("router", i, "compute", after=before)
        if self._spread:
            last = add("dispatch", i, "network", "ep", (router,))
        if ffn.shared_width or ffn.residual_width:
            shared = add("shared_experts", i, "compute", after=(router,))
            waits: tuple[int, ...] = (last, shared)
        else:
            waits = (last,)
        if expand is not None:
            last = draft.choose("fetch", i, 0, partial(expand, moe_layer), waits)
        else:
            last = add("experts", i, "compute", after=waits)
        if self._spread:
            last = add("combine", i, "network", "ep", (last,))
            return add("all_gather", i, "network", "tp", (last,)) if self._tp > 1 else last
        return add("allreduce", i, "network", "tp", (last,)) if self._tp > 1 else last

    def price(self, batch: Batch, counts: Counts | None, bound: str = "value") -> Costs:
        """Seconds and bytes of every operation for one batch.

        Args:
            counts: of the batch's tokens over the expert ranks (over data-parallel groups where ep = 1); None where
                experts are priced as the step runs.
            bound: which end of the believed efficiencies to use.
        """
        num_ops, num_ranks, tp = len(self.program.operations), self.program.num_ranks, self._tp
        costs = Costs(np.zeros((num_ops, num_ranks)), np.zeros((num_ops, num_ranks)), np.zeros((num_ops, len(SOURCES))))
        tokens_D = np.bincount(batch.group_B, minlength=self._dp).astype(np.float64)
        ops = self._operators(bound)
        h, dtypes = self.model.hidden_size, self.model.dtypes

        def put(name: str, timed: Timed, num_bytes: Floats | float = 0.0) -> None:
            """Write one part of the step, broadcast over its layers and ranks."""
            if rows := self._rows.get(name):
                costs.seconds_NR[rows] = timed.seconds
                costs.bytes_NR[rows] = num_bytes
                costs.shares_NX[rows] = timed.shares_X

        per_mixer: dict[Mixer, Timed] = {}
        attention: list[Timed] = []
        dense: list[Timed] = []
        for layer in self.model.layers:
            if layer.mixer:
                if layer.mixer not in per_mixer:
                    launches = ops.launches(7.0 if isinstance(layer.mixer, LatentAttention) else 4.0)
                    per_mixer[layer.mixer] = self._attention_D(ops, layer.mixer, batch, tokens_D) + launches
                attention.append(per_mixer[layer.mixer])
            if isinstance(layer.ffn, Dense):
                dense.append(self._matmuls(ops, layer.ffn.matmuls(h, tp), tokens_D, dtypes.dense) + ops.launches(3.0))
        for name, layers in (("attention", attention), ("dense", dense)):
            if layers:
                put(name, stacked(layers).repeated(tp))
        put("head", self._head_R(ops, batch))
        put("host", ops.host_overhead())
        if tp > 1:
            self._price_tp(put, ops, tokens_D)
        if self.model.moe_layers:
            self._price_experts(put, ops, counts, tokens_D)
        return costs

    @property
    def _activation_bytes(self) -> float:
        return BYTES_PER_PARAM[self.model.dtypes.activation]

    def _price_tp(self, put: Callable[..., None], ops: Operators, tokens_D: Floats) -> None:
        tp = self._tp
        buffer_R = np.repeat(tokens_D, tp) * self.model.hidden_size * self._activation_bytes
        half_s = network.half_all_reduce_s(buffer_R, tp, self.cluster, ops.bound)
        half, moved = ops.collective(half_s) + ops.collective_start(tp, self.cluster), buffer_R * (tp - 1) / tp
        put("allreduce", ops.collective(2 * half_s) + ops.collective_start(tp, self.cluster, 2), 2 * moved)
        put("reduce_scatter", half, moved)
        put("all_gather", half, moved)

    def _price_experts(self, put: Callable[..., None], ops: Operators, counts: Counts | None, tokens_D: Floats) -> None:
        ffn, h, dtypes = self.model.experts, self.model.hidden_size, self.model.dtypes
        own_R = np.repeat(tokens_D, self._tp) / (self._tp if self._spread else 1)
        put("router", self._matmuls(ops, ((ffn.num_experts, h),), own_R, dtypes.dense) + ops.launches(2.0))
        shared = ffn.shared_matmuls(h, 1 if self._spread else self._tp)
        put("shared_experts", self._matmuls(ops, shared, own_R, dtypes.dense) + ops.launches(3.0))
        if counts is None:
            return
        experts = ops.experts(counts.load_LRS, self._slot_params_LRS, ffn, h, dtypes.experts)
        put("experts", experts if self._spread else experts.repeated(self._tp))
        if self._spread:
            sizes = {"dispatch": h * self._dispatch_bytes, "combine": h * self._activation_bytes}
            start = ops.collective_start(self.layout.experts.ep, self.cluster)
            for name, token_bytes in sizes.items():
                traffic = counts.traffic_CLR if name == "dispatch" else counts.traffic_CLR[[2, 3, 0, 1]]
                seconds_LR = network.all_to_all_s(traffic, token_bytes, self.cluster, ops.bound)
                put(name, ops.collective(seconds_LR) + start, (traffic[0] + traffic[1]) * token_bytes)

    @property
    def _dispatch_bytes(self) -> float:
        """Bytes per value sent to the experts: fp8 experts take fp8 rows (DeepSeek-V3), others the activation's."""
        return BYTES_PER_PARAM["fp8_block"] if self.model.dtypes.experts == "fp8_block" else self._activation_bytes

    def _matmuls(self, ops: Operators, shapes: Sequence[tuple[int, int]], tokens: Floats, dtype: str) -> Timed:
        return ops.matmuls(shapes, tokens, dtype, self._activation_bytes)

    def _head_R(self, ops: Operators, batch: Batch) -> Timed:
        """Output head over the last token of each request, cut by tp."""
        requests_D = np.bincount(batch.group_Q, minlength=self._dp).astype(np.float64)
        shape = (-(-self.model.vocab_size // self._tp), self.model.hidden_size)
        head = self._matmuls(ops, (shape,), requests_D, self.model.dtypes.embedding)
        return (head + ops.launches(2.0)).repeated(self._tp)

    def _attention_D(self, ops: Operators, mixer: Mixer, batch: Batch, tokens_D: Floats) -> Timed:
        """Projections plus core of one layer, for each data-parallel group (each of its ranks alike)."""
        tp, kv_bytes, h = self._tp, BYTES_PER_PARAM[self.model.dtypes.kv], self.model.hidden_size
        projections = self._matmuls(ops, mixer.matmuls(h, tp), tokens_D, self.model.dtypes.attention)
        pairs_D, kept_D = batch.pairs_D(self._dp, mixer.window), batch.kept_D(self._dp, mixer.window)
        requests_D = np.bincount(batch.group_Q, minlength=self._dp).astype(np.float64)
        cache_bytes = kept_D * mixer.kv_values_per_token() * kv_bytes
        if isinstance(mixer, Attention):
            flops = 4.0 * mixer.num_heads * mixer.head_dim * pairs_D / tp
            cache_bytes = cache_bytes / min(tp, mixer.num_kv_heads)
        elif isinstance(mixer, LatentAttention):
            absorbed = 2 * mixer.kv_lora_rank + mixer.qk_rope_head_dim
            width = absorbed if batch.phase == "decode" else mixer.head_dim + mixer.v_head_dim
            flops = 2.0 * mixer.num_heads * width * pairs_D / tp
        else:
            inner = mixer.expand * h if isinstance(mixer, Mamba) else mixer.num_heads * mixer.value_head_dim
            depth = mixer.state_size if isinstance(mixer, Mamba) else mixer.key_head_dim
            flops = 6.0 * inner * depth * tokens_D / tp
            cache_bytes = 2.0 * requests_D * mixer.state_values(h) * kv_bytes / tp
        kv_dtype = self.model.dtypes.kv
        return projections + ops.attention_core(
            mixer, batch.phase, requests_D, kept_D, flops, cache_bytes, tp, kv_dtype
        )
