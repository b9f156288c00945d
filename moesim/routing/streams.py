"""Streams: which rows of a trace each request of a serving run replays, as arrays for compiled code.

Without topics, request i replays request i mod N of the trace, in an order drawn once, as `moesim.routing.replay` has
it. With topics, each topic of the traffic is dealt one cluster of traced requests, and replays those alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.routing.replay import begins
from moesim.routing.topics import MOST_TOPICS, topics
from moesim.routing.trace import RoutingTrace

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Streams:
    """Rows by request, int64 [Q] each.

    The n-th prompt token of a request (from 0) replays row prompt_row + (begin_prompt + n) % prompt_len of the trace,
    the n-th token of its answer row answer_row + (begin_answer + n) % answer_len.
    """

    prompt_row_Q: Ints
    prompt_len_Q: Ints
    answer_row_Q: Ints
    answer_len_Q: Ints
    begin_prompt_Q: Ints
    begin_answer_Q: Ints

    def prompt_rows(self, request: int, num_tokens: int, first: int = 0) -> Ints:
        """Rows of the prompt tokens first, first + 1, ... of one request."""
        place = self.begin_prompt_Q[request] + first + np.arange(num_tokens)
        return np.asarray(self.prompt_row_Q[request] + place % self.prompt_len_Q[request])

    def answer_rows(self, request: int, num_tokens: int) -> Ints:
        """Rows of the first tokens of one request's answer."""
        place = self.begin_answer_Q[request] + np.arange(num_tokens)
        return np.asarray(self.answer_row_Q[request] + place % self.answer_len_Q[request])


def streams(trace: RoutingTrace, topic_Q: Ints, rng: np.random.Generator) -> Streams:
    """Deal the requests of the trace out to the requests of the traffic.

    topic_Q: of each request, -1 where it has none.
    rng: draws the order of the traced requests, and which cluster each topic is dealt (by the requests in it, so that
        many topics together route as the trace does).
    """
    first_N = np.flatnonzero(np.diff(trace.request_T, prepend=trace.request_T[0] - 1)).astype(np.int64)
    length_N = np.diff(np.append(first_N, trace.num_tokens))
    decoded_N = np.add.reduceat(trace.is_decode_T.astype(np.int64), first_N)
    order_N = rng.permutation(len(first_N))
    picked_Q, turn_Q = np.empty(len(topic_Q), np.int64), np.empty(len(topic_Q), np.int64)
    group_Q = np.full(len(topic_Q), -1, np.int64)
    cluster_N = np.zeros(len(first_N), np.int64)
    if (topic_Q >= 0).any():
        cluster_N = clusters(trace)
        share = np.bincount(cluster_N) / len(cluster_N)
        names, index_Q = np.unique(topic_Q, return_inverse=True)
        dealt = rng.choice(len(share), len(names), p=share)
        group_Q = np.where(topic_Q >= 0, dealt[index_Q], -1)
    for group in np.unique(group_Q):
        mine = np.flatnonzero(group_Q == group)
        members = order_N if group < 0 else order_N[cluster_N[order_N] == group]
        turn_Q[mine], place = np.divmod(np.arange(len(mine)), len(members))
        picked_Q[mine] = members[place]
    prompt_N = length_N - decoded_N
    has_prompt, has_answer = prompt_N > 0, decoded_N > 0
    prompt_len_N, answer_len_N = np.where(has_prompt, prompt_N, length_N), np.where(has_answer, decoded_N, length_N)
    answer_row_N = np.where(has_answer, first_N + prompt_N, first_N)
    return Streams(
        first_N[picked_Q], prompt_len_N[picked_Q], answer_row_N[picked_Q], answer_len_N[picked_Q],
        begins(turn_Q, prompt_len_N[picked_Q]), begins(turn_Q, answer_len_N[picked_Q]),
    )  # fmt: skip


def clusters(trace: RoutingTrace) -> Ints:
    """The cluster of each request of a trace, [N]: its topics, or equal parts that follow each other if it has none.

    Where a trace has more requests than are clustered, each further one is in the cluster of the last one before it.
    """
    found = topics(trace)
    names = np.unique(trace.request_T)
    if found.num_topics == 1:
        return np.arange(len(names)) * min(MOST_TOPICS, len(names)) // len(names)
    before = np.searchsorted(found.requests_N, names, side="right") - 1
    return np.asarray(found.topic_N[np.maximum(before, 0)])
