"""Continuous batching: which requests of a data-parallel group go into the next iteration, and with how many tokens.

Here is what schedulers share, and vLLM's, which mixes prompts and decoding under one budget of tokens; SGLang's is
`moesim.serving.sglang`. Compiled.

Source: vLLM's v1 scheduler (github.com/vllm-project/vllm, v1/core/sched/scheduler.py); chunked prefill of
Sarathi-Serve, arXiv 2403.02310; iteration-level scheduling of Orca, OSDI 2022.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moesim.serving.blocks import available, cached_units, make_host_room, num_blocks, release, share, take
from moesim.serving.state import RUNNING, WAITING


@njit(cache=True)
def enqueue(b, d, q):  # type: ignore[no-untyped-def]
    """Put a request at its place in a group's queue: the last, or by priority, then by arrival."""
    book, groups, rules = b.book, b.groups, b.rules
    book.state_Q[q] = WAITING
    groups.waiting_D[d] += 1
    before, after = groups.tail_D[d], np.int64(-1)
    if rules.by_priority:
        before, after = np.int64(-1), groups.head_D[d]
        while after >= 0 and (book.priority_Q[after], after) < (book.priority_Q[q], q):
            before, after = after, book.next_Q[after]
    _insert(b, d, before, q, after)


@njit(cache=True)
def _insert(b, d, before, q, after):  # type: ignore[no-untyped-def]
    book, groups = b.book, b.groups
    book.next_Q[q] = after
    if before < 0:
        groups.head_D[d] = q
    else:
        book.next_Q[before] = q
    if after < 0:
        groups.tail_D[d] = q


@njit(cache=True)
def _return(b, d, q):  # type: ignore[no-untyped-def]
    """Put a request that lost its place back: by priority, where SGLang has it behind the others, else in front."""
    book, groups, rules = b.book, b.groups, b.rules
    if rules.by_priority or rules.is_sglang:
        enqueue(b, d, q)
        return
    book.state_Q[q] = WAITING
    groups.waiting_D[d] += 1
    _insert(b, d, np.int64(-1), q, groups.head_D[d])


@njit(cache=True)
def _dequeue(b, d):  # type: ignore[no-untyped-def]
    """Take the first request out of the queue."""
    book, groups = b.book, b.groups
    groups.head_D[d] = book.next_Q[groups.head_D[d]]
    if groups.head_D[d] < 0:
        groups.tail_D[d] = -1
    groups.waiting_D[d] -= 1


@njit(cache=True)
def _remove_running(b, d, i):  # type: ignore[no-untyped-def]
    groups = b.groups
    for j in range(i, groups.num_D[d] - 1):
        groups.running_DM[d, j] = groups.running_DM[d, j + 1]
    groups.num_D[d] -= 1


@njit(cache=True)
def preempt(b, d, i):  # type: ignore[no-untyped-def]
    """Send a running request back: what it has computed is lost, or goes to host memory if there is room."""
    book, groups, rules = b.book, b.groups, b.rules
    q = groups.running_DM[d, i]
    blocks = num_blocks(book.computed_Q[q], rules.block_size)
    book.preempted_Q[q] += 1
    if rules.is_swapping and make_host_room(b, d, blocks):
        groups.host_free_D[d] -= blocks
        groups.swapped_D[d] += blocks
        groups.copy_s_D[d] += blocks * rules.block_copy_s
        book.is_swapped_Q[q] = True
    else:
        book.computed_Q[q] = 0
    release(b, d, q)
    _remove_running(b, d, i)
    _return(b, d, q)


@njit(cache=True)
def _victim(b, d):  # type: ignore[no-untyped-def]
    """Which of the running requests loses its place: the last one, or the least urgent."""
    book, groups, rules = b.book, b.groups, b.rules
    found = groups.num_D[d] - 1
    if rules.by_priority:
        for i in range(groups.num_D[d]):
            q, worst = groups.running_DM[d, i], groups.running_DM[d, found]
            if (book.priority_Q[q], q) > (book.priority_Q[worst], worst):
                found = i
    return found


@njit(cache=True)
def grow(b, d, q, tokens):  # type: ignore[no-untyped-def]
    """Take the blocks that a request needs for so many tokens; False, and none taken, where they are not to be had."""
    book, rules = b.book, b.rules
    need = num_blocks(tokens, rules.block_size) - book.blocks_Q[q]
    if need <= 0:
        return True
    if need > available(b, d):
        return False
    take(b, d, need)
    book.blocks_Q[q] += need
    return True


@njit(cache=True)
def add(b, batch, q, tokens):  # type: ignore[no-untyped-def]
    """Put a request into a batch."""
    groups = b.groups
    size = groups.size_P[batch]
    groups.batch_PN[batch, size] = q
    groups.take_PN[batch, size] = tokens
    groups.size_P[batch] = size + 1
    groups.is_busy_Q[q] = True


@njit(cache=True)
def wanted(b, q):  # type: ignore[no-untyped-def]
    """Tokens that a running request would compute: the rest of what it has, or one and its drafts."""
    book, rules = b.book, b.rules
    rest = book.prompt_Q[q] + book.generated_Q[q] - book.computed_Q[q]
    if rest == 1 and book.generated_Q[q] > 0:
        return min(rules.queries, book.output_Q[q] - book.generated_Q[q])
    return rest


@njit(cache=True)
def admit(b, d, budget, is_whole):  # type: ignore[no-untyped-def]
    """Take the first waiting request in, if its first tokens have room; the tokens that it computes now, 0 if none.

    is_whole: whether its prompt must not be cut.
    """
    book, groups, rules = b.book, b.groups, b.rules
    q = groups.head_D[d]
    far = cached_units(b, d, q) if book.computed_Q[q] == 0 else 0
    have = max(book.computed_Q[q], far * rules.unit_tokens)
    tokens = book.prompt_Q[q] + book.generated_Q[q] - have
    if rules.most_of_prompt > 0 and not is_whole:
        tokens = min(tokens, rules.most_of_prompt)
    if tokens > budget:
        if is_whole:
            return 0
        tokens = budget
    idle, absent, first = 0, 0, book.block_start_Q[q]
    for i in range(far):
        users = groups.users_DU[d, book.block_ids[first + i]]
        idle += users == 0
        absent += users < 0
    need = num_blocks(have + tokens, rules.block_size) - far * rules.unit_blocks + absent * rules.unit_blocks
    if need > available(b, d) - idle * rules.unit_blocks:
        return 0
    share(b, d, q, far)
    take(b, d, need)
    book.blocks_Q[q] += need - absent * rules.unit_blocks
    groups.copy_s_D[d] += absent * rules.unit_blocks * rules.block_copy_s
    if book.computed_Q[q] == 0:
        book.computed_Q[q] = have
        if not book.scheduled_s_Q[q] >= 0:
            book.cached_Q[q] = have
    if book.is_swapped_Q[q]:
        blocks = num_blocks(book.computed_Q[q], rules.block_size)
        groups.swapped_D[d] -= blocks
        groups.host_free_D[d] += blocks
        groups.copy_s_D[d] += blocks * rules.block_copy_s
        book.is_swapped_Q[q] = False
    _dequeue(b, d)
    groups.running_DM[d, groups.num_D[d]] = q
    groups.num_D[d] += 1
    book.state_Q[q] = RUNNING
    return tokens


@njit(cache=True)
def _admit_waiting(b, d, batch, budget, now_s):  # type: ignore[no-untyped-def]
    """vLLM: waiting requests in order, as long as there is budget and room."""
    book, groups, rules = b.book, b.groups, b.rules
    q = groups.head_D[d]
    while q >= 0 and groups.num_D[d] < rules.max_num_seqs and budget > 0:
        after = book.next_Q[q]
        tokens = admit(b, d, budget, not rules.is_chunked)
        if tokens == 0:
            break
        begin(b, q, now_s)
        add(b, batch, q, tokens)
        budget -= tokens
        q = after


@njit(cache=True)
def begin(b, q, now_s):  # type: ignore[no-untyped-def]
    """Note when a request is first taken in."""
    book = b.book
    if not book.scheduled_s_Q[q] >= 0:
        book.scheduled_s_Q[q] = now_s


@njit(cache=True)
def _withdraw(b, batch, q):  # type: ignore[no-untyped-def]
    """Take a request out of the batch that is being made; its tokens, 0 if it is not in it."""
    groups = b.groups
    size, found = groups.size_P[batch], 0
    for n in range(size):
        if found:
            groups.batch_PN[batch, n - 1] = groups.batch_PN[batch, n]
            groups.take_PN[batch, n - 1] = groups.take_PN[batch, n]
        elif groups.batch_PN[batch, n] == q:
            found = groups.take_PN[batch, n]
    if found:
        groups.size_P[batch] = size - 1
        groups.is_busy_Q[q] = False
    return found


@njit(cache=True)
def schedule_vllm(b, d, batch, now_s):  # type: ignore[no-untyped-def]
    """Running requests first, then waiting ones, all under one budget of tokens; whether one lost its place.

    Where a running request finds no room, and nobody can be sent back for it (all are on their way), none is taken in.
    """
    book, groups, rules = b.book, b.groups, b.rules
    budget, preempted, is_full, i = rules.max_num_batched_tokens, False, False, np.int64(0)
    most = (groups.num_D[d] + rules.num_stages - 1) // rules.num_stages
    while i < groups.num_D[d] and budget > 0 and most > 0:
        q = groups.running_DM[d, i]
        if groups.is_busy_Q[q]:
            i += 1
            continue
        tokens = wanted(b, q)
        if rules.most_of_prompt > 0:
            tokens = min(tokens, rules.most_of_prompt)
        tokens = min(tokens, budget)
        need = book.computed_Q[q] + tokens  # mostly there: a call would copy 50 arrays
        while need > book.blocks_Q[q] * rules.block_size and not grow(b, d, q, need):
            victim = _victim(b, d)
            loser = groups.running_DM[d, victim]
            withdrawn = _withdraw(b, batch, loser)
            if groups.is_busy_Q[loser]:
                is_full, tokens = True, 0
                break
            budget += withdrawn
            most += withdrawn > 0
            i -= victim < i
            preempt(b, d, victim)
            preempted = True
            if loser == q:
                return True
        if tokens > 0:
            add(b, batch, q, tokens)
            budget -= tokens
            most -= 1
        i += 1
    if not preempted and not is_full:
        _admit_waiting(b, d, batch, budget, now_s)
    return preempted
