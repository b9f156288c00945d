"""From a scenario to its iterations: prefill waves, then one decode iteration per output token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moesim.costs.operators import Operators
from moesim.layout import Placement
from moesim.policies.collective import ALL_TO_ALLS
from moesim.policies.executor import EXECUTORS
from moesim.policies.placement import PLACEMENTS
from moesim.program.batch import Batch, Members
from moesim.program.exchange import Exchange
from moesim.program.forward import Forward
from moesim.program.operation import Costs, Program
from moesim.program.pipeline import Pipeline
from moesim.routing.blocks import Blocks, Windows, trimmed
from moesim.routing.counting import Counter, Counts
from moesim.routing.pool import RoutingPool
from moesim.routing.replay import Replay
from moesim.scenario import Scenario

POOL_BYTES = 2**29
"""Most memory for a prefix-summed pool; a larger one is counted token by token."""
POOL_PAYS = 4
"""Counting a token into a pool takes up to so many times as long as counting it in its iteration."""


@dataclass(frozen=True, eq=False)
class Iteration:
    """One step, priced."""

    batch: Batch
    program: Program
    costs: Costs
    counts: Counts | None

    @property
    def phase(self) -> str:
        """prefill or decode."""
        return self.batch.phase


def with_shared(ids_TLK: np.ndarray, expert: int) -> np.ndarray:
    """Expert ids with one more that every token chooses."""
    dtype = ids_TLK.dtype if expert <= np.iinfo(ids_TLK.dtype).max else np.uint16
    return np.concatenate([ids_TLK.astype(dtype), np.full((*ids_TLK.shape[:2], 1), expert, dtype)], axis=2)


class Iterations:
    """The steps of one run of a scenario, in order."""

    def __init__(self, scenario: Scenario, bound: str = "value", is_played: bool = False) -> None:
        self.scenario, self.bound = scenario, bound
        model, layout, cluster = scenario.model, scenario.layout, scenario.cluster
        needs_load = bool(model.moe_layers) and scenario.needs_history
        self.replay = Replay(scenario.trace, scenario.stream("replay"), needs_load)
        workload = scenario.workload
        self.lengths_Q = self.replay.prompt_lengths(workload.num_requests, workload.prompt_tokens)
        self._group_Q = np.arange(workload.num_requests) * layout.attention.dp // workload.num_requests
        self._blocks, self._decode_SQ = self._answers()
        group_B = np.repeat(self._group_Q, 1 + workload.num_speculative_tokens)
        self._members = Members(
            np.arange(workload.num_requests), self.lengths_Q, self._group_Q, group_B, layout.attention.dp
        )
        self._spread = layout.experts.ep > 1
        self._counter: Counter | None = None
        self._pool: RoutingPool | None = None
        self._windows_of: dict[Members, Windows] = {}
        slot_params_LRS = np.zeros((0, 0, 0))
        self._ids_TLK = scenario.trace.expert_ids_TLK
        if model.moe_layers:
            num_experts, placement = model.experts.num_experts, self._placement()
            if layout.num_shared_expert_ranks:
                num_experts += 1
                self._ids_TLK = with_shared(self._ids_TLK, num_experts - 1)
            num_ranks = layout.attention.num_ranks if self._spread else layout.attention.dp * layout.attention.cp
            node_R = (np.arange(num_ranks) // cluster.devices_per_node).astype(np.int32)
            message = ALL_TO_ALLS[scenario.policies.all_to_all].message or "rank"
            message = message if self._spread else "rank"
            self._counter = Counter(placement, num_experts, num_ranks, node_R, message)
            if self._blocks is not None:
                self._pool = self._make_pool(self._blocks, placement, num_experts, num_ranks, node_R, message)
            params_E = np.array(
                [model.experts.expert_params(model.hidden_size, w) for w in model.experts.expert_widths]
            )
            if layout.num_shared_expert_ranks:
                params_E = np.append(
                    params_E, model.experts.expert_params(model.hidden_size, model.experts.shared_width)
                )
            slot_params_LP = params_E[placement.slot_expert_LP] / layout.experts.etp
            slot_params_LRS = slot_params_LP.reshape(len(model.moe_layers), layout.experts.ep, -1)
            slot_params_LRS = np.tile(slot_params_LRS, (1, num_ranks // layout.experts.ep, 1))
        policies = scenario.policies
        exchange = Exchange(
            cluster, policies.all_to_all, policies.network == "flows", is_played, scenario.faults.slowed
        )
        num_batches, slowdown_R = 2 if policies.two_batch_overlap else 1, scenario.faults.slowdown_R(cluster.num_ranks)
        stage = Forward(
            model, cluster, layout, slot_params_LRS, self.operators, exchange, num_batches,
            workload.num_speculative_tokens, slowdown_R if layout.pp == 1 else None,
        )  # fmt: skip
        self.forward: Forward | Pipeline = stage if layout.pp == 1 else Pipeline(stage, layout.pp, slowdown_R)

    def _placement(self) -> Placement:
        """Where experts lie, by their load in requests that are not replayed; the shared one's ranks come last."""
        s, ep = self.scenario, self.scenario.layout.experts.ep
        routed, shared = s.model.experts, s.layout.num_shared_expert_ranks
        load_LE = np.zeros((len(s.model.moe_layers), routed.num_experts))
        rows = self.replay.history
        for layer in range(len(load_LE) if len(rows) else 0):
            ids = s.trace.expert_ids_TLK[rows, layer].ravel()
            load_LE[layer] = np.bincount(ids, minlength=routed.num_experts)
        slots = routed.num_experts + s.layout.num_redundant_experts
        placement = s.placement or PLACEMENTS[s.policies.placement]().place(
            slots, ep - shared, s.cluster.devices_per_node, load_LE
        )
        last_LP = np.full((len(load_LE), shared), routed.num_experts, np.int32)
        return Placement(np.concatenate([placement.slot_expert_LP, last_LP], axis=1), ep)

    def _answers(self) -> tuple[Blocks | None, np.ndarray]:
        """Rows of what is decoded: in blocks where traced answers are equally long, else [S, Q]."""
        w, answers = self.scenario.workload, self.replay.answers
        num_steps = w.num_decodes * (1 + w.num_speculative_tokens)
        if w.routing_pool_tokens is not None:
            per_group = max(1, w.num_requests // self.scenario.layout.attention.dp)
            answers = trimmed(answers, w.num_requests, num_steps, w.routing_pool_tokens, per_group)
        if len({len(rows) for rows in answers}) == 1:
            blocks = Blocks(np.stack(answers, axis=1))
            self._turns = blocks.turns(w.num_requests)
            return blocks, np.zeros((0, w.num_requests), np.int64)
        return None, self.replay.decode_rows(w.num_requests, num_steps)

    def _make_pool(
        self, blocks: Blocks, placement: Placement, num_experts: int, num_ranks: int, node_R: np.ndarray, message: str
    ) -> RoutingPool | None:  # fmt: skip
        """What counts decoding by windows of blocks, where it can, fits and pays; the counts are the same."""
        s = self.scenario
        whole = next(self.decode_batches())
        batches = [whole, *self._cut(whole)]
        places_U = np.unique(np.concatenate([blocks.edges(self._windows(blocks, batch)) for batch in batches]))
        rows_T, top_k = blocks.rows_PM.ravel(), self._ids_TLK.shape[2]
        is_cut = self._ranks_per_group() > 1  # tokens of a rank do not stand side by side
        pays = POOL_PAYS * len(rows_T) <= len(whole.rows_B) * s.workload.num_decodes
        num_layers, num_slots = placement.slot_expert_LP.shape
        fits = RoutingPool.bytes_of(len(places_U), num_layers, num_slots, placement.ep) <= POOL_BYTES
        can = not is_cut and message != "node" and s.policies.network != "flows"
        if not (can and pays and fits and blocks.num_traced <= RoutingPool.most_tokens(message, top_k)):
            return None
        choice_T = np.arange(len(rows_T)) % blocks.num_traced
        return RoutingPool(
            self._ids_TLK, rows_T, choice_T, placement, num_experts, num_ranks, node_R, message, places_U
        )

    def _windows(self, blocks: Blocks, batch: Batch) -> Windows:
        if batch.members not in self._windows_of:
            self._windows_of[batch.members] = blocks.windows(batch.members.request_Q, batch.members.group_Q)
        return self._windows_of[batch.members]

    def _count_windows(self, pool: RoutingPool, blocks: Blocks, batch: Batch) -> Counts:
        windows, queries = self._windows(blocks, batch), batch.queries
        first_W = [blocks.places(windows, batch.step + query) for query in range(queries)]
        if queries == 1:
            return pool.count(windows.group_W, first_W[0], windows.requests_W)
        return pool.count(
            np.tile(windows.group_W, queries), np.concatenate(first_W), np.tile(windows.requests_W, queries)
        )

    def _ranks_per_group(self) -> int:
        """Expert ranks among which the tokens of a data-parallel group are dealt out."""
        attention = self.scenario.layout.attention
        return attention.cp * (attention.tp if self._spread else 1)

    def repeats(self) -> list[str]:
        """What the trace was too short for, and what stood for it, one sentence each."""
        w = self.scenario.workload
        found = self.replay.repeats(w.num_requests, w.prompt_tokens, w.output_tokens)
        if w.routing_pool_tokens is not None and self._blocks is not None:
            length, num_traced = self._blocks.rows_PM.shape
            found.append(f"decoding replays {length} tokens of the answers of {num_traced} requests of the trace")
        return found

    def operators(self, bound: str) -> Operators:
        """Of the machine's device, measured and calibrated as the scenario has it."""
        s = self.scenario
        attends = s.cluster.near if EXECUTORS[s.policies.executor].near_attention else None
        return Operators(s.cluster.device, bound, s.tables, s.calibration, attends)

    def prefill_batches(self) -> Iterator[Batch]:
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
            members = Members(np.array(chosen), lengths, groups, np.repeat(groups, lengths), len(waiting))
            yield Batch("prefill", members, np.concatenate(rows))

    def decode_batches(self) -> Iterator[Batch]:
        """One batch for each decode iteration."""
        queries, gained = 1 + self.scenario.workload.num_speculative_tokens, self.scenario.workload.tokens_per_decode
        for decode in range(self.scenario.workload.num_decodes):
            step, grown = decode * queries, int(decode * gained) + 1
            rows = [self._decoded_rows(step + query) for query in range(queries)]
            rows_B = rows[0] if queries == 1 else np.stack(rows, axis=1).ravel()  # those of a request side by side
            yield Batch("decode", self._members, rows_B, queries, step, grown)

    def _decoded_rows(self, step: int) -> np.ndarray:
        if self._blocks is None:
            return np.asarray(self._decode_SQ[step])
        return self._blocks.rows(self._turns, self.scenario.workload.num_requests, step)

    def __iter__(self) -> Iterator[Iteration]:
        for batch in self.prefill_batches():
            yield self._iteration(batch)
        for batch in self.decode_batches():
            yield self._iteration(batch)

    def _iteration(self, batch: Batch) -> Iteration:
        whole = self._count(batch)
        if self.scenario.is_offloaded:  # experts are priced as the step runs
            return Iteration(batch, self.forward.program, self.forward.price([(batch, None)], self.bound), whole)
        is_cut = self.scenario.policies.two_batch_overlap or self.scenario.layout.pp > 1
        parts = self.parts(batch) if is_cut else [(batch, whole)]
        return Iteration(batch, self.forward.program, self.forward.price(parts, self.bound), whole)

    def parts(self, batch: Batch) -> list[tuple[Batch, Counts | None]]:
        """The batches that overlap, or are in a pipeline, or the one that is alone, with the counts of their tokens."""
        return [(part, self._count(part)) for part in self._cut(batch)]

    def _cut(self, batch: Batch) -> list[Batch]:
        pp = self.scenario.layout.pp
        if self.scenario.policies.two_batch_overlap:
            return batch.halves()
        return [batch] if pp == 1 else batch.pieces(pp)

    def _count(self, batch: Batch) -> Counts | None:
        """Tokens of a batch over expert ranks."""
        if self._counter is None:
            return None
        choice_B = None
        if self._blocks is not None and batch.phase == "decode":
            if self._pool is not None:
                return self._count_windows(self._pool, self._blocks, batch)
            choice_B = np.repeat(batch.members.request_Q % self._blocks.num_traced, batch.queries)
        ids_TLK, source_B = self._ids_TLK, batch.members.group_B.astype(np.int32)
        dealt = self._ranks_per_group()
        source_B = (source_B * dealt + np.arange(source_B.size) % dealt).astype(np.int32)
        counts = self._counter.count(ids_TLK, batch.rows_B, source_B, choice_B)
        if self._spread and self.scenario.policies.network == "flows":
            return self._counter.with_targets(counts, ids_TLK, batch.rows_B, source_B, choice_B)
        return counts
