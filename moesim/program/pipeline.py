"""Pipeline parallelism in its steady state: a belt on which each stage works at another batch.

An iteration of S stages has S turns. Each group's requests are cut in S batches; in turn t, stage s computes its layers
for batch (t - s) mod S and then hands its tokens on. So a batch passes all stages in one iteration, wherever it began,
and no stage stands idle but for stages that take longer. Filling the belt before the first iteration, and draining it
after the last, is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.costs import network
from moesim.costs.operators import Operators, Timed
from moesim.hardware import SOURCES
from moesim.model import BYTES_PER_PARAM
from moesim.program.batch import Batch
from moesim.program.forward import Forward
from moesim.program.operation import Costs, Draft, Operation, Program
from moesim.routing.counting import Counts

Floats = NDArray[np.float64]
Parts = Sequence[tuple[Batch, Counts | None]]


class Pipeline:
    """A belt of stages, as a program over all ranks, stage after stage.

    Args:
        stage: the whole model on the ranks of one stage; a stage runs its own layers of it.
        num_stages: S.
    """

    def __init__(self, stage: Forward, num_stages: int, slowdown_R: Floats | None = None) -> None:
        self._stage, self._num_stages, self._slowdown_R = stage, num_stages, slowdown_R
        self._source: list[list[int]] = []  # of each operation: for each stage, the one of the whole model, or -1
        self._turn: list[int] = []
        self.program = self._lower()

    def _lower(self) -> Program:
        inner, S = self._stage.program, self._num_stages
        by_layer: dict[int, list[int]] = {}
        for n, op in enumerate(inner.operations):
            by_layer.setdefault(op.layer, []).append(n)
        last = [n for n in by_layer.pop(-1) if inner.operations[n].name == "head"]
        host = [n for n, op in enumerate(inner.operations) if op.name == "host"]
        edges = [s * len(by_layer) // S for s in range(S + 1)]
        stages = [[by_layer[i] for i in range(edges[s], edges[s + 1])] for s in range(S)]
        ranks = np.arange(S * inner.num_ranks, dtype=np.int32)
        stage_R, inner_R = ranks // inner.num_ranks, ranks % inner.num_ranks
        groups = {
            name: (stage_R * inner.num_ranks + group_R[inner_R]).astype(np.int32)
            for name, group_R in inner.groups.items()
        }
        draft = Draft(len(ranks), {**groups, "belt": inner_R})
        before: list[int] = []
        for turn in range(S):
            for layer in range(max(map(len, stages))):
                before = self._lower_layer(
                    draft, turn, layer, [s[layer] if layer < len(s) else [] for s in stages], before
                )
            before = self._lower_layer(draft, turn, -1, [[]] * (S - 1) + [last], before)
            before = [self._add(draft, turn, Operation("send", -1, "network", "belt", ()), [-1] * S, before)]
        for n in host:
            self._add(draft, S - 1, Operation("host", -1, "host", "rank", ()), [n] * S, before)
        return draft.program()

    def _lower_layer(
        self, draft: Draft, turn: int, layer: int, ids: Sequence[Sequence[int]], before: Sequence[int]
    ) -> list[int]:
        """One layer of each stage; unlike layers stand one after the other, and take the time of their stages only."""
        operations = self._stage.program.operations
        alike: dict[tuple[str, ...], list[int]] = {}
        for stage, layer_ids in enumerate(ids):
            if layer_ids:
                alike.setdefault(tuple(operations[n].name for n in layer_ids), []).append(stage)
        ends: list[int] = []
        for names, stages in alike.items():
            outer: dict[int, int] = {}
            for k in range(len(names)):
                mine = {stage: ids[stage][k] for stage in stages}
                some = operations[next(iter(mine.values()))]
                assert isinstance(some, Operation)
                waits = {outer.get(a, -1) for n in mine.values() for a in operations[n].after}
                after = [*sorted(waits - {-1}), *(before if -1 in waits or not waits else [])]
                source = [mine.get(stage, -1) for stage in range(self._num_stages)]
                op = self._add(draft, turn, replace(some, layer=layer), source, after)
                outer |= dict.fromkeys(mine.values(), op)
            ends.append(op)
        return ends or list(before)

    def _add(self, draft: Draft, turn: int, like: Operation, source: list[int], after: Sequence[int]) -> int:
        self._source.append(source)
        self._turn.append(turn)
        return draft.add(like.name, like.layer, like.resource, like.group, after)

    def price(self, parts: Parts, bound: str = "value", operators: Callable[[str], Operators] | None = None) -> Costs:
        """As `Forward.price`, of the S batches that are on the belt."""
        S, Rs = self._num_stages, self._stage.program.num_ranks
        priced = [self._stage.price([part], bound, operators) for part in parts]
        source_NS, turn_N = np.array(self._source), np.array(self._turn)
        part_NS = (turn_N[:, None] - np.arange(S)) % S
        runs_NS = source_NS >= 0
        seconds_NSR = np.stack([c.seconds_NR for c in priced])[part_NS, source_NS] * runs_NS[:, :, None]
        bytes_NSR = np.stack([c.bytes_NR for c in priced])[part_NS, source_NS] * runs_NS[:, :, None]
        shares_NX = priced[0].shares_NX[source_NS.max(axis=1)]
        ops = (operators or self._stage.operators)(bound)
        sends = [n for n, op in enumerate(self.program.operations) if op.name == "send"]
        for n in sends:
            sent = [self._sent(ops, parts[p][0]) if s < S - 1 else None for s, p in enumerate(part_NS[n])]
            for s, found in enumerate(sent):
                if found is not None:
                    timed, num_bytes_R = found
                    seconds_NSR[n, s : s + 2] = np.maximum(seconds_NSR[n, s : s + 2], timed.seconds)
                    bytes_NSR[n, s], shares_NX[n] = num_bytes_R, timed.shares_X
        costs = Costs(seconds_NSR.reshape(-1, S * Rs), bytes_NSR.reshape(-1, S * Rs), shares_NX)
        if self._slowdown_R is not None:
            computing = [n for n, op in enumerate(self.program.operations) if op.resource == "compute"]
            costs.seconds_NR[computing] *= self._slowdown_R
        assert costs.shares_NX.shape[1] == len(SOURCES)
        return costs

    def _sent(self, ops: Operators, batch: Batch) -> tuple[Timed, Floats]:
        """A batch's rows from each rank of a stage to its like in the next one, and their bytes, [Rs]."""
        stage = self._stage
        width = stage.model.hidden_size * BYTES_PER_PARAM[stage.model.dtypes.activation]
        per_group = stage.program.num_ranks // batch.members.num_groups
        num_bytes_R = np.repeat(batch.members.tokens_D / stage.layout.attention.cp * width, per_group)
        span = stage.program.num_ranks + 1
        moved_s = num_bytes_R / network.rate_bytes_per_s(span, stage.cluster, ops.bound)
        return ops.collective(moved_s) + ops.collective_start(span, stage.cluster), num_bytes_R
