"""The clock of one machine: units that work, one task each at a time, and memories whose bandwidth they share.

A task runs on one unit (GPU, CPU, copy engine, near-data unit, disk) and may read a shared memory while it does.
Running tasks that together want more of a memory than it has get max-min fair shares of it and slow down in
proportion; so copies to the GPU and experts computed by the CPU hold each other up, as both read DRAM. Of the tasks
that are ready, a unit takes the one of the lowest priority number, the earlier one of two. A task that can be cut in
pieces gives way to a more urgent one after the piece that is on its way.

SimPy is not used here: what changes in the middle of a task is its speed, not its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from heapq import heapify, heappop, heappush
from math import inf

_DONE_S = 1e-15  # less than this is left: nothing


class Task:
    """Work of one unit.

    Attributes:
        unit: which unit works on it.
        seconds: how long it takes when nothing slows it down.
        memory, demand: shared memory that it reads, and bytes a second when nothing slows it down.
        piece_s: it can be interrupted whenever it has run for a multiple of so many seconds; 0: never.
        start_s, finish_s: when it first began and when it ended; infinite before.
        since_s: when it began or went on; infinite while it waits. spans: before that, from when to when it ran.
        tag: what its owner wants to remember of it.
    """

    __slots__ = (
        "demand", "finish_s", "left_s", "memory", "name", "num_bytes", "piece_s", "priority", "rate", "seconds",
        "since_s", "spans", "start_s", "stop_s", "tag", "then", "unit", "waiting",
    )  # fmt: skip

    def __init__(
        self, name: str, unit: str, seconds: float, priority: float = 0.0, memory: str = "", demand: float = 0.0,
        piece_s: float = 0.0, num_bytes: float = 0.0, tag: object = None,
    ) -> None:  # fmt: skip
        self.name, self.unit, self.seconds, self.priority = name, unit, seconds, priority
        self.memory, self.demand, self.piece_s, self.num_bytes, self.tag = memory, demand, piece_s, num_bytes, tag
        self.left_s, self.stop_s, self.rate = seconds, 0.0, 1.0
        self.start_s = self.finish_s = self.since_s = inf
        self.waiting = 0
        self.then: list[Task] = []
        self.spans: list[tuple[float, float]] = []

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return self.finish_s < inf


class Timeline:
    """Tasks over units and shared memories.

    Args:
        memories: name -> bytes a second that a shared memory has.
        on_finish: told of every task that ends, at its end.
    """

    def __init__(self, memories: Mapping[str, float] | None = None, on_finish: Callable[[Task], None] | None = None):
        self.now_s = 0.0
        self.busy_s: dict[str, float] = {}
        self._memories = dict(memories or {})
        self._on_finish = on_finish
        self._running: dict[str, Task] = {}
        self._ready: dict[str, list[tuple[float, int, Task]]] = {}
        self._count = 0
        self._is_stale = False  # rates must be computed anew

    def submit(self, task: Task, after: Iterable[Task] = ()) -> Task:
        """Give a task to its unit, to start when all that it waits for has ended.

        Raises:
            RuntimeError: it would never end.
        """
        if not task.seconds < inf:
            raise RuntimeError(f"task {task.name!r} on {task.unit!r} takes {task.seconds} s: there is no such unit")
        for other in after:
            if other.finish_s == inf:
                other.then.append(task)
                task.waiting += 1
        if not task.waiting:
            self._enqueue(task)
        return task

    def urge(self, task: Task, priority: float) -> None:
        """Change the priority of a task that may be waiting in its queue."""
        if task.is_done or task.priority == priority:
            return
        task.priority = priority
        queue = self._ready.get(task.unit, [])
        if any(entry[2] is task for entry in queue):
            self._ready[task.unit] = [entry for entry in queue if entry[2] is not task]
            heapify(self._ready[task.unit])
            self._enqueue(task)

    def withdraw(self, unit: str, keep: Callable[[Task], bool]) -> list[Task]:
        """Take tasks out of a unit's queue that have not begun and that `keep` does not want; they never run, nor does
        what waits for them.

        Returns:
            them; they count as done, long ago.
        """
        queue = self._ready.get(unit, [])
        out = [task for _, _, task in queue if task.start_s == inf and not keep(task)]
        for task in out:
            for gone in (task, *task.then):
                gone.finish_s = -inf
        if out:
            self._ready[unit] = [entry for entry in queue if entry[2].finish_s == inf]
            heapify(self._ready[unit])
        return out

    def queued_s(self, unit: str, most: float = inf) -> float:
        """Seconds of work that a unit has before it, of what is ready and of no higher priority number than `most`."""
        running = self._running.get(unit)
        left_s = running.left_s if running else 0.0
        return left_s + sum(task.left_s for priority, _, task in self._ready.get(unit, ()) if priority <= most)

    def left_s(self, unit: str) -> float:
        """Seconds until the task that a unit is working on ends."""
        running = self._running.get(unit)
        return running.left_s if running else 0.0

    def run(self, until: Iterable[Task]) -> float:
        """Let time pass until all of the tasks have ended, and return the time.

        Raises:
            RuntimeError: they wait for tasks that nobody has submitted.
        """
        for task in until:
            while task.finish_s == inf:
                if not self._running:
                    raise RuntimeError(f"task {task.name!r} waits for something that was never submitted")
                self._advance()
        return self.now_s

    def drain(self) -> None:
        """Let time pass until nothing runs."""
        while self._running:
            self._advance()

    def _enqueue(self, task: Task) -> None:
        running, queue = self._running.get(task.unit), self._ready.setdefault(task.unit, [])
        if running is None and not queue:
            self._begin(task)
            return
        self._count += 1
        heappush(queue, (task.priority, self._count, task))
        if running is None:
            self._begin(heappop(queue)[2])
        elif running.piece_s and running.priority > task.priority:
            pieces_left = int(running.left_s / running.piece_s)
            running.stop_s = max(running.stop_s, pieces_left * running.piece_s)

    def _begin(self, task: Task) -> None:
        self._running[task.unit] = task
        task.since_s = self.now_s
        if task.start_s == inf:
            task.start_s = self.now_s
        task.stop_s, task.rate = 0.0, 1.0
        if task.memory:
            self._is_stale = True

    def _share(self) -> None:
        """Max-min fair shares of every memory among the running tasks that read it."""
        self._is_stale = False
        for memory, capacity in self._memories.items():
            users, wanted = [], 0.0
            for task in self._running.values():
                if task.memory == memory:
                    users.append(task)
                    wanted += task.demand
                    task.rate = 1.0
            if wanted <= capacity:
                continue
            users.sort(key=lambda task: task.demand)
            left = capacity
            for i, task in enumerate(users):
                share = min(task.demand, left / (len(users) - i))
                task.rate = share / task.demand
                left -= share

    def _advance(self) -> None:
        """To the next end of a task or piece."""
        if self._is_stale:
            self._share()
        running = self._running
        step_s = inf
        for task in running.values():
            left_s = (task.left_s - task.stop_s) / task.rate
            if left_s < step_s:
                step_s = left_s
        self.now_s += step_s
        ended = []
        for task in running.values():
            task.left_s -= step_s * task.rate
            if task.left_s - task.stop_s <= _DONE_S:
                ended.append(task)
        for task in ended:
            self._stop(task)

    def _stop(self, task: Task) -> None:
        unit = task.unit
        if task.memory:
            self._is_stale = True
        del self._running[unit]
        self.busy_s[unit] = self.busy_s.get(unit, 0.0) + self.now_s - task.since_s
        if task.stop_s > _DONE_S:
            self._enqueue_again(task)
        else:
            task.left_s, task.finish_s = 0.0, self.now_s
            if self._on_finish is not None:
                self._on_finish(task)
            for other in task.then:
                other.waiting -= 1
                if not other.waiting:
                    self._enqueue(other)
        queue = self._ready.get(unit)
        if queue and unit not in self._running:
            self._begin(heappop(queue)[2])

    def _enqueue_again(self, task: Task) -> None:
        task.spans.append((task.since_s, self.now_s))
        task.since_s = inf
        self._count += 1
        heappush(self._ready.setdefault(task.unit, []), (task.priority, -self._count, task))
