"""Lowering a forward iteration (prefill or decode): the program once, its costs for every batch.

Per layer, on each rank: attention; with tensor parallelism an all-reduce; then a dense network, or router, dispatch,
shared experts beside it, experts, combine. With tp > 1 and spread experts the all-reduce is cut in its two halves,
around the experts, and each rank dispatches its share of the group's tokens.

With two batches, each part of a layer is there twice, one after the other on each stream: while one batch's tokens are
on their way, the other one computes. Layers that draft further tokens stand behind the model's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from moesim.costs import network
from moesim.costs.attention import attention_core
from moesim.costs.operators import Operators, Timed, stacked
from moesim.hardware import SOURCES, Cluster
from moesim.layout import Layout
from moesim.mixers import Attention, LatentAttention, Mixer
from moesim.model import BYTES_PER_PARAM, Dense, Experts, Layer, ModelSpec
from moesim.program.batch import Batch, Members
from moesim.program.exchange import Exchange
from moesim.program.lowering import Lowering
from moesim.program.operation import Costs, Draft, Program
from moesim.routing.counting import Counts

Floats = NDArray[np.float64]


def drafting_layer(model: ModelSpec) -> Layer:
    """The model's own layer for multi-token prediction, or one like its last."""
    return (*model.mtp_layers, model.layers[-1])[0]


def _evenly(rows: list[int]) -> slice | NDArray[np.int64]:
    """Row numbers as a slice where their steps are even, which is written several times as fast."""
    steps = set(np.diff(rows).tolist())
    return slice(rows[0], rows[-1] + 1, *steps) if len(steps) == 1 else np.array(rows)


_MOST_STANDING = 64  # parts of a batch, at most so many of which are on the way at once


@dataclass(frozen=True, eq=False)
class _Standing:
    """What iterations share that have as many tokens and requests in each group.

    costs: of all operations but attention and what follows the routing, which are 0.
    projections: of attention, with its launches, for each batch and mixer.
    start: of a dispatch or a combine.
    """

    costs: Costs
    projections: list[dict[Mixer, Timed]]
    start: Timed


class Forward:
    """One model on one layout: a program, and its price for any batch.

    Args:
        slot_params_LRS: parameters of the expert (or slice of one) in each slot of each expert rank.
        operators: of the machine's device, for a bound; rooflines if None.
        exchange: how tokens reach spread experts; flat, by each rank's ports, if None.
        num_batches: 1, or 2 that overlap.
        num_drafts: drafting layers behind the model's own, each with a head.
        slowdown_R: factor on the computation of each rank: 2 for one of half the speed.
    """

    def __init__(
        self,
        model: ModelSpec,
        cluster: Cluster,
        layout: Layout,
        slot_params_LRS: Floats,
        operators: Callable[[str], Operators] | None = None,
        exchange: Exchange | None = None,
        num_batches: int = 1,
        num_drafts: int = 0,
        slowdown_R: Floats | None = None,
    ) -> None:
        self.model, self.cluster, self.layout = model, cluster, layout
        self._exchange, self._slowdown_R = exchange or Exchange(cluster), slowdown_R
        self._num_batches, self._num_drafts = num_batches, num_drafts
        self._layers = (*model.layers, *(drafting_layer(model),) * num_drafts)
        self._slot_params_LRS = slot_params_LRS
        self.operators = operators or partial(Operators, cluster.device)
        self._tp, self._cp, self._spread = layout.attention.tp, layout.attention.cp, layout.experts.ep > 1
        self.program = self._lower()
        self._standing: dict[tuple[str | Members, ...], _Standing] = {}

    def _lower(self) -> Program:
        ranks = np.arange(self.layout.attention.num_ranks, dtype=np.int32)
        groups = {"tp": ranks // self._tp, "ep": ranks // (self.layout.experts.ep * self.layout.experts.etp)}
        if self._cp > 1:
            groups["cp"] = ranks // (self._tp * self._cp) * self._tp + ranks % self._tp
        draft = Draft(len(ranks), groups)
        lowering = Lowering(draft, self._num_batches, self._tp > 1, self._spread, self._cp > 1)
        for i, layer in enumerate(self._layers):
            if layer.mixer:
                lowering.attention(i, halved=isinstance(layer.ffn, Experts) and self._spread)
            if isinstance(layer.ffn, Dense):
                lowering.dense(i)
            elif isinstance(layer.ffn, Experts):
                has_shared = bool(layer.ffn.shared_width or layer.ffn.residual_width)
                beside = has_shared and not self.layout.num_shared_expert_ranks
                lowering.experts(i, beside)
            if i >= len(self.model.layers) - 1:
                lowering.head(-1 if i < len(self.model.layers) else i)
        last = lowering.write()
        if self.operators("value").calibration:
            lowering.rows["host", 0] = [draft.add("host", -1, "host", after=last)]
        mixers = [layer.mixer for layer in self._layers if layer.mixer]
        self._mixers = tuple(dict.fromkeys(mixers))
        rows: dict[tuple[str | Mixer, int], list[int]] = dict(lowering.rows.items())
        for mixer, place in itertools.product(self._mixers, range(self._num_batches)):
            attention = zip(mixers, lowering.rows["attention", place], strict=True)
            rows[mixer, place] = [op for other, op in attention if other == mixer]
        self._rows = {key: _evenly(ops) for key, ops in rows.items()}
        return draft.program()

    def price(
        self,
        parts: Sequence[tuple[Batch, Counts | None]],
        bound: str = "value",
        operators: Callable[[str], Operators] | None = None,
    ) -> Costs:
        """Seconds and bytes of every operation.

        Args:
            parts: each of the batches that overlap (one, or two), with the counts of its tokens over the expert ranks
                (over data-parallel groups where ep = 1); None where experts are priced as the step runs.
            bound: which end of the believed efficiencies to use.
            operators: instead of those given at the start.
        """
        ops = (operators or self.operators)(bound)
        standing = self._stand([batch for batch, _ in parts], ops, is_kept=operators is None)
        costs = standing.costs.copy()
        for place, (batch, counts) in enumerate(parts):
            self._price_batch(place, batch, counts, costs, ops, standing)
        if self._slowed_R is not None:
            costs.seconds_NR[self._computing] *= self._slowed_R
        return costs

    @cached_property
    def _slowed_R(self) -> Floats | None:
        """Factor on the computation of each rank, if there is any."""
        slowed_R = np.ones(self.program.num_ranks) if self._slowdown_R is None else self._slowdown_R
        if self._num_batches > 1:  # cores that communicate do not compute
            slowed_R = slowed_R / (1 - self._exchange.sm_fraction)
        return slowed_R if (slowed_R != 1).any() else None

    @cached_property
    def _computing(self) -> list[int]:
        return [n for n, op in enumerate(self.program.operations) if op.resource == "compute"]

    def _put(self, costs: Costs, part: str | Mixer, place: int, timed: Timed, num_bytes: Floats | None = None) -> None:
        """Write one part of one batch's step (or its attention of one kind), broadcast over its layers and ranks."""
        if (rows := self._rows.get((part, place))) is not None:
            costs.seconds_NR[rows] = timed.seconds
            costs.shares_NX[rows] = timed.shares_X
            if num_bytes is not None:
                costs.bytes_NR[rows] = num_bytes

    def _stand(self, batches: Sequence[Batch], ops: Operators, is_kept: bool) -> _Standing:
        """Prices for the batches' members; those of decoding stay."""
        key: tuple[str | Members, ...] = (ops.bound, *(batch.members for batch in batches))
        if is_kept and (found := self._standing.get(key)) is not None:
            return found
        num_ops, num_ranks = len(self.program.operations), self.program.num_ranks
        costs = Costs(np.zeros((num_ops, num_ranks)), np.zeros((num_ops, num_ranks)), np.zeros((num_ops, len(SOURCES))))
        projections = [self._price_tokens(place, batch, costs, ops) for place, batch in enumerate(batches)]
        self._put(costs, "host", 0, ops.host_overhead())
        found = _Standing(costs, projections, ops.collective_start(self.layout.experts.ep, self.cluster))
        if is_kept and batches[0].phase == "decode":
            if len(self._standing) >= _MOST_STANDING:
                self._standing.clear()
            self._standing[key] = found
        return found

    def _price_tokens(self, place: int, batch: Batch, costs: Costs, ops: Operators) -> dict[Mixer, Timed]:
        """All that neither contexts nor routing change; the projections of attention are returned."""
        h, dtypes, tp = self.model.hidden_size, self.model.dtypes, self._tp
        tokens_D = self._dealt(batch.members.tokens_D)
        put = partial(self._put, costs, place=place)
        dense = [
            self._matmuls(ops, layer.ffn.matmuls(h, tp), tokens_D, dtypes.dense) + ops.launches(3.0)
            for layer in self._layers
            if isinstance(layer.ffn, Dense)
        ]
        if dense:
            put("dense", timed=stacked(dense).repeated(tp))
        heads = [self._head_R(ops, batch), *[self._draft_head_R(ops, batch, tokens_D)] * self._num_drafts]
        put("head", timed=stacked(heads))
        if tp > 1:
            self._price_tp(put, ops, tokens_D)
        if self.model.moe_layers:
            ffn, own_R = self.model.experts, np.repeat(tokens_D, tp) / (tp if self._spread else 1)
            router = self._matmuls(ops, ((ffn.num_experts, h),), own_R, dtypes.dense)
            put("router", timed=router + ops.launches(2.0))
            shared = self._matmuls(ops, ffn.shared_matmuls(h, 1 if self._spread else tp), own_R, dtypes.dense)
            put("shared_experts", timed=shared + ops.launches(3.0))
        return {
            mixer: self._matmuls(ops, mixer.matmuls(h, tp), tokens_D, dtypes.attention)
            + ops.launches(7.0 if isinstance(mixer, LatentAttention) else 4.0)
            for mixer in self._mixers
        }

    def _price_batch(
        self, place: int, batch: Batch, counts: Counts | None, costs: Costs, ops: Operators, standing: _Standing
    ) -> None:
        """What contexts and routing change: attention and experts."""
        put = partial(self._put, costs, place=place)
        for mixer in self._mixers:
            core = self._attention_core_D(ops, mixer, batch)
            core = core if self._cp == 1 else core.repeated(self._cp)
            put(mixer, timed=(standing.projections[place][mixer] + core).repeated(self._tp))
        if self._cp > 1:
            exchanged = {mixer: self._exchanged_D(mixer, batch) for mixer in self._mixers}
            bytes_LR = np.repeat([exchanged[x.mixer] for x in self._layers if x.mixer], self._cp * self._tp, axis=-1)
            moving_s = network.half_all_reduce_s(bytes_LR, self._cp, self.cluster, ops.bound, stride=self._tp)
            start = ops.collective_start(self._cp * self._tp, self.cluster)
            put("kv_exchange", timed=ops.collective(moving_s) + start, num_bytes=bytes_LR * (1 - 1 / self._cp))
        if self.model.moe_layers and counts is not None:
            self._price_experts(put, ops, counts, standing.start)

    def _dealt(self, amount_D: Floats) -> Floats:
        """What each of the context-parallel ranks of a group has of the group's tokens or requests."""
        return amount_D if self._cp == 1 else np.repeat(amount_D, self._cp) / self._cp

    def _exchanged_D(self, mixer: Mixer, batch: Batch) -> Floats:
        """Bytes among the context-parallel ranks of a group, one layer and slice.

        In prefill all get all keys and values (Llama 3, arXiv 2407.21783, 3.3.2); in decode all get all queries, and
        each the outputs of its own requests from all (Helix, arXiv 2507.07120).
        """
        if batch.phase == "prefill":
            heads = min(self._tp, mixer.num_kv_heads) if isinstance(mixer, Attention) else 1
            kv_bytes = BYTES_PER_PARAM[self.model.dtypes.kv]
            return batch.kept_D(mixer.window) * mixer.kv_values_per_token() / heads * kv_bytes
        if isinstance(mixer, LatentAttention):
            width = 2 * mixer.kv_lora_rank + mixer.qk_rope_head_dim
        else:
            assert isinstance(mixer, Attention)
            width = 2 * mixer.head_dim
        return batch.members.tokens_D * mixer.num_heads * width / self._tp * self._activation_bytes

    @property
    def _activation_bytes(self) -> float:
        return BYTES_PER_PARAM[self.model.dtypes.activation]

    def _price_tp(self, put: Callable[..., None], ops: Operators, tokens_D: Floats) -> None:
        tp = self._tp
        buffer_R = np.repeat(tokens_D, tp) * self.model.hidden_size * self._activation_bytes
        half_s = network.half_all_reduce_s(buffer_R, tp, self.cluster, ops.bound)
        half, moved = ops.collective(half_s) + ops.collective_start(tp, self.cluster), buffer_R * (tp - 1) / tp
        both = ops.collective(2 * half_s) + ops.collective_start(tp, self.cluster, 2)
        put("allreduce", timed=both, num_bytes=2 * moved)
        put("reduce_scatter", timed=half, num_bytes=moved)
        put("all_gather", timed=half, num_bytes=moved)

    def _price_experts(self, put: Callable[..., None], ops: Operators, counts: Counts, start: Timed) -> None:
        ffn, h, dtypes = self.model.experts, self.model.hidden_size, self.model.dtypes
        layer_L: Sequence[int] | slice = slice(None)
        if self._num_drafts:  # they route as the last layer
            layer_L = [*range(len(counts.load_LRS)), *[-1] * self._num_drafts]
        experts = ops.experts(counts.load_LRS, self._slot_params_LRS, ffn, h, dtypes.experts).taken(layer_L)
        put("experts", timed=experts if self._spread else experts.repeated(self._tp))
        if self._spread:
            sizes = {"dispatch": h * self._dispatch_bytes, "combine": h * self._activation_bytes}
            for name, token_bytes in sizes.items():
                seconds_LR = self._exchange.seconds_LR(counts, token_bytes, ops.bound, name == "combine")
                near_LR, far_LR = counts.traffic_CLR[:2] if name == "dispatch" else counts.traffic_CLR[2:]
                num_bytes = (near_LR + far_LR)[layer_L] * token_bytes
                put(name, timed=(ops.collective(seconds_LR) + start).taken(layer_L), num_bytes=num_bytes)

    @property
    def _dispatch_bytes(self) -> float:
        """Bytes per value sent to the experts: fp8 experts take fp8 rows (DeepSeek-V3), others the activation's."""
        return BYTES_PER_PARAM["fp8_block"] if self.model.dtypes.experts == "fp8_block" else self._activation_bytes

    def _matmuls(self, ops: Operators, shapes: Sequence[tuple[int, int]], tokens: Floats, dtype: str) -> Timed:
        return ops.matmuls(shapes, tokens, dtype, self._activation_bytes)

    def _head_R(self, ops: Operators, batch: Batch) -> Timed:
        """Output head over the last token of each request (and those drafted), cut by tp."""
        requests_D = self._dealt(batch.members.requests_D) * batch.queries
        shape = (-(-self.model.vocab_size // self._tp), self.model.hidden_size)
        head = self._matmuls(ops, (shape,), requests_D, self.model.dtypes.embedding)
        return (head + ops.launches(2.0)).repeated(self._tp)

    def _draft_head_R(self, ops: Operators, batch: Batch, tokens_D: Floats) -> Timed:
        """What joins hidden state and embedding before a drafting layer (DeepSeek-V3, 2.2), and the head behind it."""
        h = self.model.hidden_size
        joined = self._matmuls(ops, ((h // self._tp, 2 * h),), tokens_D, self.model.dtypes.dense) + ops.launches(3.0)
        return joined.repeated(self._tp) + self._head_R(ops, replace(batch, queries=1))

    def _attention_core_D(self, ops: Operators, mixer: Mixer, batch: Batch) -> Timed:
        """Attention of one layer without its projections, for each data-parallel group (each of its ranks alike)."""
        kept_D, members = batch.kept_D(mixer.window), batch.members
        if batch.phase == "decode":  # each rank has its share of every cache
            kept_D = kept_D if self._cp == 1 else kept_D / self._cp
            pairs_D = batch.queries * kept_D
        else:
            pairs_D = batch.pairs_D(mixer.window) / self._cp
        return attention_core(
            ops, self.model, mixer, self._tp, batch.phase, members.requests_D, members.tokens_D, kept_D, pairs_D
        )
