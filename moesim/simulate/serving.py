"""Serving: the instances, routers and links of a fleet on one SimPy clock.

An instance plays its iterations in compiled code, up to the next moment at which something outside could change what it
does. Where nobody waits for what leaves it, it is played only when somebody looks: when a request is routed, at a
decision or a fault, and at the end. Else (closed loops, prompts whose answers are computed elsewhere) it is a process,
which plays up to the next event of anybody, and sleeps until a request leaves.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import numpy as np
import simpy

from moesim.costs import memory
from moesim.routing.streams import Streams, streams
from moesim.service import EngineConfig, Service, is_too_long, kv_tokens
from moesim.serving.advance import note_held
from moesim.serving.closing import outcome_of
from moesim.serving.instance import MOST, Instance, prices_of, rules_of
from moesim.serving.outcome import Outcome
from moesim.serving.pool import Pool, cluster_votes
from moesim.serving.prices import Prices
from moesim.serving.rebalancing import Rebalancer
from moesim.serving.state import DROPPED, PREFILLED, open_book, open_timeline
from moesim.simulate.changes import Changes
from moesim.simulate.transfers import Transfers

Process = Generator[simpy.Event, Any, None]
Pricing = Callable[[Service, EngineConfig, str], Prices]
Tell = Callable[[int, float], None]

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

    Raises:
        KeyboardInterrupt: Ctrl-C before the first request could be sent, or a second one.
    """
    with _interrupts_wait() as stop:
        run = ServiceRun(service, bound, tell or (lambda finished, now_s: None), pricing, stop)
        if stop.is_set():
            raise KeyboardInterrupt
        return run.play()


class ServiceRun:
    """One run: who is there, and what happens to a request.

    Attributes:
        env: the clock.
        prefill, decode: instances that take requests, and those (if there are any) that compute answers alone.
        instances: all of them, by number.
        book: of all requests.
        instance_Q: who has (or had last) each request, -1 for nobody.
        num_left: requests that are neither answered nor refused.
    """

    def __init__(
        self, service: Service, bound: str, tell: Tell, pricing: Pricing, stop: threading.Event | None = None
    ) -> None:
        self.service, self.requests, self._tell = service, service.requests, tell
        self._stop = stop or threading.Event()
        requests, fleet, num = service.requests, service.fleet, len(service.requests)
        self.env = simpy.Environment()
        self._streams = _streams(service)
        self.book, self._timeline = open_book(requests, self._streams), open_timeline()
        self.group_Q, self.instance_Q = np.full(num, -1), np.full(num, -1)
        make = _Maker(self, bound, pricing)
        num_first, num_decode = fleet.sizes(service.cluster.num_ranks, service.engine.num_ranks)
        self.prefill = make.pool(service.engine, fleet.router, 0, num_first, is_prefill_only=num_decode > 0)
        self.decode = None
        if num_decode:
            self.decode = make.pool(service.decode_engine or service.engine, fleet.decode_router, num_first, num_decode)
        self.instances = [*self.prefill.instances, *(self.decode.instances if self.decode else ())]
        moving = [i for i in self.instances if i.engine.enable_eplb and service.model.moe_layers]
        self._rebalancers = {instance.number: Rebalancer(service, instance) for instance in moving}
        self.num_left, self._unsent, self._told_s = num, iter(range(num)), 0.0
        self._backlog: list[tuple[int, float]] = []
        self._watched: dict[int, simpy.Process] = {}
        self.transfers = Transfers(self) if self.decode else None
        self._changes = Changes(self)

    def play(self) -> Outcome:
        """From the first request to the last answer."""
        self._drop_too_long()
        for pool in self.pools:
            if self.requests.concurrency or pool.instances[0].rules.is_prefill_only:
                for instance in pool.instances:
                    self._watched[instance.number] = self.env.process(self._watch(instance))
        self.env.process(self._clients() if self.requests.concurrency else self._arrivals())
        is_partial, notes = False, list[str]()
        try:
            self.env.run()
            self._finish()
        except KeyboardInterrupt:
            is_partial = True
        if self._backlog and not is_partial:
            notes.append(f"no instance came back for {len(self._backlog)} requests; they were never answered")
        return self._close(is_partial, notes)

    @property
    def pools(self) -> list[Pool]:
        """Those that there are."""
        return [self.prefill, self.decode] if self.decode else [self.prefill]

    def pool_of(self, instance: Instance) -> Pool:
        """The pool that an instance is in."""
        return self.pools[instance.number >= len(self.prefill.instances)]

    def _drop_too_long(self) -> None:
        """Refuse what no instance could ever hold."""
        service, requests = self.service, self.requests
        checks = [(service.engine, np.ones_like(requests.output_Q) if self.decode else requests.output_Q)]
        if self.decode:
            checks.append((service.decode_engine or service.engine, requests.output_Q))
        for engine, output_Q in checks:
            too_long_Q = is_too_long(requests.prompt_Q, output_Q, engine, kv_tokens(service, engine))
            self.book.state_Q[too_long_Q] = DROPPED
        self.num_left -= int((self.book.state_Q == DROPPED).sum())

    # Requests come

    def _arrivals(self) -> Process:
        env = self.env
        for q, at_s in enumerate(self.requests.arrival_s_Q.tolist()):
            if at_s > env.now:
                yield env.timeout(at_s - env.now)
            self._send(q)

    def _clients(self) -> Process:
        """A closed loop: as many as there are clients, and one for each answer."""
        for _ in range(min(self.requests.concurrency or 0, len(self.requests))):
            self._send_next()
        yield from ()

    def _send_next(self) -> None:
        for q in self._unsent:
            self._send(q)
            if self.book.state_Q[q] != DROPPED:
                return

    def _think(self) -> Process:
        yield self.env.timeout(self.requests.think_s)
        self._send_next()

    def _send(self, q: int) -> None:
        self._look_up(self.env.now)
        self.book.sent_s_Q[q] = self.env.now
        if self.book.state_Q[q] != DROPPED:
            self.route(q)

    def route(self, q: int) -> None:
        """Give a request to an instance, or hold it back until one is up."""
        if not self.prefill.view.up_I.any():
            self._backlog.append((q, self.env.now))
            return
        self.catch_up(self.prefill)
        self.enqueue(q, *self.prefill.pick(q))

    def enqueue(self, q: int, instance: Instance, group: int) -> None:
        """Put a request in an instance's queue."""
        self.instance_Q[q] = instance.number
        instance.send(q, group, self.env.now)
        self.rouse(instance)

    def is_up(self, instance: Instance) -> bool:
        """Whether an instance takes requests."""
        pool = self.pool_of(instance)
        return bool(pool.view.up_I[instance.number - pool.instances[0].number])

    def reopen(self) -> None:
        """An instance is up again: it gets what was held back."""
        backlog, self._backlog = self._backlog, []
        for q, since_s in backlog:
            self.note_waiting(since_s)
            self.route(q)
        if self.transfers:
            self.transfers.reopen()

    # Requests are served

    def note_waiting(self, since_s: float) -> None:
        """A request was with nobody, from a time until now."""
        note_held(self._timeline, 0.0, 1.0, 0.0, since_s, self.env.now)

    def catch_up(self, pool: Pool) -> None:
        """Play the instances of a pool, where that is not done by a process of their own, up to now."""
        now_s = self.env.now
        for instance in pool.instances:
            if instance.next_s <= now_s and instance.clock_s < now_s:
                self._run(instance, now_s)
                self.collect(instance)

    def rouse(self, instance: Instance) -> None:
        """Something has come that an instance may act upon."""
        self.pool_of(instance).see(instance)
        process = self._watched.get(instance.number)
        if process and instance.next_s <= instance.clock_s and process is not self.env.active_process:
            process.interrupt()

    def _run(self, instance: Instance, until_s: float, stops: bool = False, most: int | None = None) -> None:
        """Play an instance up to a time or (with `stops`) until a request leaves."""
        rebalancer = self._rebalancers.get(instance.number)
        while instance.clock_s < until_s and instance.next_s <= until_s and instance.next_s < math.inf:
            instance.run(until_s, stops, min(rebalancer.most(), MOST) if rebalancer else MOST)
            if rebalancer:
                rebalancer.act()
            self._look_up(instance.clock_s)
            if most is not None or (stops and instance.groups.done[0]):
                break
        self.pool_of(instance).see(instance)

    def _look_up(self, now_s: float) -> None:
        """Say how far it is, and hear whether to stop."""
        if time.monotonic() - self._told_s > TELL_EVERY_S:
            self._told_s = time.monotonic()
            self._tell(len(self.requests) - self.num_left, now_s)
        if self._stop.is_set():
            raise KeyboardInterrupt

    def _watch(self, instance: Instance) -> Process:
        """Serve where others wait for what leaves."""
        env = self.env
        while True:
            self._run(instance, max(env.peek(), math.nextafter(env.now, math.inf)), stops=True)
            at_s = instance.clock_s if instance.groups.done[0] else instance.next_s
            with suppress(simpy.Interrupt):
                yield env.event() if at_s == math.inf else env.timeout(max(at_s - env.now, 0.0))
            self.collect(instance)

    def collect(self, instance: Instance) -> None:
        """Let go of the requests that have left an instance."""
        for q in instance.left():
            self._leave(instance, q)

    def _leave(self, instance: Instance, q: int) -> None:
        """A request is answered, or its prompt is done."""
        if self.book.state_Q[q] == PREFILLED:
            assert self.transfers
            self.transfers.start(q, instance)
            return
        self.num_left -= 1
        if self.requests.concurrency:
            if self.requests.think_s:
                self.env.process(self._think())
            else:
                self._send_next()

    def _finish(self) -> None:
        """Nothing comes any more: play those on whom nobody waits to their end, in turn."""
        busy = [instance for instance in self.instances if instance.next_s < math.inf]
        while busy:
            instance = min(busy, key=lambda instance: instance.next_s)
            self._run(instance, math.inf, most=MOST)
            self.collect(instance)
            busy = [instance for instance in busy if instance.next_s < math.inf]

    # The run ends

    def _wait_until(self, seconds: float) -> None:
        """Some were not answered: they are there until the end."""
        for instance in self.instances:
            instance.come_to(seconds)
        since = [since_s for _, since_s in self._backlog] + (self.transfers.since() if self.transfers else [])
        for since_s in since:
            note_held(self._timeline, 0.0, 1.0, 0.0, min(since_s, seconds), seconds)

    def _close(self, is_partial: bool, notes: list[str]) -> Outcome:
        book, fleet = self.book, self.service.fleet
        seconds = float(np.nanmax(book.finish_s_Q, initial=0.0, where=np.isfinite(book.finish_s_Q)))
        if self.num_left:
            seconds = max([self.env.now, seconds, *(instance.clock_s for instance in self.instances)])
            self._wait_until(seconds)
        moved = sum(rebalancer.moved for rebalancer in self._rebalancers.values())
        if moved:
            notes.append(f"{moved} experts moved to other ranks, while their instance waited")
        if self.transfers and fleet.overlaps_transfer:
            notes.append("KV caches travel layer by layer while prompts are computed")
        return outcome_of(
            self.requests, book, self.instances, self._timeline, self._changes.ups, self.instance_Q, self.group_Q,
            seconds, self._changes.device_s(seconds), is_partial, notes, _memory_bytes(self.service),
        )  # fmt: skip


class _Maker:
    """Makes the pools of a run."""

    def __init__(self, run: ServiceRun, bound: str, pricing: Pricing) -> None:
        self._run, self._bound, self._pricing = run, bound, pricing

    def pool(self, engine: EngineConfig, router: str, first: int, number: int, is_prefill_only: bool = False) -> Pool:
        """So many instances, numbered from `first` on."""
        run, service = self._run, self._run.service
        rules, prices = rules_of(service, engine, is_prefill_only), self._pricing(service, engine, self._bound)
        num_units = int(run.requests.block_ids.max(initial=-1)) + 1
        instances: Sequence[Instance] = [
            Instance(first + i, engine, rules, prices, run.book, run.group_Q, run._timeline, num_units)
            for i in range(number)
        ]
        votes_CD, cluster_Q = None, None
        if router == "expert_aware" and service.model.moe_layers:
            votes_CD, cluster_Q = cluster_votes(service.trace, run._streams, instances[0])
        return Pool(instances, run.requests, router, service.stream(f"router {first}"), votes_CD, cluster_Q)


@contextmanager
def _interrupts_wait() -> Iterator[threading.Event]:
    """Ctrl-C is heard between compiled calls, when all is in step; a second one at once.

    It would be lost where it falls into a callback of the compiler, whose exceptions nobody hears.
    """
    stop, before = threading.Event(), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield stop
        return

    def hear(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGINT, hear)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _streams(service: Service) -> Streams:
    """Which tokens of the trace each request replays; a dense model replays none."""
    num = len(service.requests)
    if service.model.moe_layers:
        return streams(service.trace, service.requests.topic_Q, service.stream("streams"))
    zero_Q, one_Q = np.zeros(num, np.int64), np.ones(num, np.int64)
    return Streams(zero_Q, one_Q, zero_Q, one_Q, zero_Q, zero_Q)


def _memory_bytes(service: Service) -> dict[str, float]:
    """Parts of the fullest device of an instance that takes requests, and its capacity."""
    engine, model = service.engine, service.model
    held = kv_tokens(service, engine)
    found = []
    for stage in memory.stages(model, engine.pipeline_parallel_size):
        parts = memory.device_bytes(
            stage, engine.layout, requests_per_group=0, tokens_per_request=0,
            batched_tokens=engine.max_num_batched_tokens,
        )  # fmt: skip
        token_bytes, request_bytes = memory.cache_bytes(stage, engine.layout)
        found.append(parts | {"kv_cache": held * token_bytes + engine.max_num_seqs * request_bytes})
    fullest = max(found, key=lambda parts: sum(parts.values()))
    return fullest | {"capacity": service.cluster.device.memory.capacity_bytes}
