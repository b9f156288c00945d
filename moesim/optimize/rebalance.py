"""When to place experts anew as traffic drifts: what is won until the next look, against the time of moving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from moesim.costs.migration import moving
from moesim.hardware import Cluster
from moesim.model import ModelSpec
from moesim.network.routes import Fabric
from moesim.optimize.clock import Clock
from moesim.optimize.demand import Demand
from moesim.optimize.methods import METHODS
from moesim.optimize.price import Price
from moesim.optimize.problem import Floats, Ints, Problem, Weights
from moesim.optimize.score import fullest_SL, rank_load_SLR
from moesim.optimize.search import most_even
from moesim.routing.trace import RoutingTrace


@dataclass(frozen=True)
class Plan:
    """When experts are placed anew, and how.

    methods: of `METHODS`; the answer that wins most is taken. None: the first placement stays.
    every_s, window_s: so often it is looked, at the load of so long.
    worth: experts move only if that wins, until the next look, more than so many times the time that moving takes; 0
        moves them always.
    matched: ranks of a new placement change their numbers so that more experts stay where they are.
    """

    name: str
    methods: tuple[str, ...] = ()
    every_s: float = 600.0
    window_s: float = 600.0
    worth: float = 0.0
    matched: bool = False


PLANS = (
    Plan("never"),
    Plan("EPLB", ("eplb",)),
    Plan("Hecate", ("hecate",)),
    Plan("ours", ("repaired", "swaps"), every_s=60.0, window_s=60.0, worth=1.0, matched=True),
)
"""What is compared unless something else is asked for: EPLB as DeepSeek runs it, every 10 minutes by the load of these
(DeepSeek-V3, arXiv 2412.19437, section 3.4.1); Hecate's placement at the same times; ours."""


WARM_S = 600.0
"""Seconds of traffic that the first placement is made by, before any plan is followed."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a plan led to.

    iteration_s: mean, the time of moving shared out among iterations; stalled: share of all time that experts moved.
    fullest_K: the fullest rank over the mean, in each tick; moved_at_s: when experts moved.
    moved: experts that travelled to a rank, of all layers.
    """

    plan: Plan
    iteration_s: float
    stalled: float
    fullest_K: Floats
    moved_at_s: list[float] = field(default_factory=list)
    moved: int = 0

    def as_json(self) -> dict[str, Any]:
        """The machine-readable shape."""
        return {
            **asdict(self.plan),
            "iteration_s": self.iteration_s,
            "fullest_max_to_mean_ratio": float(self.fullest_K.mean()),
            "stalled_fraction": self.stalled,
            "moved_at_s": self.moved_at_s,
            "num_experts_moved": self.moved,
        }


def drifting(
    trace: RoutingTrace, tokens: int, *, ticks: int, around: float, width: float = 0.1, seed: int = 0
) -> Floats:
    """Loads of iterations whose requests drift through the trace: float64 [K, L, E].

    The trace's requests lie on a circle in their order, which traffic goes `around` so many times; a token of a tick is
    of a request that is normally distributed, `width` of the circle, about where traffic is.
    """
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(trace.is_decode_T) if trace.is_decode_T.any() else np.arange(trace.num_tokens)
    _, first, count = np.unique(trace.request_T[rows], return_index=True, return_counts=True)
    found = np.zeros((ticks, trace.num_layers, trace.num_experts))
    for tick in range(ticks):
        at = (tick / ticks * around + rng.normal(0, width, tokens)) % 1.0
        request = np.minimum((at * len(first)).astype(int), len(first) - 1)
        chosen = rows[first[request] + (rng.random(tokens) * count[request]).astype(int)]
        for layer in range(trace.num_layers):
            found[tick, layer] = np.bincount(trace.expert_ids_TLK[chosen, layer].ravel(), minlength=trace.num_experts)
    return found


class Rebalancing:
    """Plans on one machine, under one drifting load.

    Args:
        load_KLE: tokens of each expert in one iteration of each tick.
        tick_s: how long a tick is; load changes from one to the next only.

    Raises:
        ValueError: there is no more traffic than goes before.
    """

    def __init__(
        self, problem: Problem, price: Price, model: ModelSpec, cluster: Cluster, load_KLE: Floats, tick_s: float
    ) -> None:
        self._problem, self._price, self._model, self._fabric = problem, price, model, Fabric(cluster)
        self._load_KLE, self._tick_s = load_KLE, tick_s
        self._first = max(1, round(WARM_S / tick_s))
        if self._first >= len(load_KLE):
            raise ValueError(f"rebalancing: {len(load_KLE) * tick_s:g} s of traffic, of which {WARM_S:g} s go before")

    def run(self, plan: Plan) -> Outcome:
        """Follow a plan through all ticks."""
        problem, tick_s = self._problem, self._tick_s
        slot_LP = most_even(problem, self._load_KLE[: self._first].sum(axis=0))
        every, window = (max(1, round(seconds / tick_s)) for seconds in (plan.every_s, plan.window_s))
        ticks = range(self._first, len(self._load_KLE))
        full, at_s, moved, moving_s = [], [], 0, 0.0
        for tick in ticks:
            if plan.methods and tick > self._first and (tick - self._first) % every == 0:
                load_LE = self._load_KLE[max(0, tick - window) : tick].sum(axis=0)
                new_LP, count, seconds = self._decide(plan, slot_LP, load_LE, every * tick_s)
                if count:
                    slot_LP, moved, moving_s = new_LP, moved + count, moving_s + seconds
                    at_s.append((tick - self._first) * tick_s)
            full.append(self._fullest(slot_LP, self._load_KLE[tick]))
        return self._outcome(plan, full, moving_s, at_s, moved)

    def oracle(self) -> Outcome:
        """Every tick has the most even placement of its own, which nothing moves for: no plan wins more."""
        full = [self._fullest(most_even(self._problem, load_LE), load_LE) for load_LE in self._load_KLE[self._first :]]
        return self._outcome(Plan("oracle"), full)

    def _outcome(
        self, plan: Plan, full: list[float], moving_s: float = 0.0, at_s: Sequence[float] = (), moved: int = 0
    ) -> Outcome:
        stalled = moving_s / (len(full) * self._tick_s)
        plain_s = np.array([self._price.seconds_at(value) for value in full])  # in ticks as long, hence harmonic
        mean_s = float(1 / np.mean(1 / plain_s)) / max(1 - stalled, 1e-9)
        return Outcome(plan, mean_s, stalled, np.array(full), list(at_s), moved)

    def _fullest(self, slot_LP: Ints, load_LE: Floats) -> float:
        return float(fullest_SL(self._problem, rank_load_SLR(self._problem, slot_LP, load_LE[None])).mean())

    def _decide(self, plan: Plan, today_LP: Ints, load_LE: Floats, until_s: float) -> tuple[Ints, int, float]:
        """The placement until the next look, experts that move for it, and how long that takes."""
        problem, today = self._problem, self._problem.as_placement(today_LP)
        full_now = self._fullest(today_LP, load_LE)
        iterations = until_s / self._price.seconds_at(full_now)
        all_s = 0.0  # if all slots' experts moved
        if plan.worth:
            fresh = problem.as_placement(most_even(problem, load_LE))
            count, seconds = moving(today, fresh, self._model, self._fabric)
            all_s = seconds * today_LP.size / max(count, 1)
        weights = Weights(load=self._price.steps_s * iterations, moved=plan.worth * all_s)
        asked = replace(problem, weights=weights, today=today_LP)
        best = (today_LP, 0, 0.0)
        most = 0.0 if plan.worth else -np.inf
        for name in plan.methods:
            new_LP = METHODS[name].place(asked, Demand.of_load(load_LE), Clock(60))
            new_LP = renumbered(problem, new_LP, today_LP) if plan.matched else new_LP
            count, seconds = moving(today, problem.as_placement(new_LP), self._model, self._fabric)
            won_s = self._price.steps_s * iterations * (full_now - self._fullest(new_LP, load_LE))
            if won_s - plan.worth * seconds > most:
                best, most = (new_LP, count, seconds), won_s - plan.worth * seconds
        return best


def renumbered(problem: Problem, slot_LP: Ints, today_LP: Ints) -> Ints:
    """The same contents of ranks, on such ranks (of as many slots, as fast) that most experts are where they were."""
    found = slot_LP.copy()
    for alike in {(int(slots), float(speed)) for slots, speed in zip(problem.slots_R, problem.speed_R, strict=True)}:
        ranks = np.flatnonzero((problem.slots_R == alike[0]) & (problem.speed_R == alike[1]))
        slots_RS = problem.first_R[ranks][:, None] + np.arange(alike[0])
        for layer, (new_P, old_P) in enumerate(zip(slot_LP, today_LP, strict=True)):
            has_RE = np.zeros((2, len(ranks), problem.num_experts), np.float32)
            for which, slot_P in enumerate((new_P, old_P)):
                has_RE[which, np.arange(len(ranks))[:, None], slot_P[slots_RS]] = 1
            rows, columns = linear_sum_assignment(has_RE[0] @ has_RE[1].T, maximize=True)
            found[layer, slots_RS[columns]] = new_P[slots_RS[rows]]
    return found
