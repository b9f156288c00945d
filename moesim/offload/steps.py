"""Steps of a model whose experts do not fit: each is played over the units of one machine.

All that does not depend on where experts are comes priced, as a program of the model's forward pass. Its operations run
on the GPU one after the other. When a layer's router has chosen, the executor plans who computes each expert, missing
ones that the GPU is to compute are queued for the link, and the prefetcher says what else should travel, behind them.
The next layer begins when all of this layer's experts are done, but for those that the executor defers to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.offload.routing import Routing
from moesim.offload.store import ExpertStore, HostLevel
from moesim.offload.timeline import Task, Timeline
from moesim.policies.executor import CPU, GPU, NEAR, Plan, Work
from moesim.policies.prefetch import Outlook, Prices
from moesim.policies.view import Ids, View
from moesim.program.operation import Costs, Operation, Played, Program, part_indices, part_names

Floats = NDArray[np.float64]

HOST_MEMORY = "host memory"
PIECES = 8
"""Parts of an expert after which a copy that is not urgent gives way."""


def _places(copy: Task) -> tuple[int, ...]:
    """What a copy brings."""
    assert isinstance(copy.tag, tuple)
    return copy.tag


class ExpertPrices(Prices, Protocol):
    """Seconds of experts on each unit, and bytes.

    bytes_E: of the weights of each expert of a layer. start_s: of a copy, before the first byte; copy_s: of a whole
    expert. launch_s: of experts that the GPU computes together; cold_s, hop_s: to start the CPU on a burst, and for the
    tokens to travel there and back. host_bytes_per_s: what host memory has for everybody. disk_start_s,
    disk_bytes_per_s: of a read from disk into host memory.
    """

    @property
    def bytes_E(self) -> Floats: ...  # noqa: D102
    @property
    def start_s(self) -> float: ...  # noqa: D102
    @property
    def copy_bytes_per_s(self) -> float: ...  # noqa: D102
    @property
    def launch_s(self) -> float: ...  # noqa: D102
    @property
    def hop_s(self) -> float: ...  # noqa: D102
    @property
    def host_bytes_per_s(self) -> float: ...  # noqa: D102
    @property
    def disk_start_s(self) -> float: ...  # noqa: D102
    @property
    def disk_bytes_per_s(self) -> float: ...  # noqa: D102
    @property
    def gpu_shares_X(self) -> Floats: ...  # noqa: D102
    @property
    def cpu_shares_X(self) -> Floats: ...  # noqa: D102
    @property
    def copy_shares_X(self) -> Floats: ...  # noqa: D102
    @property
    def near_shares_X(self) -> Floats: ...  # noqa: D102
    @property
    def flops_per_byte(self) -> float: ...  # noqa: D102

    def near_s(self, ids: Ids, load: Ids) -> Floats:
        """Of each expert on the near-data unit."""

    def near_start_s(self, tokens: int, is_beside: bool) -> float:
        """To start it on a layer; with tokens that travel to another memory and back."""


class _Piece(NamedTuple):
    layer: int
    task: Task
    shares_X: Floats
    after: Sequence[Task]


class OffloadedSteps:
    """One run: the store, the clock, and the policies' states go from step to step.

    Args:
        executor, prefetcher: policies; predictor: the decision object of one run.
        layers: index in the model of each MoE layer.
        host_slots: experts that fit in host memory, the others are read from disk; None: all.

    Attributes:
        read_bytes: weights of experts that the GPU and the near-data unit have read to compute with.
    """

    def __init__(
        self, store: ExpertStore, prices: ExpertPrices, executor: Any, prefetcher: Any, predictor: Any,
        layers: Sequence[int], host_slots: int | None = None,
    ) -> None:  # fmt: skip
        self.store, self.prices, self._layers = store, prices, tuple(layers)
        self._executor, self._prefetcher, self._predictor = executor, prefetcher, predictor
        self._clock = Timeline({HOST_MEMORY: prices.host_bytes_per_s}, self._ended)
        self._piece_s = prices.copy_s / PIECES if prefetcher.preempts else 0.0
        self._layer_s, self._layer_began_s = 0.0, 0.0
        self._slotless = frozenset(i for i, slots in zip(layers, store.slots_L, strict=True) if not slots)
        self._deferred: list[Task] = []
        self._done: list[_Piece] = []
        self._host = None if host_slots is None else HostLevel(host_slots)
        self._reads: dict[int, Task] = {}
        self.read_bytes = {"gpu": 0.0, "near": 0.0}

    @property
    def view(self) -> View:
        """What policies see."""
        return self.store.view

    @property
    def now_s(self) -> float:
        """Seconds since the run began."""
        return self._clock.now_s

    @property
    def busy_s(self) -> dict[str, float]:
        """Seconds that each unit has worked in."""
        return self._clock.busy_s

    def play(self, program: Program, costs: Costs, routing: Routing, on_host: Costs | None = None) -> Played:
        """Play one step; where `program` has an operation "experts", whatever the layer's experts need.

        on_host: costs on the CPU, which computes layers without a slot on the device then.
        """
        began_s = self._clock.now_s
        self.pass_step(program, costs, routing, on_host)
        return self._played(began_s)

    def pass_step(self, program: Program, costs: Costs, routing: Routing, on_host: Costs | None = None) -> float:
        """The same without a record of it; its seconds."""
        began_s, view = self._clock.now_s, self.view
        routing.begin(view)
        self._predictor.begin(view)
        if view.predicted_LE.any():
            self._send_ahead()
        self._done = [piece for piece in self._done if piece.task.finish_s == inf]
        ends: list[list[Task]] = []
        for n, op in enumerate(program.operations):
            after = [task for a in op.after for task in ends[a]]
            if op.name == "experts":
                router = next(a for a in op.after if program.operations[a].name == "router")
                ends.append(self._layer(view.layer + 1, routing, ends[router], after))
                continue
            here, unit = costs, op.resource
            if on_host is not None and op.layer in self._slotless:
                here, unit = on_host, "cpu"
            task = Task(op.name, unit, float(here.seconds_NR[n, 0]), num_bytes=float(here.bytes_NR[n, 0]))
            self._add(op.layer, task, here.shares_NX[n], after)
            ends.append([task])
        self._clock.run([*(task for tasks in ends[-1:] for task in tasks), *self._deferred])
        self._deferred = []
        self._clock.run([piece.task for piece in self._done if piece.task.name != "prefetch"])
        self._close()
        return self._clock.now_s - began_s

    def _add(self, layer: int, task: Task, shares_X: Floats, after: Sequence[Task]) -> Task:
        self._done.append(_Piece(layer, task, shares_X, after))
        return self._clock.submit(task, after)

    def _piece(
        self, name: str, layer: int, unit: str, seconds: float, shares_X: Floats, after: Sequence[Task] = (),
        **more: Any,
    ) -> Task:  # fmt: skip
        return self._add(self._layers[layer], Task(name, unit, seconds, **more), shares_X, after)

    def _layer(self, layer: int, routing: Routing, router: list[Task], after: list[Task]) -> list[Task]:
        """One layer's experts, from the moment when its router is done; what the next layer waits for."""
        clock, view, store = self._clock, self.view, self.store
        now_s = clock.run(router)
        if view.layer >= 0:
            self._close()
        self._layer_s, self._layer_began_s = now_s - self._layer_began_s if layer else self._layer_s, now_s
        routing.show(view, layer, self.prices.bytes_E > 0)
        self._predictor.look(view)
        store.used()
        places = layer * view.num_experts + view.ids
        is_here_N, is_coming_N = store.count(places)
        work = self._work(is_here_N, is_coming_N)
        ends = self._compute(layer, self._executor.plan(work), work, places)
        self._send_ahead()
        return [*after, *ends]

    def _work(self, is_here_N: NDArray[np.bool_], is_coming_N: NDArray[np.bool_]) -> Work:
        view, prices, clock = self.view, self.prices, self._clock
        return Work(
            view.ids, view.load, is_here_N, is_coming_N, prices.gpu_s(view.ids, view.load),
            prices.cpu_s(view.ids, view.load), prices.near_s(view.ids, view.load), prices.copy_s,
            prices.flops_per_byte, prices.cold_s,
            clock.queued_s("compute"), clock.left_s("cpu"), clock.left_s("h2d"),
        )  # fmt: skip

    def _compute(self, layer: int, plan: Plan, work: Work, places: Ids) -> list[Task]:
        """Queue the layer's copies and computations; what the next layer waits for."""
        view, prices, store = self.view, self.prices, self.store
        ends, self._deferred = self._deferred, []
        gpu_s, is_here_N, on_gpu_N = work.gpu_s, work.is_here, plan.unit_N == GPU
        self.read_bytes["gpu"] += float(prices.bytes_E[view.ids[on_gpu_N]].sum())
        if (is_here_N & on_gpu_N).any():
            seconds = float(gpu_s[is_here_N & on_gpu_N].sum()) + prices.launch_s
            ends.append(self._piece("experts", layer, "compute", seconds, prices.gpu_shares_X))
        on_cpu = np.flatnonzero(plan.unit_N == CPU)
        if len(on_cpu):
            ends += self._on_cpu(layer, on_cpu, work.cpu_s, plan.deferred)
        on_near = plan.unit_N == NEAR
        if on_near.any():
            is_beside = not is_here_N[on_near].all()
            seconds = prices.near_start_s(int(view.load[on_near].sum()), is_beside)
            seconds += float(work.near_s[on_near].sum())
            num_bytes = float(prices.bytes_E[view.ids[on_near]].sum())
            self.read_bytes["near"] += num_bytes
            ends.append(self._piece("near_experts", layer, "near", seconds, prices.near_shares_X, num_bytes=num_bytes))
        copies: dict[int, Task] = {}
        kept = store.make_room([int(places[n]) for n in plan.copies])
        for i, n in enumerate(plan.copies):
            copies[n] = self._copy("expert_copies", [int(places[n])], 0.0, plan.shares[i] if plan.shares else 1.0)
            if i < kept:
                store.send([int(places[n])], copies[n], is_early=False)
        for n in np.flatnonzero(on_gpu_N & ~is_here_N).tolist():
            place = int(places[n])
            if work.is_coming[n]:
                copies[n] = store.coming.get(place) or store.stages[place]
                if place in self._reads:
                    self._clock.urge(self._reads[place], 0.0)
                self._clock.urge(copies[n], 0.0)
            ends.append(
                self._piece(
                    "experts", layer, "compute", float(gpu_s[n]) + prices.launch_s, prices.gpu_shares_X, [copies[n]]
                )
            )
        return ends

    def _on_cpu(self, layer: int, on_cpu: Ids, cpu_s: Floats, deferred: frozenset[int]) -> list[Task]:
        """One burst of experts on the CPU, and one of those that are deferred."""
        view, prices = self.view, self.prices
        ends: list[Task] = []
        cold_s = prices.cold_s + prices.hop_s
        for later in (False, True):
            mine = [n for n in on_cpu.tolist() if (n in deferred) == later]
            if not mine:
                continue
            seconds, num_bytes = float(cpu_s[mine].sum()) + cold_s, float(prices.bytes_E[view.ids[mine]].sum())
            read = self._read(layer, (layer * view.num_experts + view.ids[mine]).tolist(), 0.0)
            task = self._piece(
                "cpu_experts", layer, "cpu", seconds, prices.cpu_shares_X, read, memory=HOST_MEMORY,
                demand=num_bytes / seconds, num_bytes=num_bytes,
            )  # fmt: skip
            (self._deferred if later else ends).append(task)
            cold_s = 0.0
        return ends

    def _copy(self, name: str, places: Sequence[int], priority: float, share: float = 1.0) -> Task:
        """Experts of one layer over the host link, or a share of the bytes of one."""
        prices, (layer, expert) = self.prices, divmod(places[0], self.view.num_experts)
        num_bytes = share * float(prices.bytes_E[expert])
        if len(places) > 1:
            num_bytes = float(prices.bytes_E[np.asarray(places) % self.view.num_experts].sum())
        return self._piece(
            name, layer, "h2d", prices.start_s + num_bytes / prices.copy_bytes_per_s, prices.copy_shares_X,
            self._read(layer, places, priority, share), priority=priority, memory=HOST_MEMORY,
            demand=prices.copy_bytes_per_s, piece_s=self._piece_s if priority else 0.0, num_bytes=num_bytes,
            tag=tuple(places),
        )  # fmt: skip

    def _read(self, layer: int, places: Sequence[int], priority: float, share: float = 1.0) -> list[Task]:
        """The read from disk that experts of one layer wait for, if any."""
        if self._host is None:
            return []
        prices, lacking = self.prices, self._host.read(places)
        if not lacking:
            pending = [self._reads[p] for p in places if p in self._reads and not self._reads[p].is_done]
            for read in pending if priority == 0 else ():
                self._clock.urge(read, 0.0)
            return pending
        num_bytes = share * float(prices.bytes_E[np.asarray(lacking) % self.view.num_experts].sum())
        seconds = prices.disk_start_s + num_bytes / prices.disk_bytes_per_s
        read = self._piece(
            "disk_reads", layer, "disk", seconds, prices.copy_shares_X, priority=priority, memory=HOST_MEMORY,
            demand=prices.disk_bytes_per_s, num_bytes=num_bytes, tag=tuple(places),
        )  # fmt: skip
        self._reads.update(dict.fromkeys(lacking, read))
        return [read]

    def _send_ahead(self) -> None:
        """Queue what the prefetcher chooses, and give up what waits and is not chosen again."""
        store, clock, prefetcher = self.store, self._clock, self._prefetcher
        outlook = Outlook(self.prices, self._layer_s, clock.queued_s("h2d", 0.0))
        chosen = list(prefetcher.choose(self.view, outlook))
        if store.coming or store.stages:
            self._give_up(set(chosen))
        if not chosen:
            return
        places = np.array(chosen)
        new_N = ~self.view.held_P[places] & (self.prices.bytes_E[places % self.view.num_experts] > 0)
        fresh = places[new_N].tolist()
        if store.stages:
            fresh = [p for p in fresh if p not in store.stages]
        if prefetcher.stages:
            for place in fresh[: prefetcher.stages - len(store.stages)]:
                store.stage(place, self._copy("prefetch", [place], 1.0))
            return
        E = self.view.num_experts
        by_layer: dict[int, list[int]] = {}
        for place in fresh:
            by_layer.setdefault(place // E, []).append(place)
        kept: set[int] = set()
        for group in by_layer.values():
            kept.update(group[: store.make_room(group, chosen)])
        if prefetcher.bulk:
            sent = [[p for p in group if p in kept] for group in by_layer.values()]
        else:
            sent = [[p] for p in fresh if p in kept]
        for rank, group in enumerate(sent, 1):
            if group:
                store.send(group, self._copy("prefetch", group, float(rank)), is_early=True)

    def _give_up(self, wanted: set[int]) -> None:
        """Take copies out of the queue that nobody has begun or wants any longer."""
        gone: list[Task] = []
        for unit in ("disk", "h2d") if self._host else ("h2d",):
            gone += self._clock.withdraw(unit, lambda task: task.priority == 0 or not wanted.isdisjoint(_places(task)))
            if unit == "disk" and self._host is not None:
                self._host.forget([place for task in gone for place in _places(task)])
        if gone:
            self.store.give_up([place for task in gone for place in _places(task)])

    def _close(self) -> None:
        """The layer is over: what it needed may leave; experts in buffers move to slots or are dropped."""
        store, view = self.store, self.view
        if store.stages:
            first = view.layer * view.num_experts
            needed = set((first + view.ids).tolist())
            for place in [p for p in store.stages if p < first + view.num_experts]:
                del store.stages[place]
                if place in needed:
                    store.make_room([place])
        store.release()

    def _ended(self, task: Task) -> None:
        if task.unit == "h2d" and self.store.coming:
            self.store.arrived(_places(task))

    def _played(self, began_s: float) -> Played:
        """What happened since `began_s`, with what still runs cut off at the end."""
        now_s = self._clock.now_s
        kept = []  # when it began or went on, until when, and the piece
        for piece in self._done:
            task = piece.task
            kept += [(start, stop, piece) for start, stop in task.spans if stop > began_s]
            if task.since_s <= now_s:
                kept.append((task.since_s, min(task.finish_s, now_s), piece))
        kept.sort(key=_began_s)
        number: dict[int, int] = {}  # of the last operation of each task
        operations, start_N, finish_N, bytes_N = [], [], [], []
        for n, (start, stop, (layer, task, _, after)) in enumerate(kept):
            waits = tuple([number[id(a)] for a in after if id(a) in number]) if after else ()
            if id(task) in number:  # it was interrupted
                waits = (number[id(task)],)
            number[id(task)] = n
            operations.append(Operation(task.name, layer, task.unit, "rank", waits))
            start_N.append(max(start, began_s) - began_s)
            finish_N.append(stop - began_s)
            bytes_N.append(task.num_bytes if task.finish_s == stop else 0.0)
        start_N1, finish_N1 = np.array(start_N)[:, None], np.array(finish_N)[:, None]
        shares_NX = np.array([piece.shares_X for _, _, piece in kept])
        costs = Costs(finish_N1 - start_N1, np.array(bytes_N)[:, None], shares_NX)
        parts = part_names(operations)
        return Played(tuple(operations), costs, start_N1, finish_N1, parts, part_indices(operations, parts))


def _began_s(span: tuple[float, float, _Piece]) -> float:
    return span[0]
