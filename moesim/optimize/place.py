"""Place experts with one method, and say how good the answer is: against a bound, against others, on other requests."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from moesim.optimize.bounds import least_left, least_spread, pair_load_L
from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.methods import METHODS, Method
from moesim.optimize.problem import Floats, Ints, Problem
from moesim.optimize.prover import proved_load_L
from moesim.optimize.score import Score, fullest_SL, rank_load_SLR, scored
from moesim.optimize.search import LEVELS, Caps, most_even

BASELINES = ("contiguous", "eplb")


@dataclass(frozen=True, eq=False)
class Placed:
    """An answer.

    Attributes:
        method, seconds: what made it and how long that took.
        slot_LP: the answer.
        score, objective: its terms, and their weighted sum, on the demand it was made for.
        bounds: for each weighted term, what no placement (that keeps the balance, where traffic is weighed) is below.
        excess: by how much, as a share, it is less even than the slack allows; its bounds of traffic then do not hold.
        baselines: objectives of other methods on the same demand.
        heldout: terms on requests that it was not made for, with those of the baselines, by method.
        oracle_steps: on the held-out steps, the fullest rank over the mean with the most even placement for each step
            alone: no placement that stays does better than about that. NaN without held-out requests.
        cut_short: "time limit" or "interrupted" where the search had to stop; "" else.
    """

    problem: Problem
    method: str
    seconds: float
    slot_LP: Ints
    score: Score
    bounds: dict[str, float]
    excess: float
    baselines: dict[str, float]
    heldout: dict[str, Score]
    oracle_steps: float
    cut_short: str

    @property
    def objective(self) -> float:
        """The weighted sum of its terms."""
        return self.score.objective(self.problem.weights)

    @property
    def lower_bound(self) -> float:
        """No placement has a smaller objective."""
        return float(sum(getattr(self.problem.weights, term) * bound for term, bound in self.bounds.items()))

    @property
    def gap_fraction(self) -> float:
        """How far the objective can be from the best, as a share of the bound."""
        return self.objective / self.lower_bound - 1 if self.lower_bound > 0 else float("inf")

    def as_json(self) -> dict[str, Any]:
        """The machine-readable shape."""
        weights = self.problem.weights
        return {
            "layers": len(self.slot_LP),
            "ranks": self.problem.num_ranks,
            "slots": self.problem.num_slots,
            "method": self.method,
            "weights": {item.name: getattr(weights, item.name) for item in fields(weights)},
            "objective": self.objective,
            "lower_bound": self.lower_bound,
            "gap_fraction": self.gap_fraction if np.isfinite(self.gap_fraction) else None,
            "bounds": self.bounds,
            "terms": vars(self.score),
            "excess_fraction": self.excess,
            "seconds": self.seconds,
            "cut_short": self.cut_short,
            "baselines": self.baselines,
            "heldout": {name: score.objective(weights) for name, score in self.heldout.items()},
            "heldout_terms": {name: vars(score) for name, score in self.heldout.items()},
            "oracle_steps": self.oracle_steps if np.isfinite(self.oracle_steps) else None,
        }


def method_mistakes(name: str, method: Method, problem: Problem, demand: Demand) -> list[str]:
    """What keeps a method from answering, one sentence each."""
    found = []
    copies = problem.num_slots - problem.num_experts
    if copies and not method.takes_copies:
        found.append(
            f"placement: method {name!r} knows no copies, the ranks have {copies} slots more than there are "
            f"{problem.num_experts} experts; use {_those('takes_copies')}, or 0 redundant experts"
        )
    if not problem.is_even and not method.takes_uneven:
        found.append(f"placement: method {name!r} needs ranks that are all alike; use {_those('takes_uneven')}")
    weighs_pairs = any(getattr(problem.weights, term) for term in (*LEVELS, "spread"))
    if (method.needs_pairs or weighs_pairs) and not demand.has_pairs:
        found.append(
            f"placement: method {name!r} with these weights needs to know which experts tokens choose together; give a "
            "routing trace instead of counts"
        )
    return found


def _those(what: str) -> str:
    return ", ".join(name for name, method in METHODS.items() if getattr(method, what))


def bounds_of(problem: Problem, demand: Demand, caps: Caps, clock: Clock) -> dict[str, float]:
    """A bound for each term that has a weight."""
    weights, load_LE, found = problem.weights, demand.load_LE, {}
    mean_L = load_LE.sum(axis=1) / problem.speed_R.sum()
    used_L = mean_L > 0
    if weights.load:
        floor_L = np.ones(len(load_LE))
        tightest_L = pair_load_L(problem, load_LE[used_L], clock=clock)
        even_LP = most_even(problem, load_LE[used_L])
        tightest_L = proved_load_L(problem, load_LE[used_L], tightest_L, even_LP, clock)
        floor_L[used_L] = tightest_L / mean_L[used_L]
        found["load"] = float(floor_L.mean())
    if weights.steps:  # of loads weighed by step, the fullest rank in the mean is at most the mean of the fullest ranks
        mean_SL = demand.load_SLE.sum(axis=2) / problem.speed_R.sum()
        each_SLE = demand.load_SLE / np.maximum(mean_SL, 1e-300)[:, :, None]
        found["steps"] = float(pair_load_L(problem, each_SLE.mean(axis=0), clock=clock).mean())
    for level in LEVELS:
        if getattr(weights, level):
            found[level] = least_left(problem, demand, level, caps.share_L(problem, load_LE, level), clock).best
    if weights.spread:
        found["spread"] = least_spread(problem, demand, caps.share_L(problem, load_LE, "node"), clock).best
    return found


def oracle_steps(problem: Problem, load_SLE: Floats) -> float:
    """The fullest rank over the mean, with the most even placement for each step and layer alone, mean of these."""
    full = [
        fullest_SL(problem, rank_load_SLR(problem, most_even(problem, load_LE), load_LE[None])).mean()
        for load_LE in load_SLE
    ]
    return float(np.mean(full))


def place(
    problem: Problem, demand: Demand, heldout: Demand | None = None, *, method: str = "annealed",
    clock: Clock | None = None, bound_s: float = 20.0, baselines: tuple[str, ...] = BASELINES,
) -> Placed:  # fmt: skip
    """Place experts with a method of `METHODS`, and judge the answer.

    Args:
        heldout: requests that the placement is not made for, to judge it on.
        clock: when to stop searching; what there is by then is judged. Bounds take up to `bound_s` seconds more.

    Raises:
        ValueError: the problem is infeasible, or not one for the method: every reason, with what would do.
    """
    clock = clock or Clock()
    if method not in METHODS:
        raise ValueError(f"placement: unknown method {method!r}; one of {', '.join(METHODS)} would do")
    found = problem.mistakes()
    if demand.num_experts != problem.num_experts:
        found.append(f"placement: the trace has {demand.num_experts} experts, the problem {problem.num_experts}")
    found = found or method_mistakes(method, METHODS[method], problem, demand)
    if found:
        raise ValueError("\n".join(found))
    start = time.perf_counter()
    slot_LP = METHODS[method].place(problem, demand, clock)
    seconds, cut_short = time.perf_counter() - start, clock.why
    caps = Caps.of(problem, demand.load_LE)
    others = {
        name: METHODS[name].place(problem, demand, Clock())
        for name in baselines
        if name != method and not method_mistakes(name, METHODS[name], problem, demand)
    }
    limit = Clock(0.0 if clock.was_asked else bound_s)
    return Placed(
        problem=problem,
        method=method,
        seconds=seconds,
        slot_LP=slot_LP,
        score=scored(problem, slot_LP, demand),
        bounds=bounds_of(problem, demand, caps, limit),
        excess=caps.exceeded_by(problem, slot_LP, demand.load_LE) if problem.weights.of_traffic else 0.0,
        baselines={name: scored(problem, other, demand).objective(problem.weights) for name, other in others.items()},
        heldout={
            name: scored(problem, other, heldout) for name, other in {method: slot_LP, **others}.items()
        } if heldout is not None else {},
        oracle_steps=oracle_steps(problem, heldout.load_SLE) if heldout is not None else float("nan"),
        cut_short=cut_short,
    )  # fmt: skip
