"""Serving: the instances, routers and links of a fleet on one SimPy clock.

An instance is a process. It runs iterations in compiled code until the next moment at which something outside could
change what it does, and sleeps until the last of them ends: where requests come by the clock and are answered where
they come in, that is the next arrival; else it is the next event of anybody.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np
import simpy

from moesim.costs import memory
from moesim.costs.compute import efficiency
from moesim.faults import ServingFault
from moesim.network.kv_links import KvLinks, left_after_prefill_bytes
from moesim.policies.autoscaler import AUTOSCALERS, FleetLoad
from moesim.routing.streams import Streams, streams
from moesim.service import EngineConfig, Service, is_too_long, kv_tokens
from moesim.serving.advance import note_waiting
from moesim.serving.closing import outcome_of
from moesim.serving.instance import Instance, prices_of, rules_of
from moesim.serving.outcome import Outcome
from moesim.serving.pool import Pool, cluster_votes
from moesim.serving.prices import Prices
from moesim.serving.rebalancing import Rebalancer
from moesim.serving.state import DROPPED, PREFILLED, RUNNING, WAITING, open_book, open_timeline

Process = Generator[simpy.Event, Any, None]
Pricing = Callable[[Service, EngineConfig, str], Prices]
Tell = Callable[[int, float], None]

MOST = 20_000
"""Iterations of one compiled call, so that Ctrl-C is heard within a second or so."""
TELL_EVERY_S = 0.1


def simulate_service(
    service: Service, bound: str = "value", tell: Tell | None = None, pricing: Pricing = prices_of
) -> Outcome:
    """Serve all requests.

    Args:
        bound: "value", or the "low" or "high" end of the believed efficiencies.
        tell: is told now and then how many requests are done with, and the time of the simulation.
        pricing: what an engine's iterations cost.

    Returns:
        What became of them; partial after Ctrl-C.
    """
    return _Run(service, bound, tell or (lambda finished, now_s: None), pricing).play()


class _Run:
    """One run: who is there, and what happens to a request."""

    def __init__(self, service: Service, bound: str, tell: Tell, pricing: Pricing) -> None:
        self.service, self.requests, self.tell, self.pricing, self.bound = service, service.requests, tell, pricing, bound
        requests, num, fleet = self.requests, len(self.requests), service.fleet
        self.env = simpy.Environment()
        self.streams = _streams(service)
        routing = self.streams
        self.book = open_book(
            requests,
            (routing.prompt_row_Q, routing.prompt_len_Q, routing.answer_row_Q, routing.answer_len_Q,
             routing.begin_prompt_Q, routing.begin_answer_Q),
        )  # fmt: skip
        self.timeline, self.group_Q, self.instance_Q = open_timeline(), np.full(num, -1), np.full(num, -1)
        self.trips_Q = np.zeros(num, np.int64)
        self.prefill = self._pool(service.engine, fleet.router, 0)
        self.decode: Pool | None = None
        if fleet.is_disaggregated:
            self.decode = self._pool(service.decode_engine or service.engine, fleet.decode_router, len(self.prefill.instances))
        self.instances = [*self.prefill.instances, *(self.decode.instances if self.decode else ())]
        self.wake: list[simpy.Event | None] = [None] * len(self.instances)
        self.rebalancers = {
            i.number: Rebalancer(service, i) for i in self.instances if i.engine.enable_eplb and service.model.moe_layers
        }  # fmt: skip
        self.left, self.gone, self.backlog, self.next_arrival_s = num, self.env.event(), [], math.inf  # type: ignore[var-annotated]
        self.unsent = iter(range(num))
        self.is_coupled = bool(self.decode or requests.concurrency or fleet.faults or fleet.autoscaling.policy != "fixed")
        self.told_s = 0.0
        self.links = _Links(self) if self.decode else None
        self.held_since: dict[int, float] = {}
        self.device_s = 0.0
        self.ups: list[tuple[float, int]] = []

    def _pool(self, engine: EngineConfig, router: str, first: int) -> Pool:
        service, fleet = self.service, self.service.fleet
        counts = fleet.sizes(service.cluster.num_ranks, service.engine.num_ranks)
        is_prefill_only = fleet.is_disaggregated and first == 0
        rules, prices = rules_of(service, engine, is_prefill_only), self.pricing(service, engine, self.bound)
        num_units = int(self.requests.block_ids.max(initial=-1)) + 1
        instances = [
            Instance(first + i, engine, rules, prices, self.book, self.group_Q, self.timeline, num_units)
            for i in range(counts[first > 0])
        ]
        history = (None, None)
        if router == "expert_aware" and service.model.moe_layers:
            history = cluster_votes(service.trace, self.streams, instances[0])  # type: ignore[assignment]
        return Pool(instances, self.requests, router, service.stream(f"router {first}"), *history)

    def play(self) -> Outcome:
        """From the first request to the last answer."""
        env, fleet = self.env, self.service.fleet
        self._drop_too_long()
        at_first = len(self.prefill.instances)
        if fleet.autoscaling.policy != "fixed":
            at_first = min(max(fleet.num_instances or 1, fleet.autoscaling.min_instances), at_first)
            env.process(self._scale(at_first))
        for instance in self.instances:
            instance.is_up = self.prefill.instances[at_first:].count(instance) == 0
            if instance.is_up:
                self.held_since[instance.number] = 0.0
            env.process(self._serve(instance))
        self._count_up()
        env.process(self._clients() if self.requests.concurrency else self._arrivals())
        for fault in fleet.faults:
            env.process(self._fail(fault))
        if self.links:
            env.process(self.links.carry())
        is_partial, notes = False, list[str]()
        try:
            if self.left:
                env.run(self.gone)
        except KeyboardInterrupt:
            is_partial = True
        except RuntimeError:  # SimPy has no event left
            if not self.backlog:
                raise
            notes.append(f"no instance came back for {len(self.backlog)} requests; they were never answered")
        return self._close(is_partial, notes)

    def _drop_too_long(self) -> None:
        """Refuse what no instance could ever hold."""
        service, requests = self.service, self.requests
        checks = [(service.engine, np.ones_like(requests.output_Q) if self.decode else requests.output_Q)]
        if self.decode:
            checks.append((service.decode_engine or service.engine, requests.output_Q))
        for engine, output_Q in checks:
            too_long_Q = is_too_long(requests.prompt_Q, output_Q, engine, kv_tokens(service, engine))
            self.book.state_Q[too_long_Q] = DROPPED
        self.left -= int((self.book.state_Q == DROPPED).sum())

    def _close(self, is_partial: bool, notes: list[str]) -> Outcome:
        book, fleet = self.book, self.service.fleet
        ended_s = max([float(np.nanmax(book.finish_s_Q))] if np.isfinite(book.finish_s_Q).any() else [0.0])
        seconds = max([self.env.now, ended_s, *(i.clock_s for i in self.instances)]) if is_partial else ended_s
        for number in list(self.held_since):
            self._give_back(self.instances[number], seconds)
        moved = sum(rebalancer.moved for rebalancer in self.rebalancers.values())
        if moved:
            notes.append(f"{moved} experts moved to other ranks, while their instance waited")
        if self.links and fleet.overlaps_transfer:
            notes.append("KV caches travel layer by layer while prompts are computed")
        return outcome_of(
            self.requests, book, self.instances, self.timeline, self.ups, self.instance_Q, self.group_Q, seconds,
            self.device_s, is_partial, notes, {"memory_bytes": _memory_bytes(self.service)},
        )  # fmt: skip

    # Requests come

    def _arrivals(self) -> Process:
        env = self.env
        for q, at_s in enumerate(self.requests.arrival_s_Q.tolist()):
            if at_s > env.now:
                self.next_arrival_s = env.now + (at_s - env.now)  # as SimPy rounds it
                yield env.timeout(at_s - env.now)
            self._send(q)
        self.next_arrival_s = math.inf

    def _clients(self) -> Process:
        """A closed loop: as many as there are clients, and one for each answer."""
        for _ in range(self.requests.concurrency or 0):
            self._send_next()
        yield from ()

    def _send_next(self) -> None:
        for q in self.unsent:
            if self.book.state_Q[q] != DROPPED:
                self._send(q)
                return
            self.book.sent_s_Q[q] = self.env.now

    def _think(self) -> Process:
        yield self.env.timeout(self.requests.think_s)
        self._send_next()

    def _send(self, q: int) -> None:
        self.book.sent_s_Q[q] = self.env.now
        if self.book.state_Q[q] != DROPPED:
            self._route(q)

    def _route(self, q: int) -> None:
        """Give a request to an instance, or hold it back until one is up."""
        if not self.prefill.view.up_I.any():
            self.backlog.append(q)
            return
        self._enqueue(self.prefill, q, *self.prefill.pick(q))

    def _enqueue(self, pool: Pool, q: int, i: int, group: int) -> None:
        instance = pool.instances[i]
        self.instance_Q[q] = instance.number
        instance.send(q, group, self.env.now)
        self._rouse(instance)

    def _rouse(self, instance: Instance) -> None:
        event, self.wake[instance.number] = self.wake[instance.number], None
        if event is not None:
            event.succeed()

    # Requests are served

    def _pool_of(self, instance: Instance) -> tuple[Pool, int]:
        num = len(self.prefill.instances)
        if instance.number < num:
            return self.prefill, instance.number
        assert self.decode
        return self.decode, instance.number - num

    def _serve(self, instance: Instance) -> Process:
        env, (pool, i) = self.env, self._pool_of(instance)
        stops = bool(self.requests.concurrency or instance.rules.is_prefill_only or self.service.fleet.autoscaling.policy != "fixed")
        rebalancer = self.rebalancers.get(instance.number)
        while True:
            until_s = max(env.peek(), math.nextafter(env.now, math.inf)) if self.is_coupled else self.next_arrival_s
            most = min(MOST, rebalancer.most()) if rebalancer else MOST
            end_s, is_idle = instance.run(env.now, until_s, stops, most)
            if rebalancer:
                rebalancer.act()
            if end_s > env.now or not is_idle:
                yield env.timeout(max(end_s - env.now, 0.0))
            for q in instance.left():
                self._leave(instance, q)
            pool.observe(i)
            if time.monotonic() - self.told_s > TELL_EVERY_S:
                self.told_s = time.monotonic()
                self.tell(len(self.requests) - self.left, env.now)
            if is_idle and not instance.has_news:
                if not instance.is_up and not instance.unfinished_D.any():
                    self._give_back(instance, env.now)
                wake = self.wake[instance.number] = env.event()
                slept_s = env.now
                yield wake
                for _ in range(int(instance.groups.waiting_D.sum()) - instance.num_new):
                    note_waiting(self.timeline, slept_s, env.now)  # who found no room

    def _leave(self, instance: Instance, q: int) -> None:
        """A request is answered, or its prompt is done."""
        if self.book.state_Q[q] == PREFILLED:
            assert self.links
            self.links.start(q, instance)
            return
        self.left -= 1
        if not self.left:
            self.gone.succeed()
        elif self.requests.concurrency:
            if self.requests.think_s:
                self.env.process(self._think())
            else:
                self._send_next()
