"""KV caches on their way from the instances that compute prompts to those that compute answers."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy

from moesim.costs.compute import efficiency
from moesim.network.kv_links import KvLinks, left_after_prefill_bytes
from moesim.serving.instance import Instance

if TYPE_CHECKING:
    from collections.abc import Generator

    from moesim.serving.pool import Pool
    from moesim.simulate.serving import ServiceRun


class Transfers:
    """What is on its way. Each data-parallel group of an instance has its own devices' links, one port together.

    The blocks of the prompt stay taken where they were computed until all of it has arrived.
    """

    def __init__(self, run: ServiceRun) -> None:
        self._run, self._env = run, run.env
        cluster = run.service.cluster
        self._link = cluster.scale_up if cluster.num_ranks <= cluster.devices_per_node else cluster.scale_out
        each = self._link.bytes_per_s * efficiency(cluster.device, "network", "value")
        ports: list[float] = []
        self._first_port: dict[int, int] = {}
        for instance in run.instances:
            engine = instance.engine
            self._first_port[instance.number] = len(ports)
            ports += [each * engine.num_ranks / engine.data_parallel_size] * engine.data_parallel_size
        self._port_bytes_per_s = np.array(ports)
        self._links = KvLinks(self._port_bytes_per_s, self._port_bytes_per_s)
        self._by_number: dict[int, tuple[int, Instance, int, Instance, int]] = {}
        self._number_of: dict[int, int] = {}
        self._since_s: dict[int, float] = {}
        self._stranded: list[tuple[int, Instance]] = []
        self._is_told = False
        self._process = run.env.process(self._carry())

    @property
    def _decode(self) -> Pool:
        assert self._run.decode
        return self._run.decode

    def start(self, q: int, source: Instance, is_new: bool = True) -> None:
        """Send the cache of a prompt; where nobody is up to take it, when somebody is.

        is_new: whether the prompt has been computed just now, so that most layers may be there already.
        """
        run, now_s = self._run, self._env.now
        self._since_s.setdefault(q, now_s)
        if not self._decode.view.up_I.any():
            self._stranded.append((q, source))
            return
        run.catch_up(self._decode)
        target, group = self._decode.pick(q)
        at, to = self._port(source, int(run.group_Q[q])), self._port(target, group)
        num_bytes = run.service.model.kv_bytes(int(run.book.computed_Q[q]))
        if is_new and run.service.fleet.overlaps_transfer:
            rate = min(self._port_bytes_per_s[at], self._port_bytes_per_s[to])
            prefill_s = now_s - float(run.book.scheduled_s_Q[q])
            num_bytes = left_after_prefill_bytes(num_bytes, len(run.service.model.layers), prefill_s, rate)
        number = self._links.start(now_s, at, to, num_bytes)
        self._by_number[number] = q, source, int(run.group_Q[q]), target, group
        self._number_of[q] = number
        self._decode.expect(q, target, group)
        if self._process is not self._env.active_process and not self._is_told:
            self._is_told = True
            self._process.interrupt()

    def lose(self, q: int) -> None:
        """Where a cache comes from is down: what has arrived of it is of no use."""
        if q in self._since_s:
            self._run.note_waiting(self._since_s.pop(q))
        number = self._number_of.pop(q, None)
        if number is not None:
            _, _, _, target, group = self._by_number.pop(number)
            self._decode.expect(q, target, group, -1)
            self._links.cancel(self._env.now, number)
        self._stranded = [pair for pair in self._stranded if pair[0] != q]

    def since(self) -> list[float]:
        """From when on each cache that has not arrived has been on its way."""
        return list(self._since_s.values())

    def reopen(self) -> None:
        """An instance is up again."""
        stranded, self._stranded = self._stranded, []
        for q, source in stranded:
            self.start(q, source, is_new=False)

    def _port(self, instance: Instance, group: int) -> int:
        return self._first_port[instance.number] + group

    def _carry(self) -> Generator[simpy.Event, Any, None]:
        env = self._env
        while True:
            self._is_told = False
            at_s = self._links.next_finish_s()
            later_s = max(at_s, math.nextafter(env.now, math.inf)) - env.now
            with suppress(simpy.Interrupt):
                yield env.event() if at_s == math.inf else env.timeout(later_s)
            for number in self._links.finished(env.now):
                if number in self._by_number:
                    env.process(self._arrive(number))

    def _arrive(self, number: int) -> Generator[simpy.Event, Any, None]:
        """After the latency of the links, if nothing has happened to its source by then."""
        run = self._run
        yield self._env.timeout(self._link.latency_s)
        if number not in self._by_number:
            return
        q, source, source_group, target, group = self._by_number.pop(number)
        del self._number_of[q]
        self._decode.expect(q, target, group, -1)
        if not run.is_up(target):
            self.start(q, source, is_new=False)
            return
        run.note_waiting(self._since_s.pop(q))
        source.forget(q, source_group, self._env.now)
        run.rouse(source)
        run.enqueue(q, target, group)
