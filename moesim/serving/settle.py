"""An iteration is over: which tokens it brought, and who leaves. Compiled."""

from __future__ import annotations

import math

from numba import njit

from moesim.serving.blocks import publish, release
from moesim.serving.state import FINISHED, PREFILLED, RATIO_FIRST, RUNNING

RATIO_LAST, RATIO_STEPS = 0.098, 600.0
"""SGLang's share of an answer's rest that room is kept for falls so far, from `RATIO_FIRST`, in so many decoding
iterations."""


@njit(cache=True)
def _accepted(b, q, position):  # type: ignore[no-untyped-def]
    """Drafts of a request that are right at a place of its answer: drawn by a hash, so whatever else happens."""
    rules = b.rules
    bits = (q * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9) & 0x7FFFFFFFFFFFFFFF
    for k in range(rules.accept_K.size):
        bits ^= bits >> 31
        bits = (bits * 0x94D049BB133111EB + 0x632BE59BD9B4E019) & 0x7FFFFFFFFFFFFFFF
        if (bits >> 10) / (1 << 53) >= rules.accept_K[k]:
            return k
    return rules.accept_K.size


@njit(cache=True)
def finish_request(b, d, q, now_s):  # type: ignore[no-untyped-def]
    """A request's last token is out: its blocks are free, or (of a prompt alone) kept until they are fetched."""
    book, groups, rules = b.book, b.groups, b.rules
    if rules.is_prefill_only and book.generated_Q[q] < book.output_Q[q]:
        book.state_Q[q] = PREFILLED
    else:
        book.state_Q[q] = FINISHED
        book.finish_s_Q[q] = now_s
        release(b, d, q)
    groups.done[0] += 1
    groups.done[groups.done[0]] = q


@njit(cache=True)
def settle(b, batch, now_s):  # type: ignore[no-untyped-def]
    """Iterations (one, or several alike) are over: tokens are out, whole prefix blocks shared, who is done leaves.

    Returns the tokens that came out.
    """
    book, groups, rules, group_Q = b.book, b.groups, b.rules, b.group_Q
    came_out, times, step_s, decoded = 0, groups.times_P[batch], groups.step_s_P[batch], -1
    for n in range(groups.size_P[batch]):
        q, tokens = groups.batch_PN[batch, n], groups.take_PN[batch, n]
        groups.is_busy_Q[q] = False
        d, total = group_Q[q], book.prompt_Q[q] + book.generated_Q[q]
        is_decoding = book.computed_Q[q] == total - 1 and book.generated_Q[q] > 0
        gained = 0
        if is_decoding:
            gained = times
            if rules.queries > 1:
                gained = 1 + min(_accepted(b, q, book.generated_Q[q]), tokens - 1)
            book.computed_Q[q] += gained
            if rules.is_sglang and d != decoded:
                decoded = d
                fall = times * (RATIO_FIRST - RATIO_LAST) / RATIO_STEPS
                groups.ratio_D[d] = max(groups.ratio_D[d] - fall, RATIO_LAST)
        else:
            book.computed_Q[q] += tokens
            gained = 1 if book.computed_Q[q] == total else 0
        if rules.has_prefixes:
            publish(b, d, q)
        if gained == 0:
            continue
        came_out += gained
        book.generated_Q[q] += gained
        if book.first_s_Q[q] >= 0:
            gap_s = now_s - (times - 1) * step_s - book.last_s_Q[q]
            if times > 1:
                book.itl_counts[_bin(step_s, book.itl_counts.size)] += times - 1
            book.worst_gap_s_Q[q] = max(book.worst_gap_s_Q[q], gap_s)
            book.itl_counts[_bin(gap_s, book.itl_counts.size)] += 1
        else:
            book.first_s_Q[q] = now_s
        book.last_s_Q[q] = now_s
        if book.generated_Q[q] >= book.output_Q[q] or rules.is_prefill_only:
            finish_request(b, d, q, now_s)
    groups.size_P[batch] = 0
    for d in range(groups.num_D.size):
        _keep_running(b, d)
    return came_out


@njit(cache=True)
def _keep_running(b, d):  # type: ignore[no-untyped-def]
    """Close the gaps that requests left; where nobody is left, SGLang believes what it believed at first."""
    book, groups = b.book, b.groups
    kept = 0
    for i in range(groups.num_D[d]):
        q = groups.running_DM[d, i]
        if book.state_Q[q] == RUNNING:
            groups.running_DM[d, kept] = q
            kept += 1
    groups.num_D[d] = kept
    if kept == 0 and groups.waiting_D[d] == 0:
        groups.ratio_D[d] = RATIO_FIRST


@njit(cache=True)
def _bin(gap_s, num_bins):  # type: ignore[no-untyped-def]
    """Entry of the histogram with the edges `ITL_EDGES_S`: geometric from 1e-5 s, 200 a decade."""
    if gap_s < 1e-5:
        return 0
    return min(int(math.log10(gap_s * 1e5) * 200) + 1, num_bins - 1)
