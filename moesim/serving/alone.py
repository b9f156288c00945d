"""One instance by itself at given prices, open or in a closed loop: what real runs of one engine are compared with."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.requests import Requests
from moesim.routing.streams import Streams
from moesim.serving.advance import advance
from moesim.serving.prices import Prices
from moesim.serving.schedule import enqueue
from moesim.serving.scratch import empty_scratch
from moesim.serving.state import Book, Groups, Rules, open_book, open_groups, open_timeline
from moesim.serving.work import empty_work

Ints = NDArray[np.int64]
FOREVER = np.iinfo(np.int64).max
_WAITING_WEIGHT = 4


def distinct_prefixes(requests: Requests, block_tokens: int) -> Requests:
    """The same requests, no two of which begin alike: a prompt then finds its own blocks again after a preemption."""
    blocks_Q = requests.prompt_Q // block_tokens
    start_Q = np.concatenate([np.zeros(1, np.int64), np.cumsum(blocks_Q)])
    ids = np.arange(start_Q[-1], dtype=np.int64)
    return replace(requests, block_start_Q=start_Q, block_ids=ids, block_tokens=block_tokens)


def serve_alone(
    requests: Requests, rules: Rules, prices: Prices, num_groups: int = 1, streams: Streams | None = None
) -> Book:
    """Serve all requests, open (by their arrival) or with the concurrency that they give; times are in the book.

    A request goes to the data-parallel group with the lowest 4 x waiting + running, as vLLM's own balancer has it.

    Args:
        streams: rows of the trace that requests replay; none for dense models.
    """
    num = len(requests)
    zero_Q, one_Q = np.zeros(num, np.int64), np.ones(num, np.int64)
    routing = (zero_Q, one_Q, zero_Q, one_Q, zero_Q, zero_Q)
    if streams is not None:
        routing = (streams.prompt_row_Q, streams.prompt_len_Q, streams.answer_row_Q, streams.answer_len_Q,
                   streams.begin_prompt_Q, streams.begin_answer_Q)  # fmt: skip
    book, timeline = open_book(requests, routing), open_timeline()
    groups = open_groups(rules, num_groups, num, len(requests.block_ids))
    most = num_groups * max(rules.max_num_batched_tokens, rules.max_num_seqs * rules.queries)
    slots = prices.slots_per_rank * (len(prices.base_R) if len(prices.place_LXE) else 1)
    work = empty_work(
        num_groups, len(rules.window_V), num_groups * rules.max_num_seqs, most, len(prices.place_LXE), slots
    )
    scratch, group_Q = empty_scratch(prices, num_groups, most), np.zeros(num, np.int64)

    def run(now_s: float, until_s: float, stops: bool) -> float:
        return float(
            advance(book, groups, rules, group_Q, prices, work, scratch, timeline, now_s, until_s, FOREVER, stops)
        )

    def send(q: int, at_s: float) -> None:
        book.sent_s_Q[q] = at_s
        group_Q[q] = _group(groups)
        enqueue(book, groups, rules, group_Q[q], q)

    now_s = 0.0
    if requests.concurrency is None:
        for q, at_s in enumerate(requests.arrival_s_Q.tolist()):
            if now_s < at_s:
                ended_s = run(now_s, at_s, False)
                now_s = at_s if ended_s == math.inf else ended_s
            send(q, at_s)
        run(now_s, math.inf, False)
        return book
    sent = min(requests.concurrency, num)
    for q in range(sent):
        send(q, 0.0)
    while now_s < math.inf:
        now_s = run(now_s, math.inf, True)
        left, groups.done[0] = int(groups.done[0]), 0
        for q in range(sent, min(sent + left, num)):
            send(q, now_s + requests.think_s)
        sent = min(sent + left, num)
    return book


def _group(groups: Groups) -> int:
    return int(np.argmin(_WAITING_WEIGHT * groups.waiting_D + groups.num_D))
