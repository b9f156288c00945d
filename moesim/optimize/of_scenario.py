"""What a scenario asks: its placement problem, and which requests are known and which are judged on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moesim.optimize.problem import Problem
from moesim.routing.replay import Replay
from moesim.routing.trace import RoutingTrace
from moesim.scenario import Scenario


def problem_of(base: Scenario, slack: float = 0.05, per_rack: int = 0) -> Problem:
    """Experts on the ranks that hold routed ones; ranks slowed by faults are as slow.

    Raises:
        ValueError: experts are not spread over ranks, or these are not whole nodes.
    """
    layout, model = base.layout, base.model
    ep = layout.experts.ep - layout.num_shared_expert_ranks
    if not model.moe_layers or ep < 2:
        raise ValueError(
            f"{base.name}: placement needs experts that are spread over ranks; the layout has ep = {layout.experts.ep}"
        )
    per_node = min(base.cluster.devices_per_node, ep)
    if ep % per_node:
        raise ValueError(f"{base.name}: {ep} ranks that hold experts are not whole nodes of {per_node}")
    problem = Problem.even(
        model.experts.num_experts, ep, per_node, layout.num_redundant_experts, slack=slack,
        num_groups=model.experts.num_groups, per_rack=per_rack,
    )  # fmt: skip
    slowdown_R = base.faults.slowdown_R(base.cluster.num_ranks)
    if slowdown_R is None:
        return problem
    speed_R = 1 / slowdown_R[:ep]
    return replace(problem, speed_R=speed_R / speed_R.max())


def halves(base: Scenario) -> tuple[RoutingTrace, RoutingTrace]:
    """Requests that are known beforehand, and those that a run replays.

    Raises:
        ValueError: there is one request only.
    """
    if len(np.unique(base.trace.request_T)) < 2:
        raise ValueError(f"{base.name}: trace {base.trace.name!r} has one request; placing needs some to be judged on")
    history = Replay(base.trace, base.stream("replay"), keeps_history=True).history
    others = np.setdiff1d(np.arange(base.trace.num_tokens), history)
    return base.trace.take(np.sort(history)), base.trace.take(others)
