"""Bit planes: in which order do pieces of quantized experts travel? Decision: (expert, plane) pairs, the first first.

An expert of b bits is nested: plane 0 holds its narrowest version, and each further plane one bit more, so that a wider
version costs only the planes that are missing. A token wants its expert at some width; it can be computed when all
planes up to that one are there. Planes of an expert travel in ascending order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Order = list[tuple[int, int]]


class PlaneOrder(Protocol):
    """A policy of this kind has no state."""

    def order(self, tokens_EB: Ints) -> Order:
        """Of all planes that are wanted; tokens_EB: tokens that want each expert at each width, narrowest first."""


def wanted_EB(tokens_EB: Ints) -> Ints:
    """Tokens that need each plane: those of its width and of wider ones."""
    return np.asarray(tokens_EB[:, ::-1].cumsum(axis=1)[:, ::-1])


@dataclass(frozen=True)
class ByExpert:
    """Experts in the order of their ids, each with all its planes. Source: on demand, as D2MoE compares with."""

    def order(self, tokens_EB: Ints) -> Order:
        """Expert by expert."""
        return [(int(e), int(b)) for e, b in np.argwhere(wanted_EB(tokens_EB) > 0)]


@dataclass(frozen=True)
class HottestExpertBitFirst:
    """Of the planes that come next for each expert, the one that most tokens need.

    Source: D2MoE (arXiv 2504.15299), hottest-expert-bit-first.
    """

    def order(self, tokens_EB: Ints) -> Order:
        """The lower expert of two that are alike."""
        wanted = wanted_EB(tokens_EB)
        head_E, found = np.zeros(len(wanted), np.int64), []
        for _ in range(int((wanted > 0).sum())):
            inside_E = head_E < wanted.shape[1]
            heat_E = np.where(inside_E, wanted[np.arange(len(wanted)), np.minimum(head_E, wanted.shape[1] - 1)], -1)
            expert = int(heat_E.argmax())
            found.append((expert, int(head_E[expert])))
            head_E[expert] += 1
        return found


def makespan_s(order: Order, tokens_EB: Ints, plane_s_B: NDArray[np.float64], token_s: float) -> float:
    """Seconds until all tokens are computed: planes travel one at a time, and widths of experts are computed one at a
    time, in the order in which their last planes arrive.

    Args:
        plane_s_B: seconds of each plane on the link. token_s: of one token on the unit that computes.

    Raises:
        ValueError: a plane travels before a narrower one of its expert, or twice, or one that is needed never does.
    """
    wanted, seen_E = wanted_EB(tokens_EB), np.zeros(len(tokens_EB), np.int64)
    link_s = unit_s = 0.0
    for expert, plane in order:
        if plane != seen_E[expert]:
            raise ValueError(f"plane {plane} of expert {expert} travels when plane {seen_E[expert]} is next")
        seen_E[expert] += 1
        link_s += float(plane_s_B[plane])
        tokens = int(tokens_EB[expert, plane])
        if tokens:
            unit_s = max(unit_s, link_s) + tokens * token_s
    if (seen_E != (wanted > 0).sum(axis=1)).any():
        raise ValueError("some planes that are needed do not travel, or some that are not needed do")
    return max(link_s, unit_s)


PLANE_ORDERS: Mapping[str, type[Any]] = {"by_expert": ByExpert, "hottest_first": HottestExpertBitFirst}
