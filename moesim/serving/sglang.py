"""SGLang's scheduler: prompts go into iterations of their own, and first, as long as what they will need has room.

Source: SGLang (github.com/sgl-project/sglang), managers/schedule_policy.py, schedule_batch.py and scheduler.py; where
it finds what it holds in a radix tree, this one does in prefix blocks.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moesim.serving.blocks import available, num_blocks
from moesim.serving.schedule import add, admit, begin, grow, preempt, wanted

MOST_FORESEEN = 4096
"""Room is kept for at most so many tokens of an answer."""
RETRACT_STEPS = 20
"""After a retraction, answers are believed to grow by so many tokens beyond what they have."""


@njit(cache=True)
def _is_prompt(b, q):  # type: ignore[no-untyped-def]
    """Whether a running request still computes what it was given, or what it lost."""
    book = b.book
    return book.generated_Q[q] == 0 or book.prompt_Q[q] + book.generated_Q[q] - book.computed_Q[q] > 1


@njit(cache=True)
def _foreseen_blocks(b, d):  # type: ignore[no-untyped-def]
    """Blocks that running requests are believed to need before they are done."""
    book, groups, rules = b.book, b.groups, b.rules
    tokens = 0.0
    for i in range(groups.num_D[d]):
        q = groups.running_DM[d, i]
        tokens += min(book.output_Q[q] - book.generated_Q[q], MOST_FORESEEN) * groups.ratio_D[d]
    return tokens / rules.block_size


@njit(cache=True)
def _schedule_prompts(b, d, batch, now_s):  # type: ignore[no-untyped-def]
    """An iteration of prompts alone, the one that was cut before first; no other begins while that one lacks room."""
    book, groups, rules = b.book, b.groups, b.rules
    budget = rules.max_num_batched_tokens
    for i in range(groups.num_D[d]):
        q = groups.running_DM[d, i]
        if _is_prompt(b, q) and budget > 0 and not groups.is_busy_Q[q]:
            tokens = min(book.prompt_Q[q] + book.generated_Q[q] - book.computed_Q[q], budget)
            if not grow(b, d, q, book.computed_Q[q] + tokens):
                return
            add(b, batch, q, tokens)
            budget -= tokens
    foreseen = _foreseen_blocks(b, d)
    q = groups.head_D[d]
    while q >= 0 and groups.num_D[d] < rules.max_num_seqs and budget > 0:
        after = book.next_Q[q]
        rest = min(book.output_Q[q] - book.generated_Q[q], MOST_FORESEEN)
        whole = (book.prompt_Q[q] + book.generated_Q[q] + rest) / rules.block_size
        if whole + foreseen > available(b, d) and groups.num_D[d] > 0:
            return
        tokens = admit(b, d, budget, not rules.is_chunked)
        if tokens == 0:
            return
        foreseen += rest / rules.block_size
        begin(b, q, now_s)
        add(b, batch, q, tokens)
        budget -= tokens
        q = after


@njit(cache=True)
def _needed(b, d):  # type: ignore[no-untyped-def]
    """Blocks that the next token (and drafts) of all who decode need; where nobody does, the rest of the prompts."""
    book, groups, rules = b.book, b.groups, b.rules
    need, rest, decodes = 0, 0, 0
    for i in range(groups.num_D[d]):
        q = groups.running_DM[d, i]
        more = max(num_blocks(book.computed_Q[q] + wanted(b, q), rules.block_size) - book.blocks_Q[q], 0)
        if _is_prompt(b, q):
            rest += more
        else:
            need += more
            decodes += 1
    return need if decodes else rest


@njit(cache=True)
def _retract(b, d):  # type: ignore[no-untyped-def]
    """Send back who has generated least, of those the longest prompt, of those the last, until all others fit.

    They go behind all who wait. Requests of a batch on the way stay. Returns whether one was sent back.
    """
    book, groups = b.book, b.groups
    preempted = False
    while groups.num_D[d] > 1 and _needed(b, d) > available(b, d):
        worst = np.int64(-1)
        for i in range(groups.num_D[d]):
            q = groups.running_DM[d, i]
            if groups.is_busy_Q[q]:
                continue
            w = groups.running_DM[d, max(worst, 0)]
            if worst < 0 or (book.generated_Q[q], -book.prompt_Q[q]) <= (book.generated_Q[w], -book.prompt_Q[w]):
                worst = np.int64(i)
        if worst < 0:
            break
        preempt(b, d, worst)
        preempted = True
        generated, asked = 0, 0
        for i in range(groups.num_D[d]):
            q = groups.running_DM[d, i]
            generated += book.generated_Q[q] + RETRACT_STEPS
            asked += book.output_Q[q]
        groups.ratio_D[d] = min(generated / asked, 1.0)
    return preempted


@njit(cache=True)
def schedule_sglang(b, d, batch, now_s):  # type: ignore[no-untyped-def]
    """Prompts, if any fits; else one token (and drafts) of every running request. Whether one lost its place."""
    book, groups, rules = b.book, b.groups, b.rules
    size = groups.size_P[batch]
    _schedule_prompts(b, d, batch, now_s)
    if groups.size_P[batch] > size:
        return False
    preempted = _retract(b, d)
    most = (groups.num_D[d] + rules.num_stages - 1) // rules.num_stages
    for i in range(groups.num_D[d]):
        q = groups.running_DM[d, i]
        if most > 0 and not groups.is_busy_Q[q] and not _is_prompt(b, q):
            tokens = wanted(b, q)
            need = book.computed_Q[q] + tokens
            if need <= book.blocks_Q[q] * rules.block_size or grow(b, d, q, need):
                add(b, batch, q, tokens)
                most -= 1
    return preempted
