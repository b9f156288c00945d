"""Continuous batching: which requests of a data-parallel group go into the next iteration, and with how many tokens.

Two schedulers, each as its engine has it: vLLM's mixes prompts and decoding under one budget of tokens; SGLang's puts
prompts into iterations of their own, and first, as long as what they will need fits into the cache.

Source: vLLM's v1 scheduler (github.com/vllm-project/vllm, v1/core/sched/scheduler.py); SGLang's (github.com/
sgl-project/sglang, managers/schedule_policy.py and schedule_batch.py); chunked prefill of Sarathi-Serve, arXiv
2403.02310; iteration-level scheduling of Orca, OSDI 2022.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from moesim.serving.blocks import available, cached_units, num_blocks, publish, release, share, take
from moesim.serving.state import FINISHED, PREFILLED, RUNNING, WAITING

RATIO_FIRST, RATIO_LAST, RATIO_STEPS = 0.7, 0.098, 600.0
"""SGLang's share of an answer's rest that it keeps room for: falls so far in so many decoding iterations."""
MOST_FORESEEN = 4096
"""SGLang keeps room for at most so many tokens of an answer."""


@njit(cache=True)
def enqueue(book, groups, rules, d, q):  # type: ignore[no-untyped-def]
    """Put a request at its place in a group's queue: the last, or by priority, then by arrival."""
    book.state_Q[q] = WAITING
    groups.waiting_D[d] += 1
    before, after = groups.tail_D[d], np.int64(-1)
    if rules.by_priority:
        before, after = np.int64(-1), groups.head_D[d]
        while after >= 0 and (book.priority_Q[after], after) < (book.priority_Q[q], q):
            before, after = after, book.next_Q[after]
    _insert(book, groups, d, before, q, after)


@njit(cache=True)
def _insert(book, groups, d, before, q, after):  # type: ignore[no-untyped-def]
    book.next_Q[q] = after
    if before < 0:
        groups.head_D[d] = q
    else:
        book.next_Q[before] = q
    if after < 0:
        groups.tail_D[d] = q


@njit(cache=True)
def _return(book, groups, rules, d, q):  # type: ignore[no-untyped-def]
    """Put a request that lost its place back, in front of the others where they go by arrival."""
    if rules.by_priority:
        enqueue(book, groups, rules, d, q)
        return
    book.state_Q[q] = WAITING
    groups.waiting_D[d] += 1
    _insert(book, groups, d, np.int64(-1), q, groups.head_D[d])


@njit(cache=True)
def _dequeue(book, groups, d):  # type: ignore[no-untyped-def]
    """Take the first request out of the queue."""
    groups.head_D[d] = book.next_Q[groups.head_D[d]]
    if groups.head_D[d] < 0:
        groups.tail_D[d] = -1
    groups.waiting_D[d] -= 1


@njit(cache=True)
def _remove_running(groups, d, i):  # type: ignore[no-untyped-def]
    for j in range(i, groups.num_D[d] - 1):
        groups.running_DM[d, j] = groups.running_DM[d, j + 1]
    groups.num_D[d] -= 1


@njit(cache=True)
def _preempt(book, groups, rules, d, i):  # type: ignore[no-untyped-def]
    """Send a running request back: what it has computed is lost, or goes to host memory if there is room."""
    q = groups.running_DM[d, i]
    blocks = book.blocks_Q[q]
    book.preempted_Q[q] += 1
    if rules.is_swapping and groups.host_free_D[d] >= blocks:
        groups.host_free_D[d] -= blocks
        groups.swapped_D[d] += blocks
        groups.copy_s_D[d] += blocks * rules.block_copy_s
        book.is_swapped_Q[q] = True
    else:
        book.computed_Q[q] = 0
    release(book, groups, rules, d, q)
    _remove_running(groups, d, i)
    _return(book, groups, rules, d, q)


@njit(cache=True)
def _victim(book, groups, rules, d, first):  # type: ignore[no-untyped-def]
    """Which of the running requests from `first` on loses its place: the last one, or the least urgent."""
    last = groups.num_D[d] - 1
    if not rules.by_priority:
        return last
    found = first
    for i in range(first, last + 1):
        q, worst = groups.running_DM[d, i], groups.running_DM[d, found]
        if not groups.is_busy_Q[q] and (book.priority_Q[q], q) > (book.priority_Q[worst], worst):
            found = i
    return found


@njit(cache=True)
def _grow(book, groups, rules, d, q, tokens):  # type: ignore[no-untyped-def]
    """Take the blocks that a request needs for so many tokens; False, and none taken, where they are not to be had."""
    need = num_blocks(tokens, rules.block_size) - book.blocks_Q[q]
    if need <= 0:
        return True
    if need > available(groups, rules, d):
        return False
    take(groups, rules, d, need)
    book.blocks_Q[q] += need
    return True


@njit(cache=True)
def _add(book, groups, batch, d, q, tokens):  # type: ignore[no-untyped-def]
    size = groups.size_P[batch]
    groups.batch_PN[batch, size] = q
    groups.take_PN[batch, size] = tokens
    groups.size_P[batch] = size + 1
    groups.is_busy_Q[q] = True


@njit(cache=True)
def _wanted(book, rules, q):  # type: ignore[no-untyped-def]
    """Tokens that a running request would compute: the rest of what it has, or one and its drafts."""
    rest = book.prompt_Q[q] + book.generated_Q[q] - book.computed_Q[q]
    if rest == 1 and book.generated_Q[q] > 0:
        return min(rules.queries, book.output_Q[q] - book.generated_Q[q])
    return rest


@njit(cache=True)
def _admit(book, groups, rules, d, budget, is_whole):  # type: ignore[no-untyped-def]
    """Take the first waiting request in, if its first tokens have room; the tokens that it computes now, 0 if none.

    is_whole: whether its prompt must not be cut.
    """
    q = groups.head_D[d]
    far = cached_units(book, groups, rules, d, q) if book.computed_Q[q] == 0 else 0
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
    if need > available(groups, rules, d) - idle * rules.unit_blocks:
        return 0
    share(book, groups, rules, d, q, far)
    take(groups, rules, d, need)
    book.blocks_Q[q] += need - absent * rules.unit_blocks
    groups.copy_s_D[d] += absent * rules.unit_blocks * rules.block_copy_s
    if book.computed_Q[q] == 0:
        book.computed_Q[q] = have
        book.cached_Q[q] = max(book.cached_Q[q], have)
    if book.is_swapped_Q[q]:
        blocks = num_blocks(book.computed_Q[q], rules.block_size)
        groups.swapped_D[d] -= blocks
        groups.host_free_D[d] += blocks
        groups.copy_s_D[d] += blocks * rules.block_copy_s
        book.is_swapped_Q[q] = False
    _dequeue(book, groups, d)
    groups.running_DM[d, groups.num_D[d]] = q
    groups.num_D[d] += 1
    book.state_Q[q] = RUNNING
    return tokens


@njit(cache=True)
def _admit_waiting(book, groups, rules, d, batch, budget, now_s):  # type: ignore[no-untyped-def]
    """vLLM: waiting requests in order, as long as there is budget and room."""
    q = groups.head_D[d]
    while q >= 0 and groups.num_D[d] < rules.max_num_seqs and budget > 0:
        after = book.next_Q[q]
        tokens = _admit(book, groups, rules, d, budget, not rules.is_chunked)
        if tokens == 0:
            break
        _begin(book, q, now_s)
        _add(book, groups, batch, d, q, tokens)
        budget -= tokens
        q = after


@njit(cache=True)
def _begin(book, q, now_s):  # type: ignore[no-untyped-def]
    if not book.scheduled_s_Q[q] >= 0:
        book.scheduled_s_Q[q] = now_s


@njit(cache=True)
def schedule_vllm(book, groups, rules, d, batch, now_s):  # type: ignore[no-untyped-def]
    """Running requests first, then waiting ones, all under one budget of tokens."""
    budget, preempted, i = rules.max_num_batched_tokens, False, np.int64(0)
    most = (groups.num_D[d] + rules.num_stages - 1) // rules.num_stages
    while i < groups.num_D[d] and budget > 0 and most > 0:
        q = groups.running_DM[d, i]
        if groups.is_busy_Q[q]:
            i += 1
            continue
        tokens = _wanted(book, rules, q)
        if rules.most_of_prompt > 0:
            tokens = min(tokens, rules.most_of_prompt)
        tokens = min(tokens, budget)
        while not _grow(book, groups, rules, d, q, book.computed_Q[q] + tokens):
            victim = _victim(book, groups, rules, d, i)
            if groups.is_busy_Q[groups.running_DM[d, victim]]:
                tokens = 0
                break
            preempted = True
            is_self = victim == i
            _preempt(book, groups, rules, d, victim)
            if is_self:
                tokens = -1
                break
        if tokens < 0:
            break
        if tokens > 0:
            _add(book, groups, batch, d, q, tokens)
            budget -= tokens
            most -= 1
        i += 1
    if not preempted:
        _admit_waiting(book, groups, rules, d, batch, budget, now_s)


@njit(cache=True)
def _foreseen_blocks(book, groups, rules, d):  # type: ignore[no-untyped-def]
    """SGLang: blocks that running requests are believed to need before they are done."""
    tokens = 0.0
    for i in range(groups.num_D[d]):
        q = groups.running_DM[d, i]
        tokens += min(book.output_Q[q] - book.generated_Q[q], MOST_FORESEEN) * groups.ratio_D[d]
    return tokens / rules.block_size


@njit(cache=True)
def _schedule_prompts(book, groups, rules, d, batch, now_s):  # type: ignore[no-untyped-def]
    """SGLang: an iteration of prompts alone, the one that was cut before first."""
    budget = rules.max_num_batched_tokens
    for i in range(groups.num_D[d]):
        q = groups.running_DM[d, i]
        rest = book.prompt_Q[q] + book.generated_Q[q] - book.computed_Q[q]
        if rest > 1 and budget > 0 and not groups.is_busy_Q[q]:
            tokens = min(rest, budget)
            if not _grow(book, groups, rules, d, q, book.computed_Q[q] + tokens):
                return
            _add(book, groups, batch, d, q, tokens)
            budget -= tokens
    foreseen = _foreseen_blocks(book, groups, rules, d)
    q = groups.head_D[d]
    while q >= 0 and groups.num_D[d] < rules.max_num_seqs and budget > 0:
        after = book.next_Q[q]
        rest = min(book.output_Q[q] - book.generated_Q[q], MOST_FORESEEN)
        whole = (book.prompt_Q[q] + book.generated_Q[q] + rest) / rules.block_size
        if whole + foreseen > available(groups, rules, d) and groups.num_D[d] > 0:
            return
        tokens = _admit(book, groups, rules, d, budget, not rules.is_chunked)
        if tokens == 0:
            return
        foreseen += rest / rules.block_size
        _begin(book, q, now_s)
        _add(book, groups, batch, d, q, tokens)
        budget -= tokens
        q = after


@njit(cache=True)
def _retract(book, groups, rules, d):  # type: ignore[no-untyped-def]
    """SGLang: send back the requests that have generated least (of those, the longest prompts) until all others fit."""
    while groups.num_D[d] > 1:
        need = 0
        for i in range(groups.num_D[d]):
            q = groups.running_DM[d, i]
            tokens = book.computed_Q[q] + _wanted(book, rules, q)
            need += max(num_blocks(tokens, rules.block_size) - book.blocks_Q[q], 0)
        if need <= available(groups, rules, d):
            return
        groups.ratio_D[d] = RATIO_FIRST
        worst = np.int64(0)
        for i in range(1, groups.num_D[d]):
            q, w = groups.running_DM[d, i], groups.running_DM[d, worst]
            if (book.generated_Q[q], -book.prompt_Q[q]) < (book.generated_Q[w], -book.prompt_Q[w]):
                worst = i
        _preempt(book, groups, rules, d, worst)


@njit(cache=True)
def schedule_sglang(book, groups, rules, d, batch, now_s):  # type: ignore[no-untyped-def]
    """Prompts, if any fits; else one token (and drafts) of every running request."""
    size = groups.size_P[batch]
    _schedule_prompts(book, groups, rules, d, batch, now_s)
    if groups.size_P[batch] > size:
        return
    _retract(book, groups, rules, d)
    most = (groups.num_D[d] + rules.num_stages - 1) // rules.num_stages
    for i in range(groups.num_D[d]):
        q = groups.running_DM[d, i]
        if most > 0 and not groups.is_busy_Q[q]:
            tokens = _wanted(book, rules, q)
            if _grow(book, groups, rules, d, q, book.computed_Q[q] + tokens):
                _add(book, groups, batch, d, q, tokens)
                most -= 1
    groups.ratio_D[d] = max(groups.ratio_D[d] - (RATIO_FIRST - RATIO_LAST) / RATIO_STEPS, RATIO_LAST)


@njit(cache=True)
def _accepted(rules, q, position):  # type: ignore[no-untyped-def]
    """Drafts of a request that are right at a place of its answer: drawn by a hash, so whatever else happens."""
    bits = (q * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9) & 0x7FFFFFFFFFFFFFFF
    for k in range(rules.accept_K.size):
        bits ^= bits >> 31
        bits = (bits * 0x94D049BB133111EB + 0x632BE59BD9B4E019) & 0x7FFFFFFFFFFFFFFF
        if (bits >> 10) / (1 << 53) >= rules.accept_K[k]:
            return k
    return rules.accept_K.size


@njit(cache=True)
def finish_request(book, groups, rules, d, q, now_s):  # type: ignore[no-untyped-def]
    """A request's last token is out: its blocks are free, or (of a prompt alone) kept until they are fetched."""
    if rules.is_prefill_only and book.generated_Q[q] < book.output_Q[q]:
        book.state_Q[q] = PREFILLED
    else:
        book.state_Q[q] = FINISHED
        book.finish_s_Q[q] = now_s
        release(book, groups, rules, d, q)
    groups.done[0] += 1
    groups.done[groups.done[0]] = q


@njit(cache=True)
def settle(book, groups, rules, group_Q, batch, now_s):  # type: ignore[no-untyped-def]
    """An iteration is over: tokens are out, whole prefix blocks are shared, requests that are done leave.

    Returns the tokens that came out.
    """
    came_out = 0
    for n in range(groups.size_P[batch]):
        q, tokens = groups.batch_PN[batch, n], groups.take_PN[batch, n]
        groups.is_busy_Q[q] = False
        d, total = group_Q[q], book.prompt_Q[q] + book.generated_Q[q]
        is_decoding = book.computed_Q[q] == total - 1 and book.generated_Q[q] > 0
        gained = 0
        if is_decoding:
            gained = 1 + min(_accepted(rules, q, book.generated_Q[q]), tokens - 1) if rules.queries > 1 else 1
            book.computed_Q[q] += gained
        else:
            book.computed_Q[q] += tokens
            gained = 1 if book.computed_Q[q] == total else 0
        if rules.has_prefixes:
            publish(book, groups, rules, d, q)
        if gained == 0:
            continue
        came_out += gained
        book.generated_Q[q] += gained
        if book.first_s_Q[q] >= 0:
            gap_s = now_s - book.last_s_Q[q]
            book.worst_gap_s_Q[q] = max(book.worst_gap_s_Q[q], gap_s)
            book.itl_counts[_bin(gap_s, book.itl_counts.size)] += 1
        else:
            book.first_s_Q[q] = now_s
        book.last_s_Q[q] = now_s
        if book.generated_Q[q] >= book.output_Q[q] or rules.is_prefill_only:
            finish_request(book, groups, rules, d, q, now_s)
    groups.size_P[batch] = 0
    for d in range(groups.num_D.size):
        _keep_running(book, groups, d)
    return came_out


@njit(cache=True)
def _keep_running(book, groups, d):  # type: ignore[no-untyped-def]
    """Close the gaps that requests left."""
    kept = 0
    for i in range(groups.num_D[d]):
        q = groups.running_DM[d, i]
        if book.state_Q[q] == RUNNING:
            groups.running_DM[d, kept] = q
            kept += 1
    groups.num_D[d] = kept


@njit(cache=True)
def _bin(gap_s, num_bins):  # type: ignore[no-untyped-def]
    """Entry of the histogram with the edges `ITL_EDGES_S`: geometric from 1e-5 s, 200 a decade."""
    if gap_s < 1e-5:
        return 0
    return min(int(math.log10(gap_s * 1e5) * 200) + 1, num_bins - 1)
