"""The most requests a second that a service takes while it keeps its promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

TOLERANCE = 0.02
STEP = 2.0


@dataclass(frozen=True)
class Tried:
    """One run of a search: requests a second, and the share of them that kept the promise."""

    rate_per_s: float
    attainment: float


@dataclass(frozen=True)
class RateSearch:
    """What a search found.

    Attributes:
        target: share of the requests that must keep the promise.
        rate_per_s: the highest rate that was seen to keep it, with none lower seen to break it; None where there is
            none.
        is_bracketed: whether a rate at most `tolerance` above was seen to break it.
        tried: every run, in order.
        says: the answer as a sentence.
        is_partial: whether it was stopped before its end.
    """

    target: float
    rate_per_s: float | None
    is_bracketed: bool
    tried: tuple[Tried, ...]
    says: str
    is_partial: bool = False


def find_rate(
    attainment_of: Callable[[float], float],
    target: float,
    start_per_s: float,
    lowest_per_s: float,
    highest_per_s: float,
    tolerance: float = TOLERANCE,
    tell: Callable[[Tried], None] = lambda tried: None,
) -> RateSearch:
    """Bracket the rate at which the attainment falls below the target, then bisect, in the logarithm of the rate.

    Right where attainment falls with the rate. Requests are the same at every rate, so it nearly does; where it does
    not, the answer is one rate that keeps the promise with one at most `tolerance` above that breaks it. The same
    callable gives the same search.

    Args:
        attainment_of: runs at a rate; share of the requests that keep the promise (NaN counts as none). A
            KeyboardInterrupt out of it ends the search with what is known.
        start_per_s: the first rate that is tried, between the lowest and the highest.
        tell: called after every run.
    """
    check_search(target, start_per_s, lowest_per_s, highest_per_s, tolerance)
    tried: list[Tried] = []

    def keeps(rate_per_s: float) -> bool:
        tried.append(Tried(rate_per_s, attainment_of(rate_per_s)))
        tell(tried[-1])
        return tried[-1].attainment >= target

    good: float | None = None
    bad: float | None = None
    is_partial = False
    try:
        rate = start_per_s
        while True:
            if keeps(rate):
                good = rate
            else:
                bad = rate
            if good is not None and bad is not None:
                if bad <= good * (1 + tolerance):
                    break
                rate = math.sqrt(good * bad)
            elif bad is None:
                if rate >= highest_per_s:
                    break
                rate = min(rate * STEP, highest_per_s)
            else:
                if rate <= lowest_per_s:
                    break
                rate = max(rate / STEP, lowest_per_s)
    except KeyboardInterrupt:
        is_partial = True
    says = _sentence(good, bad, target, tried, is_partial)
    is_bracketed = good is not None and bad is not None and bad <= good * (1 + tolerance)
    return RateSearch(target, good, is_bracketed, tuple(tried), says, is_partial)


def check_search(
    target: float, start_per_s: float, lowest_per_s: float, highest_per_s: float, tolerance: float
) -> None:
    """Refuse bounds that no search can have.

    Raises:
        ValueError: naming which.
    """
    if not 0 < target <= 1:
        raise ValueError(f"slo.attainment: must be above 0 and at most 1; given {target:g}")
    if not 0 < lowest_per_s <= start_per_s <= highest_per_s < math.inf:
        raise ValueError(
            f"search for a rate: must have 0 < lowest <= first <= highest < infinity; given {lowest_per_s:g}, "
            f"{start_per_s:g}, {highest_per_s:g} requests/s"
        )
    if not tolerance > 0:
        raise ValueError(f"search for a rate: the tolerance must be above 0; given {tolerance:g}")


def _sentence(good: float | None, bad: float | None, target: float, tried: list[Tried], is_partial: bool) -> str:
    known = {item.rate_per_s: f"{100 * item.attainment:.3g} %" for item in tried}
    must = f"{100 * target:g} % must"
    stopped = "Stopped before its end: " if is_partial else ""
    if good is not None and bad is not None:
        return (
            f"{stopped}{good:.4g} requests/s keep the promise ({known[good]} of them; {must}), "
            f"{bad:.4g} do not ({known[bad]})."
        )
    if good is not None:
        return (
            f"{stopped}No limit up to {good:.4g} requests/s: {known[good]} keep the promise ({must}). "
            "More requests, or a higher end of the search, would be needed to see one."
        )
    if bad is not None:
        return (
            f"{stopped}Even at {bad:.4g} requests/s only {known[bad]} keep the promise ({must}): "
            "waiting is not the reason, so fewer requests will not help."
        )
    return "Stopped before the first rate was tried."
