"""Seconds of a model's operators on one device, and what they rest on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.costs import compute, network
from moesim.costs.calibration import Calibration
from moesim.costs.measured import Interpolated, MeasuredTables
from moesim.costs.measured_experts import experts_format, experts_seconds
from moesim.hardware import SOURCES, Cluster, Device
from moesim.mixers import Attention, LatentAttention, Mixer
from moesim.model import BYTES_PER_PARAM, Experts
from moesim.routing.counting import summed_slots

Floats = NDArray[np.float64]
FITTED = SOURCES.index("fitted")


@dataclass(frozen=True, eq=False)
class Timed:
    """Seconds of some work, an array, and how many of them (mean over its entries) rest on each of `SOURCES`, [X]."""

    seconds: Floats
    rests_X: Floats

    @classmethod
    def of(cls, seconds: Floats | float, source: int) -> Timed:
        """Seconds that rest on one of `SOURCES` alone."""
        rests_X = np.zeros(len(SOURCES))
        array = np.asarray(seconds, np.float64)
        rests_X[source] = array.sum() / max(array.size, 1)
        return cls(array, rests_X)

    def __add__(self, other: Timed) -> Timed:
        return Timed(self.seconds + other.seconds, self.rests_X + other.rests_X)

    def repeated(self, times: int) -> Timed:
        """Each entry along the last axis several times in a row."""
        return self if times == 1 else Timed(np.repeat(self.seconds, times, axis=-1), self.rests_X)

    def taken(self, index: Sequence[int] | slice) -> Timed:
        """Entries along the first axis."""
        return Timed(self.seconds[index if isinstance(index, slice) else list(index)], self.rests_X)

    def scaled(self, factor: float) -> Timed:
        """Times a fitted factor: what rested on measurements alone is fitted now."""
        rests_X = factor * self.rests_X
        rests_X[FITTED] += rests_X[:FITTED].sum()
        rests_X[:FITTED] = 0
        return Timed(factor * self.seconds, rests_X)

    @property
    def shares_X(self) -> Floats:
        """Share of the seconds that rests on each of `SOURCES`; all 0 where there are none."""
        total = self.rests_X.sum()
        return self.rests_X / total if total else self.rests_X


def stacked(parts: Sequence[Timed]) -> Timed:
    """Several works of one shape along a new first axis."""
    return Timed(np.stack([part.seconds for part in parts]), np.mean([part.rests_X for part in parts], axis=0))


@dataclass(frozen=True, eq=False)
class Operators:
    """The operators of one device: from measured tables where there are any, from rooflines elsewhere.

    A time that a table gives inside of what was measured is *measured*; outside, where the table's own fitted roofline
    carries it on, it is *fitted*. The ends are those of the table's 90 % interval.

    bound: "value", or the "low" or "high" end of what is believed of the device's speed.
    calibration: factors fitted to real runs, which every time is multiplied by.
    attends: unit that attends to the caches of what is decoded, None: the device.
    """

    device: Device
    bound: str = "value"
    tables: MeasuredTables = field(default_factory=MeasuredTables)
    calibration: Calibration | None = None
    attends: Device | None = None

    def _calibrated(self, timed: Timed, name: str) -> Timed:
        return timed if self.calibration is None else timed.scaled(self.calibration.values[name])

    def matmuls(self, shapes: Sequence[tuple[int, int]], rows: Floats, weight_dtype: str, value_bytes: float) -> Timed:
        """Products of `rows` rows with weights (n, k), one after another; none for 0 rows.

        Without a table "gemm" each is on its own roofline: max(2 rows n k / peak, (n k weight bytes + rows (n + k)
        value_bytes) / bandwidth).
        """
        rows = np.asarray(rows, np.float64)
        table, busy = self.tables.find("gemm", weight_dtype), rows > 0
        total = Timed(np.zeros_like(rows), np.zeros(len(SOURCES)))
        for n, k in shapes:
            if table:
                total += self._measured(table.seconds({"m": np.maximum(rows, 1.0), "n": n, "k": k}), busy)
                continue
            num_bytes = n * k * BYTES_PER_PARAM[weight_dtype] + rows * (n + k) * value_bytes
            seconds = compute.gemm_s(2.0 * n * k * rows, num_bytes, self.device, weight_dtype, bound=self.bound)
            total += self._roofline(seconds * busy, "gemm")
        return self._calibrated(total, "gemm_factor")

    def experts(
        self, load_LRS: NDArray[np.int32], params_LRS: Floats, ffn: Experts, hidden_size: int, weight_dtype: str
    ) -> Timed:
        """Grouped product of the experts of each rank with its launches, [L, R].

        Tables "moe" and "grouped_gemm" are of gated experts that are all alike; other ones, and all without a table,
        are on rooflines: see `compute.experts_s`.

        Args:
            params_LRS: parameters of the expert, or of the slice of one, in each slot.
        """
        tabled = experts_format(self.tables, weight_dtype)
        if tabled and ffn.gated and len(set(ffn.expert_widths)) == 1:
            inter = int(params_LRS.max() // (3 * hidden_size))
            found = experts_seconds(self.tables, load_LRS, hidden_size, inter, ffn.top_k, ffn.num_experts, tabled)
            return self._calibrated(self._measured(found, load_LRS.sum(axis=-1) > 0), "experts_factor")
        seconds = compute.experts_s(load_LRS, params_LRS, hidden_size, self.device, weight_dtype, self.bound)
        grouped = self._calibrated(self._roofline(seconds, "grouped_gemm"), "experts_factor")
        busy_LR = (summed_slots(load_LRS) > 0).astype(np.float64)
        return grouped + self.launches(2.0 if busy_LR.all() else 2.0 * busy_LR)

    def attention_core(
        self, mixer: Mixer, phase: str, requests: Floats, tokens: Floats, flops: Floats, num_bytes: Floats, tp: int,
        kv_dtype: str,
    ) -> Timed:  # fmt: skip
        """Scores and weighted sum over the cache, for batches of requests.

        With a table, its ratio of measured to roofline at the mean length is taken to the roofline of the batch's own
        FLOP and bytes; without one: see `compute.attention_core_s`.

        Args:
            requests: in each batch.
            tokens: of each batch that are in its prompts (prefill) or caches (decode), within the window.
        """
        if self.attends is not None and phase == "decode":
            seconds = compute.attention_core_s(flops, num_bytes, self.attends, self.bound)
            return Timed.of(seconds, compute.source(self.attends, "attention", "memory"))
        where = attention_coordinates(mixer, phase, requests, tokens, tp) if self.tables.tables else None
        if where is not None:
            op, coordinates = where
            dtype = kv_dtype if phase == "decode" else "bf16"
            window = str(getattr(mixer, "window", None) or 0)
            table = self.tables.find(op, dtype, window=window) or (
                self.tables.find(op, dtype) if window == "0" else None
            )
            if table and set(table.axes) == set(coordinates):
                found = self._measured(table.seconds(coordinates, (flops, num_bytes)), requests > 0)
                return self._calibrated(found, "attention_factor")
        found = self._roofline(compute.attention_core_s(flops, num_bytes, self.device, self.bound), "attention")
        return self._calibrated(found, "attention_factor")

    def launches(self, number: Floats | float) -> Timed:
        """Time to start as many kernels."""
        return self._calibrated(self._starts(number, 0.0), "launch_factor")

    def collective_start(self, size: int, cluster: Cluster, phases: int = 1) -> Timed:
        """Time to start one collective among `size` neighbouring ranks: its kernel, and the latency of each phase."""
        name = "collective_start_factor" if size <= cluster.devices_per_node else "internode_start_factor"
        return self._calibrated(self._starts(1.0, phases * network.latency_s(size, cluster)), name)

    def collective(self, seconds: Floats | float) -> Timed:
        """Seconds of a collective's bytes on its links."""
        return self._calibrated(self._link(seconds), "collective_factor")

    def host_copy(self, num_bytes: float, cluster: Cluster) -> Timed:
        """A copy from host memory to the device, with its start."""
        moved = self._link(network.copy_s(num_bytes, cluster, self.bound))
        return moved + self._starts(1.0, cluster.host_link.latency_s)

    def host_overhead(self) -> Timed:
        """Work of the host in an iteration that no kernel hides; nothing is known of it without a calibration."""
        return Timed.of(self.calibration.values["iteration_overhead_s"] if self.calibration else 0.0, FITTED)

    def _starts(self, number: Floats | float, latency_s: float) -> Timed:
        seconds = number * compute.launch_s(self.device, self.bound) + latency_s
        return Timed.of(seconds, compute.launch_source(self.device))

    def _link(self, seconds: Floats | float) -> Timed:
        return Timed.of(seconds, compute.source(self.device, "network"))

    def _roofline(self, seconds: Floats, kind: str) -> Timed:
        return Timed.of(seconds, compute.source(self.device, kind, "memory"))

    def _measured(self, found: Interpolated, busy: NDArray[np.bool_]) -> Timed:
        """What a table says, 0 where nothing runs; the low end of speed is the high end of seconds."""
        seconds = {"value": found.seconds, "low": found.high, "high": found.low}[self.bound] * busy
        rests_X = np.zeros(len(SOURCES))
        rests_X[SOURCES.index("measured")] = np.mean(seconds * found.inside)
        rests_X[SOURCES.index("fitted")] = np.mean(seconds * ~found.inside)
        return Timed(seconds, rests_X)


def attention_coordinates(
    mixer: Mixer, phase: str, requests: Floats, tokens: Floats, tp: int
) -> tuple[str, dict[str, ArrayLike]] | None:
    """Operator and coordinates of a measured table for batches of attention; None for mixers that no table has."""
    kind = "generation" if phase == "decode" else "context"
    batch = np.maximum(requests, 1.0)
    each = {"batch_size": batch, ("kv_len" if phase == "decode" else "seq_len"): np.maximum(tokens / batch, 1.0)}
    if isinstance(mixer, Attention):
        heads = {"num_heads": mixer.num_heads / tp, "num_kv_heads": max(mixer.num_kv_heads / tp, 1.0)}
        return f"{kind}_attention", {**each, **heads, "head_dim": mixer.head_dim}
    if isinstance(mixer, LatentAttention):
        return f"{kind}_mla", {**each, "num_heads": mixer.num_heads / tp}
    return None
