"""When a search stops: after so many seconds, or when somebody asks it to (Ctrl-C), with what it has by then."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Clock:
    """Seconds since it was made; methods ask `is_over` between short pieces of work."""

    def __init__(self, limit_s: float = math.inf) -> None:
        self.limit_s = limit_s
        self.was_asked = False
        self._start = time.perf_counter()

    @property
    def spent_s(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start

    @property
    def left_s(self) -> float:
        """Seconds to the limit, 0 where somebody has asked to stop."""
        return 0.0 if self.was_asked else max(0.0, self.limit_s - self.spent_s)

    @property
    def is_over(self) -> bool:
        """Whether to stop now."""
        return self.left_s <= 0

    @property
    def why(self) -> str:
        """What cut the search short, "" where nothing has yet."""
        return "interrupted" if self.was_asked else "time limit" if self.is_over else ""

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What is done inside does not count."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    @contextmanager
    def asked_by_ctrl_c(self) -> Iterator[None]:
        """Ctrl-C asks this clock to stop, the first time; the second one interrupts as ever."""

        def ask(_number: int, _frame: FrameType | None) -> None:
            self.was_asked = True
            signal.signal(signal.SIGINT, before)

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
