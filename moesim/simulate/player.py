"""Playing one program on SimPy: an event for each operation and rank, queues where a resource is shared."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.program.operation import Costs, Played, Program

Floats = NDArray[np.float64]


class Player:
    """One program in play. `done` is the event that its last operation triggers.

    Args:
        shared: the queue of each resource in `program.shared`; several programs in play may share them.
    """

    def __init__(
        self,
        env: simpy.Environment,
        program: Program,
        costs: Costs,
        shared: Mapping[str, simpy.Resource] | None = None,
    ) -> None:
        self._env, self._program, self._begin_s = env, program, env.now
        self._shared = dict(shared or {name: simpy.Resource(env, n) for name, n in program.shared.items()})
        self.done = env.event()
        self._costs = costs
        shape = len(program.operations), program.num_ranks
        self._start_NR, self._finish_NR = np.zeros(shape), np.zeros(shape)
        self._finished_NR = np.array([program.groups[op.group] < 0 for op in program.operations]).reshape(shape)
        self._waiters: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self._running = 0
        for n in range(len(program.operations)):
            self._arm(n)
        if not self._running:
            self.done.succeed()

    def _arm(self, n: int) -> None:
        """Let operation n start, in each of its groups, when all that it waits for has finished there."""
        op = self._program.operations[n]
        for ranks in self._program.members[op.group]:
            self._running += 1
            open_pairs = [(a, int(r)) for r in ranks for a in op.after if not self._finished_NR[a, r]]
            if not open_pairs:
                self._begin(n, ranks)
                continue
            left = [len(open_pairs)]

            def one_less(left: list[int] = left, ranks: NDArray[np.int64] = ranks) -> None:
                left[0] -= 1
                if not left[0]:
                    self._begin(n, ranks)

            for pair in open_pairs:
                self._waiters.setdefault(pair, []).append(one_less)

    def _begin(self, n: int, ranks: NDArray[np.int64]) -> None:
        resource = self._program.operations[n].resource
        if resource in self._shared:
            self._env.process(self._queue(n, resource, ranks))
        else:
            self._run(n, ranks)

    def _queue(self, n: int, resource: str, ranks: NDArray[np.int64]) -> Generator[Any, Any, None]:
        """Hold one unit of a shared resource for as long as the slowest rank of the group needs it."""
        with self._shared[resource].request() as turn:
            yield turn
            ended = self._run(n, ranks)
            yield self._env.all_of(ended)

    def _run(self, n: int, ranks: NDArray[np.int64]) -> list[simpy.Event]:
        ended: list[simpy.Event] = []
        left = [len(ranks)]
        for r in ranks:
            self._start_NR[n, r] = self._env.now - self._begin_s
            event = self._env.timeout(float(self._costs.seconds_NR[n, r]))

            def finish(_: simpy.Event, r: int = int(r), left: list[int] = left) -> None:
                left[0] -= 1
                self._end(n, r, last=not left[0])

            event.callbacks.append(finish)
            ended.append(event)
        return ended

    def _end(self, n: int, rank: int, last: bool) -> None:
        self._finish_NR[n, rank] = self._env.now - self._begin_s
        self._finished_NR[n, rank] = True
        for wake in self._waiters.pop((n, rank), ()):
            wake()
        if last:
            self._running -= 1
            if not self._running:
                self.done.succeed()

    def played(self) -> Played:
        """The step as it ran; meaningful once `done` has happened."""
        program = self._program
        return Played(program.operations, self._costs, self._start_NR, self._finish_NR, program.parts, program.part_N)
