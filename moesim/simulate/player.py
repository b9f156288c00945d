"""Playing one program on SimPy: an event for each operation and rank, queues where a resource is shared."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.program.operation import Choice, Costs, Operation, Played, Program
from moesim.program.walk import assemble

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
        self._operations: list[Operation | Choice] = []
        self._seconds: list[Floats] = []
        self._bytes: list[Floats] = []
        self._shares: list[Floats] = []
        self._start: list[Floats] = []
        self._finish: list[Floats] = []
        self._finished: list[NDArray[np.bool_]] = []
        self._waiters: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self._running = 0
        self._take_part = {name: group_R >= 0 for name, group_R in program.groups.items()}
        # Everything is written down before anything starts, so that a choice finds the ids it expects.
        for n, op in enumerate(program.operations):
            self._write(op, costs.seconds_NR[n], costs.bytes_NR[n], costs.shares_NX[n])
        for n in range(len(program.operations)):
            self._arm(n)
        if not self._running:
            self.done.succeed()

    def _write(self, op: Operation | Choice, seconds_R: Floats, bytes_R: Floats, shares_X: Floats) -> None:
        num_ranks = self._program.num_ranks
        self._operations.append(op)
        self._seconds.append(seconds_R)
        self._bytes.append(bytes_R)
        self._shares.append(shares_X)
        self._start.append(np.zeros(num_ranks))
        self._finish.append(np.zeros(num_ranks))
        takes_part = np.arange(num_ranks) == op.rank if isinstance(op, Choice) else self._take_part[op.group]
        self._finished.append(~takes_part)

    def _arm(self, n: int, only: int | None = None) -> None:
        """Let operation n start, in each of its groups, when all that it waits for has finished there."""
        op = self._operations[n]
        if isinstance(op, Choice):
            members: tuple[NDArray[np.int64], ...] = (np.array([op.rank]),)
        else:
            members = (np.array([only]),) if only is not None else self._program.members[op.group]
        for ranks in members:
            self._running += 1
            open_pairs = [(a, int(r)) for r in ranks for a in op.after if not self._finished[a][r]]
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
        op = self._operations[n]
        if isinstance(op, Choice):
            self._expand(n, op)
        elif op.resource in self._shared:
            self._env.process(self._queue(n, op.resource, ranks))
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
            self._start[n][r] = self._env.now - self._begin_s
            event = self._env.timeout(float(self._seconds[n][r]))

            def finish(_: simpy.Event, r: int = int(r), left: list[int] = left) -> None:
                left[0] -= 1
                self._end(n, r, last=not left[0])

            event.callbacks.append(finish)
            ended.append(event)
        return ended

    def _end(self, n: int, rank: int, last: bool) -> None:
        self._finish[n][rank] = self._env.now - self._begin_s
        self._finished[n][rank] = True
        for wake in self._waiters.pop((n, rank), ()):
            wake()
        if last:
            self._running -= 1
            if not self._running:
                self.done.succeed()

    def _expand(self, n: int, choice: Choice) -> None:
        self._start[n][choice.rank] = self._env.now - self._begin_s
        first = len(self._operations)
        fragment = choice.expand(n, first)
        alone = np.zeros(self._program.num_ranks)
        alone[choice.rank] = 1.0
        for i, op in enumerate(fragment.operations):
            self._write(op, alone * fragment.seconds[i], alone * fragment.num_bytes[i], fragment.shares[i])
            self._finished[-1] = alone == 0
        for i in range(len(fragment.operations)):
            self._arm(first + i, only=choice.rank)
        pending = [j for j in fragment.join if not self._finished[j][choice.rank]]
        left = [len(pending)]

        def joined() -> None:
            left[0] -= 1
            if left[0] <= 0:
                self._end(n, choice.rank, last=True)

        if not pending:
            joined()
        for j in pending:
            self._waiters.setdefault((j, choice.rank), []).append(joined)

    def played(self) -> Played:
        """The step as it ran; meaningful once `done` has happened."""
        return assemble(
            self._operations, np.array(self._seconds), np.array(self._bytes), np.array(self._shares),
            np.array(self._start), np.array(self._finish),
        )  # fmt: skip
