"""Bit planes: legal orders, and what the hottest-first order brings."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moesim.policies.planes import PLANE_ORDERS, makespan_s, wanted_EB

PLANES = np.array([2.0, 1.0, 1.0])
batches = arrays.arrays(np.int64, st.tuples(st.integers(1, 4), st.just(3)), elements=st.integers(0, 5))


@settings(max_examples=60, deadline=None)
@given(batches, st.sampled_from(sorted(PLANE_ORDERS)))
def test_every_plane_that_is_needed_travels_once_and_in_order(tokens_EB, name):
    order = PLANE_ORDERS[name]().order(tokens_EB)
    assert sorted(order) == [(int(e), int(b)) for e, b in np.argwhere(wanted_EB(tokens_EB) > 0)]
    seconds = makespan_s(order, tokens_EB, PLANES, 0.3)
    link_s = sum(PLANES[b] for _, b in order)
    assert max(link_s, 0.3 * tokens_EB.sum()) - 1e-9 <= seconds <= link_s + 0.3 * tokens_EB.sum() + 1e-9


@settings(max_examples=25, deadline=None)
@given(arrays.arrays(np.int64, (2, 3), elements=st.integers(0, 4)), st.sampled_from(sorted(PLANE_ORDERS)))
def test_the_best_of_all_orders_is_never_beaten(tokens_EB, name):
    planes = PLANE_ORDERS["by_expert"]().order(tokens_EB)
    legal = [
        list(order)
        for order in permutations(planes)
        if all(list(order).index(p) < list(order).index(q) for p in planes for q in planes if p[0] == q[0] and p < q)
    ]
    best = min((makespan_s(order, tokens_EB, PLANES, 0.7) for order in legal), default=0.0)
    assert makespan_s(PLANE_ORDERS[name]().order(tokens_EB), tokens_EB, PLANES, 0.7) >= best - 1e-9


def test_by_hand_the_busy_plane_goes_first():
    """Expert 1 has nine tokens at its narrowest, expert 0 one: its plane first, and the rest hides under it."""
    tokens_EB = np.array([[1, 0, 0], [9, 0, 0]])
    first, other = (PLANE_ORDERS[name]().order(tokens_EB) for name in ("hottest_first", "by_expert"))
    assert (first, other) == ([(1, 0), (0, 0)], [(0, 0), (1, 0)])
    assert makespan_s(first, tokens_EB, PLANES, 1.0) == 2 + 9 + 1
    assert makespan_s(other, tokens_EB, PLANES, 1.0) == 4 + 9


@pytest.mark.parametrize(("order", "says"), [([(0, 1), (0, 0)], "plane 1 of expert 0"), ([(0, 0)], "do not travel")])
def test_illegal_orders_are_refused(order, says):
    with pytest.raises(ValueError, match=says):
        makespan_s(order, np.array([[0, 1, 0]]), PLANES, 1.0)
