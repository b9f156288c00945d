"""Experts of an instance placed anew, every so many iterations, by what they had to do lately.

Source: vLLM's EPLB (`eplb_step_interval` iterations apart, by the load of the last `eplb_window_size` of them, the
first time after a quarter of the interval); the load is then old by as long as the placement stays. All ranks wait
while experts travel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.costs.migration import moving
from moesim.network.routes import Fabric
from moesim.policies.placement import Eplb
from moesim.service import Service
from moesim.serving.instance import Instance
from moesim.serving.pricing import first_placement, replaced

Floats = NDArray[np.float64]


@dataclass
class Rebalancer:
    """When experts of one instance move, and where to."""

    service: Service
    instance: Instance

    def __post_init__(self) -> None:
        service, engine = self.service, self.instance.engine
        experts, ep = service.model.experts, engine.layout.experts.ep
        self._shape = (len(service.model.moe_layers), experts.num_experts)
        self._num_slots = experts.num_experts + engine.num_redundant_experts
        self._per_node = min(service.cluster.devices_per_node, ep)
        self.placement = first_placement(service.model, service.cluster, engine, service.trace)
        self._fabric = Fabric(service.cluster)
        self.moved = 0
        self._plan(max(engine.eplb_step_interval // 4, 1))

    def _plan(self, steps: int) -> None:
        window, done = min(self.instance.engine.eplb_window_size, steps), self.instance.num_iterations
        self._watch_at, self._move_at = done + steps - window, done + steps

    def most(self) -> int:
        """Iterations until something is to be done."""
        done = self.instance.num_iterations
        return (self._watch_at if done < self._watch_at else self._move_at) - done

    def act(self) -> None:
        """Do what is to be done after so many iterations."""
        done, load_LP = self.instance.num_iterations, self.instance.work.load_LP
        if done == self._watch_at:
            load_LP[:] = 0
        if done < self._move_at:
            return
        load_LE = np.zeros(self._shape)
        for layer, expert_P in enumerate(self.placement.slot_expert_LP):
            np.add.at(load_LE[layer], expert_P, load_LP[layer])
        before = self.placement
        self.placement = Eplb().place(self._num_slots, before.ep, self._per_node, load_LE)
        instance = self.instance
        instance.put(
            replaced(instance.prices, self.placement, self.service.model, instance.engine.layout), self.service
        )
        moved, seconds = moving(before, self.placement, self.service.model, self._fabric)
        self.instance.groups.copy_s_D[:] += seconds
        self.moved += moved
        self._plan(self.instance.engine.eplb_step_interval)
