"""One instance with hand-made costs: an iteration takes 10 ms, and 1 ms for each token of its fullest group."""

from __future__ import annotations

import math

import numpy as np

from moesim.requests import Requests
from moesim.routing.streams import Streams
from moesim.service import EngineConfig
from moesim.serving.instance import Instance
from moesim.serving.prices import NO_EXCHANGE, NO_HEAD, NUM_OPS, Prices, no_memo
from moesim.serving.state import FINISHED, PREFILLED, RUNNING, WAITING, Rules, open_book, open_timeline

MS = 1e-3
HOST_MS, TOKEN_MS = 10.0, 1.0


def prices_of(dp=1, pp=1, host_ms=HOST_MS, token_ms=TOKEN_MS, slowdown_R=None) -> Prices:
    """A dense model of one layer for each stage; attention costs its tokens alone."""
    grid_N = np.array([0.0, 1.0, 1e6])
    token_s_ON = np.zeros((1 + NUM_OPS, 3))
    token_s_ON[0] = token_ms * MS * grid_N
    two, layers = np.arange(1.0, 3.0), np.zeros(pp, np.int64)
    return Prices(
        tp=1, mixer_L=layers, dense_L=layers - 1, moe_L=layers - 1, head_L=layers + NO_HEAD, stage_L=np.arange(pp),
        window_V=np.array([math.inf]), has_shared=False, num_drafts=0, unit_points=2, grid_N=grid_N,
        token_s_ON=token_s_ON, head_s_N=np.zeros(3), requests_A=two, context_C=two, decode_s_VAC=np.zeros((1, 2, 2)),
        chunk_X=two, before_Y=two, prefill_s_VXY=np.zeros((1, 2, 2)), host_s=host_ms * MS,
        slowdown_R=np.ones(dp) if slowdown_R is None else np.array(slowdown_R), ids_TLK=np.zeros((1, 0, 1), np.uint8),
        place_LXE=np.zeros((0, 1, 1), np.uint64), base_R=np.zeros(dp, np.int32), slots_per_rank=1,
        node_R=np.zeros(dp, np.int32), has_experts_table=False, params_LRS=np.zeros((0, dp, 1)), roofline=np.zeros(5),
        rows_I=two, active_J=two, experts_s_IJ=np.zeros((2, 2)), exchange=NO_EXCHANGE, exchange_s=np.zeros(5),
        shares_PX=np.zeros((12, 4)), memo=no_memo(),
    )  # fmt: skip


def rules_of(**changed) -> Rules:
    rules = Rules(
        max_num_seqs=16, max_num_batched_tokens=1024, is_chunked=True, most_of_prompt=0, is_sglang=False,
        by_priority=False, is_swapping=False, is_prefill_only=False, block_size=4, num_blocks=1000, has_prefixes=False,
        unit_tokens=0, unit_blocks=0, host_blocks=0, block_copy_s=0.0, queries=1, accept_K=np.zeros(0), num_stages=1,
        window_V=np.array([math.inf]), is_memoised=False, leap=1,
    )  # fmt: skip
    return rules._replace(**changed)


def requests_of(*rows, priority=None, blocks=None, block_tokens=0) -> Requests:
    """Rows of (arrival in ms, prompt, output); blocks: lists of prefix blocks."""
    at, prompt, output = np.array(rows, np.float64).T
    made = Requests.of(at * MS, prompt.astype(np.int64), output.astype(np.int64))
    fields = dict(vars(made))
    if priority is not None:
        fields["priority_Q"] = np.array(priority, np.int64)
    if blocks is not None:
        starts = np.cumsum([0, *(len(b) for b in blocks)])
        ids = np.array([i for b in blocks for i in b], np.int64)
        fields |= {"block_start_Q": starts, "block_ids": ids, "block_tokens": block_tokens}
    return Requests(**fields)


class Played:
    """An instance and its requests; `check` is called with it after every iteration that began."""

    def __init__(
        self, requests, rules=None, prices=None, dp=1, check=None, group_Q=None, open_=None, most=1, stop_ms=math.inf
    ):
        rules = rules or rules_of()
        self.requests, self.rules, self.tokens = requests, rules, []
        zero_Q, one_Q = np.zeros(len(requests), np.int64), np.ones(len(requests), np.int64)
        self.book = open_book(requests, Streams(zero_Q, one_Q, zero_Q, one_Q, zero_Q, zero_Q))
        self.timeline = open_timeline()
        engine = EngineConfig(data_parallel_size=dp, pipeline_parallel_size=rules.num_stages)
        num_units = int(requests.block_ids.max(initial=-1)) + 1
        prices = prices or prices_of(dp, rules.num_stages)
        self.instance = Instance(
            0, engine, rules, prices, self.book, np.zeros(len(requests), np.int64), self.timeline, num_units
        )
        if open_:
            open_(self.instance)
        self._check, self._most, group_Q = check, most, np.arange(len(requests)) % dp if group_Q is None else group_Q
        for q, at_s in enumerate(requests.arrival_s_Q.tolist()):
            self.until(at_s)
            self.book.sent_s_Q[q] = at_s
            self.instance.send(q, int(group_Q[q]), at_s)
        self.until(stop_ms * MS)

    def until(self, until_s):
        instance = self.instance
        while instance.clock_s < until_s:
            began = instance.num_iterations
            instance.run(until_s, most=self._most)
            if instance.num_iterations > began:
                self.tokens.append(int(instance.work.tokens_D.sum()))
            if self._check:
                self._check(self)
            if instance.next_s == math.inf:
                break

    @property
    def first_ms(self):
        return (self.book.first_s_Q / MS).round(6).tolist()

    @property
    def finish_ms(self):
        return (self.book.finish_s_Q / MS).round(6).tolist()

    @property
    def scheduled_ms(self):
        return (self.book.scheduled_s_Q / MS).round(6).tolist()


def queue_of(groups, book, d):
    found, q = [], groups.head_D[d]
    while q >= 0:
        found.append(int(q))
        q = book.next_Q[q]
    return found


def check_laws(played):
    """Blocks are conserved, and every request is in one place."""
    book, groups, rules = played.book, played.instance.groups, played.rules
    group_Q = played.instance.group_Q
    seen = []
    for d in range(len(groups.num_D)):
        running = groups.running_DM[d, : groups.num_D[d]].tolist()
        queue = queue_of(groups, book, d)
        assert len(queue) == groups.waiting_D[d]
        assert (groups.tail_D[d], groups.head_D[d]) == ((queue[-1], queue[0]) if queue else (-1, -1))
        assert (book.state_Q[running] == RUNNING).all() and (book.state_Q[queue] == WAITING).all()
        assert len(running) <= rules.max_num_seqs
        seen += running + queue
        here = [q for q in range(len(group_Q)) if group_Q[q] == d]
        kept = [q for q in here if book.state_Q[q] in (RUNNING, PREFILLED)]
        gone = [q for q in here if q not in kept]
        assert not book.blocks_Q[gone].any() and not book.held_Q[gone].any()
        users = np.zeros(groups.users_DU.shape[1], np.int64)
        for q in kept:
            first = book.block_start_Q[q]
            np.add.at(users, book.block_ids[first : first + book.held_Q[q]], 1)
        np.testing.assert_array_equal(np.maximum(groups.users_DU[d], 0), users)
        assert groups.idle_D[d] == (groups.users_DU[d] == 0).sum()
        held = (users > 0).sum() * rules.unit_blocks + (book.blocks_Q - book.held_Q * rules.unit_blocks)[kept].sum()
        assert groups.free_D[d] >= 0 and groups.idle_D[d] >= 0
        assert groups.free_D[d] + groups.idle_D[d] * rules.unit_blocks + held == rules.num_blocks
        assert (book.blocks_Q[running] * rules.block_size >= book.computed_Q[running]).all()
        hosted = (groups.hosted_DU[d] >= 0).sum() * rules.unit_blocks if rules.host_blocks else 0
        assert groups.host_free_D[d] >= 0
        assert groups.host_free_D[d] + hosted + groups.swapped_D[d] == rules.host_blocks
    assert len(seen) == len(set(seen))


def check_end(played):
    """All are answered; every block is free or idle."""
    book, groups, requests, rules = played.book, played.instance.groups, played.requests, played.rules
    assert (book.state_Q == FINISHED).all()
    np.testing.assert_array_equal(book.generated_Q, requests.output_Q)
    assert (groups.free_D + groups.idle_D * rules.unit_blocks == rules.num_blocks).all()
    assert not groups.swapped_D.any() and not groups.is_busy_Q.any()
    assert sorted(groups.done[1 : 1 + groups.done[0]]) == list(range(len(requests)))
    assert (requests.arrival_s_Q <= book.scheduled_s_Q).all() and (book.scheduled_s_Q < book.first_s_Q).all()
    assert (book.first_s_Q <= book.finish_s_Q).all() and (book.last_s_Q == book.finish_s_Q).all()
