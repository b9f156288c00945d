"""KV blocks of a data-parallel group: taken, freed, shared by prompts that begin alike, and kept in host memory.

Prefix blocks that no request uses any more stay until their room is needed, the longest idle one goes first. A request
holds the first `held_Q` of its prefix blocks together with others, all its further blocks alone.

Source: paged attention (Kwon et al., arXiv 2309.06180); automatic prefix caching of vLLM, whose hashes of a block and
all before it make the same sharing as a radix tree cut at block ends (SGLang, arXiv 2312.07104). Where two requests
compute the same prefix block side by side, the second copy is given back when it is done; vLLM keeps it until its
request ends.
"""

from __future__ import annotations

from numba import njit


@njit(cache=True)
def num_blocks(tokens, block_size):  # type: ignore[no-untyped-def]
    """Blocks for so many tokens."""
    return (tokens + block_size - 1) // block_size


@njit(cache=True)
def _link_last(before_U, after_U, unit):  # type: ignore[no-untyped-def]
    """Put a unit at the end of a list that is closed by the last entry of its arrays."""
    end = before_U.size - 1
    last = before_U[end]
    after_U[last], before_U[unit] = unit, last
    after_U[unit], before_U[end] = end, unit


@njit(cache=True)
def _unlink(before_U, after_U, unit):  # type: ignore[no-untyped-def]
    after_U[before_U[unit]] = after_U[unit]
    before_U[after_U[unit]] = before_U[unit]


@njit(cache=True)
def available(b, d):  # type: ignore[no-untyped-def]
    """Blocks that could be taken: empty ones, and those of idle prefix blocks."""
    groups, rules = b.groups, b.rules
    return groups.free_D[d] + groups.idle_D[d] * rules.unit_blocks


@njit(cache=True)
def make_host_room(b, d, blocks):  # type: ignore[no-untyped-def]
    """Drop the prefix blocks that came to host memory first until so many blocks are free; whether they are."""
    groups, rules = b.groups, b.rules
    if groups.host_free_D[d] + groups.hosted_D[d] * rules.unit_blocks < blocks:
        return False
    while groups.host_free_D[d] < blocks:
        oldest = groups.host_after_DU[d, groups.host_after_DU.shape[1] - 1]
        _unlink(groups.host_before_DU[d], groups.host_after_DU[d], oldest)
        groups.hosted_DU[d, oldest] = -1
        groups.hosted_D[d] -= 1
        groups.host_free_D[d] += rules.unit_blocks
    return True


@njit(cache=True)
def _keep_on_host(b, d, unit):  # type: ignore[no-untyped-def]
    """Copy an evicted prefix block to host memory, as the last to come; those that came first make room for it."""
    groups, rules = b.groups, b.rules
    if rules.host_blocks == 0:
        return
    if groups.hosted_DU[d, unit] >= 0:
        _unlink(groups.host_before_DU[d], groups.host_after_DU[d], unit)
    elif make_host_room(b, d, rules.unit_blocks):
        groups.hosted_DU[d, unit] = 1
        groups.hosted_D[d] += 1
        groups.host_free_D[d] -= rules.unit_blocks
    else:
        return
    _link_last(groups.host_before_DU[d], groups.host_after_DU[d], unit)


@njit(cache=True)
def take(b, d, number):  # type: ignore[no-untyped-def]
    """Take blocks that are `available`; idle prefix blocks go, the longest idle first."""
    groups, rules = b.groups, b.rules
    groups.free_D[d] -= number
    while groups.free_D[d] < 0:
        end = groups.after_DU.shape[1] - 1
        oldest = groups.after_DU[d, end]
        _unlink(groups.before_DU[d], groups.after_DU[d], oldest)
        groups.users_DU[d, oldest] = -1
        groups.idle_D[d] -= 1
        groups.free_D[d] += rules.unit_blocks
        _keep_on_host(b, d, oldest)


@njit(cache=True)
def cached_units(b, d, q):  # type: ignore[no-untyped-def]
    """How many of the first prefix blocks of a request are there, on the device or in host memory.

    At least one token of a request is always computed.
    """
    book, groups, rules = b.book, b.groups, b.rules
    if not rules.has_prefixes:
        return 0
    first, most = book.block_start_Q[q], (book.prompt_Q[q] + book.generated_Q[q] - 1) // rules.unit_tokens
    most = min(book.block_start_Q[q + 1] - first, min(book.prompt_Q[q] // rules.unit_tokens, most))
    units = 0
    while units < most:
        unit = book.block_ids[first + units]
        if groups.users_DU[d, unit] < 0 and (rules.host_blocks == 0 or groups.hosted_DU[d, unit] < 0):
            break
        units += 1
    return units


@njit(cache=True)
def share(b, d, q, units):  # type: ignore[no-untyped-def]
    """Use so many first prefix blocks; those that are not on the device are made there (room must have been taken).

    Idle ones among them were counted as available before: take room for others only afterwards.
    """
    book, groups, rules = b.book, b.groups, b.rules
    first = book.block_start_Q[q]
    for i in range(book.held_Q[q], units):
        unit = book.block_ids[first + i]
        if groups.users_DU[d, unit] == 0:
            _unlink(groups.before_DU[d], groups.after_DU[d], unit)
            groups.idle_D[d] -= 1
        if groups.users_DU[d, unit] < 0:
            groups.users_DU[d, unit] = 0
        groups.users_DU[d, unit] += 1
    book.blocks_Q[q] += (units - book.held_Q[q]) * rules.unit_blocks
    book.held_Q[q] = units


@njit(cache=True)
def publish(b, d, q):  # type: ignore[no-untyped-def]
    """Let others share the prefix blocks of a prompt that have become whole."""
    book, groups, rules = b.book, b.groups, b.rules
    first = book.block_start_Q[q]
    whole = min(book.block_start_Q[q + 1] - first, min(book.computed_Q[q], book.prompt_Q[q]) // rules.unit_tokens)
    for i in range(book.held_Q[q], whole):
        unit = book.block_ids[first + i]
        users = groups.users_DU[d, unit]
        if users >= 0:  # computed twice
            groups.free_D[d] += rules.unit_blocks
            if users == 0:
                _unlink(groups.before_DU[d], groups.after_DU[d], unit)
                groups.idle_D[d] -= 1
        groups.users_DU[d, unit] = max(users, 0) + 1
        book.held_Q[q] += 1


@njit(cache=True)
def release(b, d, q):  # type: ignore[no-untyped-def]
    """Give all blocks of a request back; the last prefix block becomes idle first, so that it goes first."""
    book, groups, rules = b.book, b.groups, b.rules
    first = book.block_start_Q[q]
    for i in range(book.held_Q[q] - 1, -1, -1):
        unit = book.block_ids[first + i]
        groups.users_DU[d, unit] -= 1
        if groups.users_DU[d, unit] == 0:
            _link_last(groups.before_DU[d], groups.after_DU[d], unit)
            groups.idle_D[d] += 1
    groups.free_D[d] += book.blocks_Q[q] - book.held_Q[q] * rules.unit_blocks
    book.blocks_Q[q] = 0
    book.held_Q[q] = 0
