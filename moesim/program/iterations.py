"""From a scenario to its iterations: prefill waves, then one decode iteration per output token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moesim.costs.operators import Operators
from moesim.policies import REGISTRIES
from moesim.program.forward import Batch, Forward
from moesim.program.offload import ExpertStore
from moesim.program.operation import Costs, Program
from moesim.routing.counting import Counter, Counts
from moesim.routing.replay import Replay
from moesim.scenario import Scenario


@dataclass(frozen=True, eq=False)
class Iteration:
    """One step, priced. It must be played before the next one is taken: the expert store lives on between them."""

    phase: str
    program: Program
    costs: Costs
    counts: Counts | None


class Iterations:
    """The steps of one run of a scenario, in order."""

    def __init__(self, scenario: Scenario, bound: str = "value") -> None:
        self.scenario, self.bound = scenario, bound
        model, layout, cluster = scenario.model, scenario.layout, scenario.cluster
        self.replay = Replay(scenario.trace, scenario.stream("replay"))
        workload = scenario.workload
        self.lengths_Q = self.replay.prompt_lengths(workload.num_requests, workload.prompt_tokens)
        self._group_Q = np.arange(workload.num_requests) * layout.attention.dp // workload.num_requests
        self._decode_SQ = self.replay.decode_rows(workload.num_requests, workload.output_tokens - 1)
        self._spread = layout.experts.ep > 1
        self._counter: Counter | None = None
        slot_params_LRS = np.zeros((0, 0, 0))
        if model.moe_layers:
            num_experts = model.experts.num_experts
            slots = num_experts + layout.num_redundant_experts
            policy = REGISTRIES["placement"][scenario.policies.placement]()
            placement = policy.place(len(model.moe_layers), num_experts, slots, layout.experts.ep)
            num_ranks = layout.num_ranks if self._spread else layout.attention.dp
            node_R = (np.arange(num_ranks) // cluster.devices_per_node).astype(np.int32)
            self._counter = Counter(placement, num_experts, num_ranks, node_R)
            params_E = np.array(
                [model.experts.expert_params(model.hidden_size, w) for w in model.experts.expert_widths]
            )
            slot_params_LP = params_E[placement.slot_expert_LP] / layout.experts.etp
            slot_params_LRS = slot_params_LP.reshape(len(model.moe_layers), layout.experts.ep, -1)
            slot_params_LRS = np.tile(slot_params_LRS, (1, num_ranks // layout.experts.ep, 1))
        self.store = self._make_store() if scenario.is_offloaded and model.moe_layers else None
        expand = self.store.expand if self.store else None
        self._forward = Forward(model, cluster, layout, slot_params_LRS, expand, self._operators)

    def _operators(self, bound: str) -> Operators:
        s = self.scenario
        return Operators(s.cluster.device, bound, s.tables, s.calibration)

    def _make_store(self) -> ExpertStore:
        s = self.scenario
        cache = REGISTRIES["cache"][s.policies.cache]()
        num_experts = s.model.experts.num_experts
        slots = int(np.ceil(num_experts * s.policies.device_expert_fraction))
        future = self._future_SLE() if cache.needs_future else None
        prefetch = REGISTRIES["prefetch"][s.policies.prefetch]()
        return ExpertStore(s.model, s.cluster, slots, cache.start(future), prefetch, self._operators(self.bound))

    def _future_SLE(self) -> np.ndarray:
        """Which experts each iteration will use, for oracles only: bool [S, L, E]."""
        ids_TLK, num_experts = self.scenario.trace.expert_ids_TLK, self.scenario.trace.num_experts
        batches = [*self._prefill_batches(), *self._decode_batches()]
        used_SLE = np.zeros((len(batches), ids_TLK.shape[1], num_experts), np.bool_)
        for s, batch in enumerate(batches):
            ids_BLK = ids_TLK[batch.rows_B]
            used_SLE[s, np.arange(ids_TLK.shape[1])[None, :, None], ids_BLK] = True
        return used_SLE

    def _prefill_batches(self) -> Iterator[Batch]:
        """Waves of whole prompts; in each wave a group takes prompts up to `max_num_batched_tokens` (at least one)."""
        waiting = [list(np.flatnonzero(self._group_Q == g)) for g in range(self.scenario.layout.attention.dp)]
        limit = self.scenario.workload.max_num_batched_tokens
        while any(waiting):
            chosen: list[int] = []
            for queue in waiting:
                taken = 0
                while queue and (taken == 0 or taken + self.lengths_Q[queue[0]] <= limit):
                    taken += int(self.lengths_Q[queue[0]])
                    chosen.append(int(queue.pop(0)))
            rows = [self.replay.prompt_rows(q, int(self.lengths_Q[q])) for q in chosen]
            lengths, groups = self.lengths_Q[chosen], self._group_Q[chosen]
            yield Batch("prefill", lengths, groups, np.concatenate(rows), np.repeat(groups, lengths))

    def _decode_batches(self) -> Iterator[Batch]:
        for step, rows_Q in enumerate(self._decode_SQ):
            yield Batch("decode", self.lengths_Q + step + 1, self._group_Q, rows_Q, self._group_Q)

    def __iter__(self) -> Iterator[Iteration]:
        for batch in self._prefill_batches():
            yield self._iteration(batch)
        for batch in self._decode_batches():
            yield self._iteration(batch)

    def _iteration(self, batch: Batch) -> Iteration:
        trace, counts = self.scenario.trace, None
        if self._counter is not None:
            source_B = batch.group_B.astype(np.int32)
            if self._spread:
                tp = self.scenario.layout.attention.tp
                source_B = (source_B * tp + np.arange(source_B.size) % tp).astype(np.int32)
            counts = self._counter.count(trace.expert_ids_TLK, batch.rows_B, source_B)
        if self.store is not None:
            assert counts is not None
            predicted = trace.predicted_HTLW[0][batch.rows_B, :, : trace.top_k] if trace.predicted_HTLW else None
            self.store.begin(counts.load_LRS[:, 0, :], predicted)
            return Iteration(batch.phase, self._forward.program, self._forward.price(batch, None, self.bound), counts)
        costs = self._forward.price(batch, counts, self.bound)
        return Iteration(batch.phase, self._forward.program, costs, counts)
