"""KV caches that travel between instances: transfers share each instance's ports, and finish one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moesim.network.fair import fair_rates
from moesim.network.routes import Routes

Floats = NDArray[np.float64]


@dataclass(eq=False)
class KvLinks:
    """Transfers under way between I instances, as fluids with max-min fair shares of the ports; exact.

    A port is all NICs of an instance together, in one direction. Latency is not in it: who waits for a transfer adds
    it to the time that a transfer ends.

    Attributes:
        egress_bytes_per_s_I, ingress_bytes_per_s_I: of each instance's ports, above 0.
        now_s: the last time that anything was asked or started.

    Raises:
        ValueError: a port without bandwidth.
    """

    egress_bytes_per_s_I: Floats
    ingress_bytes_per_s_I: Floats
    now_s: float = 0.0
    _ends: dict[int, tuple[int, int]] = field(default_factory=dict, repr=False)
    _left: dict[int, float] = field(default_factory=dict, repr=False)
    _rate: dict[int, float] = field(default_factory=dict, repr=False)
    _done: list[int] = field(default_factory=list, repr=False)
    _next: int = 0
    _is_shared: bool = False

    def __post_init__(self) -> None:
        self._ports_K = np.concatenate([self.egress_bytes_per_s_I, self.ingress_bytes_per_s_I]).astype(np.float64)
        if len(self.egress_bytes_per_s_I) != len(self.ingress_bytes_per_s_I) or not (self._ports_K > 0).all():
            raise ValueError("KV links: every instance needs egress and ingress with a bandwidth above 0 bytes/s")

    def start(self, now_s: float, source: int, target: int, num_bytes: float) -> int:
        """Begin a transfer; its number, by which `finished` names it.

        Raises:
            ValueError: ends that are no two instances, less than 0 bytes, or a time that is past.
        """
        num = len(self.egress_bytes_per_s_I)
        if not (0 <= source < num and 0 <= target < num and source != target):
            raise ValueError(
                f"KV transfer: must go between two of instances 0 to {num - 1}, given {source} to {target}"
            )
        if not 0 <= num_bytes < math.inf:
            raise ValueError(f"KV transfer: must have 0 bytes or more, given {num_bytes}")
        self._advance(now_s)
        number = self._next
        self._next += 1
        if num_bytes == 0:
            self._done.append(number)
            return number
        self._ends[number], self._left[number] = (source, target), float(num_bytes)
        self._is_shared = False
        return number

    def next_finish_s(self) -> float:
        """When the next transfer ends if none starts before; infinite where none is under way."""
        if self._done:
            return self.now_s
        self._share()
        return self.now_s + min((left / self._rate[n] for n, left in self._left.items()), default=math.inf)

    def finished(self, now_s: float) -> list[int]:
        """Transfers that have ended by now and were not named before, in the order in which they ended."""
        self._advance(now_s)
        done, self._done = self._done, []
        return done

    def cancel(self, now_s: float, number: int) -> float:
        """End a transfer without its having arrived (an instance went down); the bytes that were still to go."""
        self._advance(now_s)
        left = self._left.pop(number, 0.0)
        if self._ends.pop(number, None) is not None:
            self._is_shared = False
        return left

    def _advance(self, now_s: float) -> None:
        """Let transfers flow up to a time; whenever one ends, the others share anew."""
        if now_s < self.now_s:
            raise ValueError(f"KV links: it is {self.now_s} s already, asked for {now_s} s")
        if now_s == self.now_s:
            return
        while self._left:
            self._share()
            needs_s = {n: left / self._rate[n] for n, left in self._left.items()}
            step_s = min(needs_s.values())
            if self.now_s + step_s > now_s:
                break
            # Transfers that end within rounding of each other end together.
            ended = sorted(n for n, need_s in needs_s.items() if need_s <= step_s * (1 + 1e-12))
            self._flow(step_s)
            self.now_s += step_s
            for number in ended:
                del self._left[number], self._ends[number]
            self._done += ended
            self._is_shared = False
        self._flow(now_s - self.now_s)
        self.now_s = now_s

    def _flow(self, seconds: float) -> None:
        for number in self._left:
            self._left[number] -= self._rate[number] * seconds

    def _share(self) -> None:
        """Fair shares of all that are under way; those that start together share once."""
        if self._is_shared or not self._ends:
            return
        self._is_shared = True
        ends_FK = np.array(list(self._ends.values()), np.int64)
        ends_FK[:, 1] += len(self.egress_bytes_per_s_I)
        routes = Routes(np.arange(0, ends_FK.size + 1, 2), ends_FK.ravel(), len(self._ports_K))
        self._rate = dict(zip(self._ends, fair_rates(routes, self._ports_K).tolist(), strict=True))


def left_after_prefill_bytes(num_bytes: float, num_layers: int, prefill_s: float, bytes_per_s: float) -> float:
    """Bytes of a KV cache still to be sent when its prefill ends, if each layer is sent as soon as it is computed.

    Layers take equal time and equal bytes and are sent one after the other; the last one can only follow the end.
    Without overlap it is all of `num_bytes`.

    Source: layer-wise transfer of Splitwise (arXiv 2311.18677) and Mooncake (arXiv 2407.00079).

    >>> left_after_prefill_bytes(100.0, 10, 10.0, 1000.0), left_after_prefill_bytes(100.0, 10, 10.0, 5.0)
    (10.0, 55.0)
    """
    layer_bytes = num_bytes / num_layers
    sending_s = prefill_s * (num_layers - 1) / num_layers  # from the end of the first layer on
    return max(layer_bytes, num_bytes - bytes_per_s * sending_s)
