"""The state of requests and instances as arrays that compiled code reads and writes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.requests import Requests
from moesim.routing.streams import Streams
from moesim.serving.outcome import ITL_EDGES_S

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

WAITING, RUNNING, FINISHED, DROPPED, PREFILLED, UNSENT = range(6)
"""States of a request: in a queue; in iterations; answered; refused; its prompt is done and its cache is on its way to
another instance; not sent yet."""
RATIO_FIRST = 0.7
"""The share of an answer's rest that SGLang keeps room for at first."""
WINDOWS = 1024
SAMPLES = ("running", "waiting", "kv_tokens", "output_tokens", "imbalance", "iterations", "iteration_s")


class Book(NamedTuple):
    """Everything about the requests of a run; one for all instances.

    Attributes:
        prompt_Q, output_Q, priority_Q, block_start_Q, block_ids: as in `Requests`; priority is followed by arrival.
        prompt_row_Q, prompt_len_Q, answer_row_Q, answer_len_Q, begin_prompt_Q, begin_answer_Q: routing, as in
            `moesim.routing.streams.Streams`.
        sent_s_Q: when its client sent it.
        state_Q, next_Q: one of the states above; the one behind it in its queue, -1 for none.
        computed_Q, generated_Q: tokens with keys and values on the device; tokens that came out.
        blocks_Q, held_Q: KV blocks, of which so many are those of its first `held_Q` prefix blocks.
        is_swapped_Q: whether its cache waits in host memory.
        scheduled_s_Q, first_s_Q, last_s_Q, finish_s_Q: NaN before.
        cached_Q, preempted_Q, worst_gap_s_Q: as in `Outcome`.
        itl_counts: see `Outcome`.
    """

    prompt_Q: Ints
    output_Q: Ints
    priority_Q: Ints
    block_start_Q: Ints
    block_ids: Ints
    prompt_row_Q: Ints
    prompt_len_Q: Ints
    answer_row_Q: Ints
    answer_len_Q: Ints
    begin_prompt_Q: Ints
    begin_answer_Q: Ints
    sent_s_Q: Floats
    state_Q: NDArray[np.int8]
    next_Q: Ints
    computed_Q: Ints
    generated_Q: Ints
    blocks_Q: Ints
    held_Q: Ints
    is_swapped_Q: NDArray[np.bool_]
    scheduled_s_Q: Floats
    first_s_Q: Floats
    last_s_Q: Floats
    finish_s_Q: Floats
    cached_Q: Ints
    preempted_Q: Ints
    worst_gap_s_Q: Floats
    itl_counts: Ints


def open_book(requests: Requests, routing: Streams) -> Book:
    """Requests before any was sent."""
    num = len(requests)

    def ints() -> Ints:
        return np.zeros(num, np.int64)

    def never() -> Floats:
        return np.full(num, np.nan)

    return Book(
        requests.prompt_Q, requests.output_Q, requests.priority_Q, requests.block_start_Q, requests.block_ids,
        routing.prompt_row_Q, routing.prompt_len_Q, routing.answer_row_Q, routing.answer_len_Q, routing.begin_prompt_Q,
        routing.begin_answer_Q, never(), np.full(num, UNSENT, np.int8), np.full(num, -1, np.int64), ints(), ints(),
        ints(), ints(), np.zeros(num, np.bool_), never(), never(), never(), never(), ints(), ints(), np.zeros(num),
        np.zeros(len(ITL_EDGES_S) - 1, np.int64),
    )  # fmt: skip


class Rules(NamedTuple):
    """Numbers of one engine; see `EngineConfig` for those that it names.

    Attributes:
        is_prefill_only: whether requests leave with their first token.
        queries: tokens that a decoding request computes at once: 1 and the drafts.
        accept_K: chance that the k-th draft is right, given those before it.
        num_blocks, unit_tokens, unit_blocks: KV blocks of a group; tokens and blocks of a prefix block (0: none known).
        host_blocks, block_copy_s: of a group, blocks in host memory, and seconds to copy one.
        num_stages: pipeline stages, as many batches are on the way at once.
        window_V: of each kind of layer, the most tokens that attention looks back on.
        is_memoised: whether rows of the trace are not needed.
        leap: iterations that may be played as one, see `moesim.serving.leap`.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    is_chunked: bool
    most_of_prompt: int
    is_sglang: bool
    by_priority: bool
    is_swapping: bool
    is_prefill_only: bool
    block_size: int
    num_blocks: int
    has_prefixes: bool
    unit_tokens: int
    unit_blocks: int
    host_blocks: int
    block_copy_s: float
    queries: int
    accept_K: Floats
    num_stages: int
    window_V: Floats
    is_memoised: bool
    leap: int


class Groups(NamedTuple):
    """The D data-parallel groups of one instance.

    Attributes:
        head_D, tail_D, waiting_D: the queue, as a list through `Book.next_Q`, and its length.
        running_DM, num_D: requests in the order they were taken in.
        free_D, idle_D: blocks that nothing is in; prefix blocks that nobody uses but that are kept.
        users_DU, before_DU, after_DU: of each prefix block, requests that use it (-1: not here), and neighbours in the
            list of idle ones, the longest idle one first, closed by the entry U.
        hosted_DU, host_before_DU, host_after_DU, host_free_D, hosted_D: the same for host memory (1: there), and how
            many are there.
        swapped_D: blocks of swapped requests.
        copy_s_D: seconds of copies that the next iteration waits for.
        ratio_D: SGLang's belief of how much of what is left of the answers will be generated.
        batch_PN, take_PN, size_P, finish_s_P, stage_free_S: batches on the way (as many as stages): requests, tokens of
            each, how many requests, when it is done; when each stage is free.
        times_P, step_s_P: iterations that such a batch stands for, and seconds of each (of its first stage).
        is_busy_Q: of requests, whether one is in such a batch.
        done: [how many, then the numbers of] requests that left since they were last asked for.
    """

    head_D: Ints
    tail_D: Ints
    waiting_D: Ints
    running_DM: Ints
    num_D: Ints
    free_D: Ints
    idle_D: Ints
    users_DU: NDArray[np.int32]
    before_DU: NDArray[np.int32]
    after_DU: NDArray[np.int32]
    hosted_DU: NDArray[np.int32]
    host_before_DU: NDArray[np.int32]
    host_after_DU: NDArray[np.int32]
    host_free_D: Ints
    hosted_D: Ints
    swapped_D: Ints
    copy_s_D: Floats
    ratio_D: Floats
    batch_PN: Ints
    take_PN: Ints
    size_P: Ints
    finish_s_P: Floats
    stage_free_S: Floats
    times_P: Ints
    step_s_P: Floats
    is_busy_Q: NDArray[np.bool_]
    done: Ints


def open_groups(rules: Rules, num_groups: int, num_requests: int, num_units: int) -> Groups:
    """An instance that nobody has sent anything to."""
    units = num_units if rules.has_prefixes else 0

    def ints() -> Ints:
        return np.zeros(num_groups, np.int64)

    def chains() -> NDArray[np.int32]:
        return np.full((num_groups, units + 1), units, np.int32)

    absent = np.full((num_groups, units), -1, np.int32)
    hosted = absent.copy() if rules.host_blocks else absent[:, :0]
    most, stages = num_groups * rules.max_num_seqs, rules.num_stages
    return Groups(
        ints() - 1, ints() - 1, ints(), np.zeros((num_groups, rules.max_num_seqs), np.int64), ints(),
        ints() + rules.num_blocks, ints(), absent, chains(), chains(), hosted,
        chains() if rules.host_blocks else chains()[:, :1] * 0, chains() if rules.host_blocks else chains()[:, :1] * 0,
        ints() + rules.host_blocks, ints(), ints(), np.zeros(num_groups), np.full(num_groups, RATIO_FIRST),
        np.zeros((stages, most), np.int64), np.zeros((stages, most), np.int64), np.zeros(stages, np.int64),
        np.full(stages, np.inf), np.zeros(stages), np.ones(stages, np.int64), np.zeros(stages),
        np.zeros(num_requests, np.bool_), np.zeros(num_requests + 1, np.int64),
    )  # fmt: skip


class Timeline(NamedTuple):
    """Sums over windows of time; windows are doubled in length, and joined in pairs, when the run outgrows them.

    Attributes:
        width_s: [length of a window].
        sums_WX: of `SAMPLES`: integrals over time of the first three, sums of the others.
    """

    width_s: Floats
    sums_WX: Floats


def open_timeline() -> Timeline:
    """Before the run; the first windows are 1 ms long."""
    return Timeline(np.array([1e-3]), np.zeros((WINDOWS, len(SAMPLES))))
