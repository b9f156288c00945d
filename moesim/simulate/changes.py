"""Instances that come and go while a fleet serves: autoscaling, and faults."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy

from moesim.costs import memory
from moesim.faults import ServingFault
from moesim.policies.autoscaler import AUTOSCALERS, FleetLoad
from moesim.serving.instance import Instance

if TYPE_CHECKING:
    from moesim.simulate.serving import ServiceRun

Process = Generator[simpy.Event, Any, None]


class Changes:
    """Who is up, and who is paid for.

    With autoscaling the first instances by number are wanted. A further one is up once its weights are loaded; one that
    is no longer wanted gets nothing new, and its devices are given back when it has answered what it has.

    Attributes:
        ups: from when on how many instances take requests (or compute answers).
    """

    def __init__(self, run: ServiceRun) -> None:
        self._run, self._env = run, run.env
        fleet, first = run.service.fleet, run.prefill.instances
        self._wanted = len(first)
        if fleet.autoscaling.policy != "fixed":
            self._wanted = min(max(fleet.num_instances or 1, fleet.autoscaling.min_instances), len(first))
            run.env.process(self._scale())
        off = first[self._wanted :]
        self._held_from_s = {i.number: 0.0 for i in run.instances if i not in off}
        self._given_up_s: dict[int, float] = {}
        self._loaded, self._down = set(self._held_from_s), set[int]()
        self._device_s = 0.0
        self.ups: list[tuple[float, int]] = []
        for instance in run.instances:
            self._refresh(instance)
        for fault in fleet.faults:
            run.env.process(self._fail(fault))

    def device_s(self, seconds: float) -> float:
        """Seconds that devices were held by the end of the run, summed over devices."""
        for number in list(self._held_from_s):
            self._give_back(self._run.instances[number], seconds)
        return self._device_s

    def _refresh(self, instance: Instance) -> None:
        """See whether an instance is up; one that has come up gets what was held back."""
        run, number = self._run, instance.number
        pool = run.pool_of(instance)
        is_wanted = number < self._wanted or pool is not run.prefill
        is_up = number in self._loaded and number not in self._down and is_wanted
        up_I, i = pool.view.up_I, number - pool.instances[0].number
        was_up, up_I[i] = up_I[i], is_up
        now = self._env.now, sum(int(pool.view.up_I.sum()) for pool in run.pools)
        if not self.ups or self.ups[-1][0] < now[0]:
            self.ups.append(now)
        else:
            self.ups[-1] = now
        if is_up and not was_up:
            run.reopen()

    def _give_back(self, instance: Instance, at_s: float) -> None:
        self._device_s += max(at_s - self._held_from_s.pop(instance.number), 0.0) * instance.engine.num_ranks

    # Autoscaling

    def _scale(self) -> Process:
        run, env = self._run, self._env
        scaling, instances = run.service.fleet.autoscaling, run.prefill.instances
        decide = AUTOSCALERS[scaling.policy]().start(scaling)
        while True:
            yield env.timeout(scaling.interval_s)
            run.catch_up(run.prefill)
            is_over = env.peek() == math.inf and all(instance.next_s == math.inf for instance in instances)
            if not run.num_left or is_over:
                return
            self._wanted = decide(self._load())
            for instance in instances:
                number = instance.number
                if number >= self._wanted:
                    self._let_go(instance)
                elif number not in self._held_from_s:
                    self._held_from_s[number] = env.now
                    env.process(self._load_weights(instance))
                else:
                    self._given_up_s.pop(number, None)
                self._refresh(instance)

    def _load(self) -> FleetLoad:
        run, view = self._run, self._run.prefill.view
        up_I, rules = view.up_I, run.prefill.instances[0].rules
        at_work = [instance for instance in run.prefill.instances if run.is_up(instance)]
        used = [
            1 - (groups.free_D + groups.idle_D * rules.unit_blocks) / rules.num_blocks
            for groups in (instance.groups for instance in at_work)
        ]
        return FleetLoad(
            now_s=self._env.now,
            wanted=self._wanted,
            up=len(at_work),
            waiting=int(view.waiting_ID.sum()),
            running=int(view.running_ID.sum()),
            running_fraction=float(view.running_ID[up_I].mean()) / rules.max_num_seqs if at_work else 0.0,
            kv_fraction=float(np.mean(used)) if used else 0.0,
        )

    def _let_go(self, instance: Instance) -> None:
        """An instance that is not wanted goes as soon as it has answered what it has."""
        number = instance.number
        if number not in self._held_from_s or number not in self._loaded:
            return
        since_s = self._given_up_s.setdefault(number, self._env.now)
        if not instance.unfinished_D.any():
            self._give_back(instance, max(since_s, instance.clock_s))
            self._loaded.discard(number)
            del self._given_up_s[number]

    def _load_weights(self, instance: Instance) -> Process:
        service = self._run.service
        parts = memory.device_bytes(
            service.model, service.engine.layout, requests_per_group=0, tokens_per_request=0, batched_tokens=0
        )
        pp = service.engine.pipeline_parallel_size
        yield self._env.timeout(service.fleet.autoscaling.starting_s(sum(parts.values()) / pp))
        self._loaded.add(instance.number)
        self._refresh(instance)

    # Faults

    def _fail(self, fault: ServingFault) -> Process:
        run, env, instance = self._run, self._env, self._run.instances[fault.instance]
        yield env.timeout(fault.start_s)
        run.catch_up(run.pool_of(instance))
        instance.come_to(env.now)
        if fault.kind == "slow":
            instance.slow_down(fault.rank, fault.factor, run.service)
        else:
            self._go_down(instance)
        if fault.duration_s == math.inf:
            return
        yield env.timeout(fault.duration_s)
        run.catch_up(run.pool_of(instance))
        instance.come_to(env.now)
        if fault.kind == "slow":
            instance.slow_down(fault.rank, 1.0, run.service)
        else:
            self._down.discard(instance.number)
            self._refresh(instance)

    def _go_down(self, instance: Instance) -> None:
        """All that an instance has is lost, and begins again elsewhere."""
        run = self._run
        run.collect(instance)
        lost = instance.has(run.instance_Q)
        if run.transfers:
            for q in lost.tolist():
                run.transfers.lose(q)
        instance.lose(lost, self._env.now)
        self._down.add(instance.number)
        self._refresh(instance)
        run.pool_of(instance).see(instance)
        for q in lost.tolist():
            run.route(q)
