"""Kernels from measured tables where they hold the shape, from the roofline elsewhere.

Tables are asked in the order: the run's own backend, then others on the same system, since some kernels are shared.
Between measured sizes a straight line of logarithms is taken; beyond the largest, time grows with the size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moesim.calibrate.parts import Deployment, Kernels, Roofline, Step
from moesim.files.runs import Run
from moesim.files.runs_kernels import Conditions, Floats, kernel_root, kernel_rows, kernel_words
from moesim.hardware import Cluster
from moesim.mixers import Attention, LatentAttention, Mixer
from moesim.model import Experts

BACKENDS = ("trtllm", "vllm", "sglang")
DISTRIBUTIONS = ("power_law_1.01", "balanced")
"""Skew of the measured routing: real routers are skewed, and balanced rows of spread experts do not fit the others."""
EXCHANGE_SMS = 20
"""Streaming multiprocessors of an exchange: DeepEP's default, and the one size that all tables hold."""
_DTYPES = {"bf16": "bfloat16", "fp8": "fp8", "fp8_block": "fp8_block"}
_EXPERT_DTYPES = {
    "bf16": ("bfloat16",), "fp8": ("fp8",), "fp8_block": ("fp8_block",), "nvfp4": ("nvfp4",),
    "mxfp4": ("w4a8_mxfp4_mxfp8", "w4a16_mxfp4"),
}  # fmt: skip


def load_kernels(path: str | Path) -> Callable[[Cluster, Run], Kernels]:
    """Kernels for runs, from tables in aiconfigurator's layout.

    Raises:
        ValueError: no tables there.
    """
    root = kernel_root(path)
    made: dict[tuple[str, str], Kernels] = {}

    def make(cluster: Cluster, run: Run) -> Kernels:
        return made.setdefault((run.system, run.backend), Measured(cluster, root, run.system, run.backend))

    return make


@dataclass(frozen=True)
class Measured:
    """Kernels of one system and backend. Source: NVIDIA aiconfigurator's tables (one kernel at a time, warm)."""

    cluster: Cluster
    root: Path
    system: str
    backend: str
    _cache: dict[tuple[object, ...], float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def _roofline(self) -> Roofline:
        return Roofline(self.cluster)

    def _backends(self) -> tuple[str, ...]:
        return (self.backend, *(name for name in BACKENDS if name != self.backend))

    def _rows(
        self, family: str, table: str, conditions: Conditions, columns: tuple[str, ...]
    ) -> tuple[Floats, ...] | None:
        for backend in self._backends():
            rows = kernel_rows(self.root, self.system, family, backend, table, conditions, columns)
            if rows is not None:
                return rows
        return None

    def _once(self, key: tuple[object, ...], compute: Callable[[], float]) -> float:
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def gemm_s(self, m: float, n: float, k: float, dtype: str) -> float:
        """The measured product of the nearest weight shape, times the ratio of the two rooflines."""
        return self._once(("gemm", m, n, k, dtype), lambda: self._gemm_s(m, n, k, dtype))

    def _gemm_s(self, m: float, n: float, k: float, dtype: str) -> float:
        conditions = (("gemm_dtype", _DTYPES.get(dtype, dtype)),)
        rows = self._rows("gemm", "gemm_perf", conditions, ("m", "n", "k"))
        roofline_s = self._roofline.gemm_s(m, n, k, dtype)
        if rows is None:
            return roofline_s
        m_N, n_N, k_N, seconds_N = rows
        apart_N = np.abs(np.log(n_N / n)) + np.abs(np.log(k_N / k))
        near_N = apart_N == apart_N.min()
        near_N &= n_N == n_N[near_N][0]
        measured_s = line(m, m_N[near_N], seconds_N[near_N])
        near_s = self._roofline.gemm_s(m, float(n_N[near_N][0]), float(k_N[near_N][0]), dtype)
        return floor_scaled(measured_s, roofline_s, near_s, float(seconds_N.min()))

    def attention_s(self, mixer: Mixer, step: Step, deployment: Deployment) -> float:
        """Measured attention of that batch and context, but no less than the roofline of all its queries."""
        key = ("attention", mixer, step, deployment.tp, deployment.kv_dtype)
        return self._once(key, lambda: self._attention_s(mixer, step, deployment))

    def _attention_s(self, mixer: Mixer, step: Step, deployment: Deployment) -> float:
        roofline_s = self._roofline.attention_s(mixer, step, deployment)
        phase = "context" if step.is_prefill else "generation"
        kv_dtype = _DTYPES.get(deployment.kv_dtype, deployment.kv_dtype)
        if isinstance(mixer, LatentAttention):
            conditions: Conditions = (("num_heads", mixer.num_heads // deployment.tp), ("kv_cache_dtype", kv_dtype))
            rows = self._rows("mla", f"{phase}_mla_perf", conditions, ("batch_size", "isl", "step"))
        elif isinstance(mixer, Attention):
            conditions = (
                ("num_heads", mixer.num_heads // deployment.tp),
                ("num_key_value_heads", max(mixer.num_kv_heads // deployment.tp, 1)),
                ("head_dim", mixer.head_dim),
                ("window_size", mixer.window or 0),
                ("kv_cache_dtype", kv_dtype),
                ("attn_dtype", "bfloat16"),
            )
            rows = self._rows("attention", f"{phase}_attention_perf", conditions, ("batch_size", "isl", "step"))
        else:
            return roofline_s
        if rows is None:
            return roofline_s
        batch_N, length_N, step_N, seconds_N = rows
        if step.is_prefill:
            return surface(step.requests, step.tokens / step.requests, batch_N, length_N, seconds_N)
        measured_s = surface(step.requests, step.context, batch_N, length_N + step_N - 1, seconds_N)
        return max(measured_s, roofline_s)  # measured with one query to a request; with drafts there are more

    def experts_s(self, experts: Experts, tokens: float, deployment: Deployment) -> float:
        """Measured experts of that shape and cut, on the busiest rank under skewed routing."""
        key = ("experts", experts, tokens, deployment.ep, deployment.etp)
        return self._once(key, lambda: self._experts_s(experts, tokens, deployment))

    def _experts_s(self, experts: Experts, tokens: float, deployment: Deployment) -> float:
        dtype = deployment.model.dtypes.experts
        formats = _EXPERT_DTYPES.get(dtype, (dtype,))
        asked = [(self.backend, moe_dtype) for moe_dtype in formats]  # then the same arithmetic elsewhere
        asked += [(backend, moe_dtype) for moe_dtype in formats for backend in self._backends()[1:]]
        for distribution in DISTRIBUTIONS:
            for backend, moe_dtype in asked:
                conditions: Conditions = (
                    ("moe_dtype", moe_dtype), ("hidden_size", deployment.model.hidden_size),
                    ("inter_size", max(experts.expert_widths)), ("topk", experts.top_k),
                    ("num_experts", experts.num_experts), ("moe_tp_size", deployment.etp),
                    ("moe_ep_size", deployment.ep), ("distribution", distribution),
                )  # fmt: skip
                rows = kernel_rows(self.root, self.system, "moe", backend, "moe_perf", conditions, ("num_tokens",))
                if rows is not None:
                    return line(tokens, *rows)
        return self._roofline.experts_s(experts, tokens, deployment)

    def allreduce_s(self, num_bytes: float, size: int) -> tuple[float, float]:
        """Measured all-reduce of the backend inside a node: what the bytes add to the smallest one, and that one."""
        place = (self.root, self.system, "comm", self.backend, "custom_allreduce_perf")
        names = kernel_words(*place, "kernel_source") if size <= self.cluster.devices_per_node else ()
        for name in (name for name in names if "eager" not in name):  # decoding runs captured graphs
            conditions: Conditions = (("num_gpus", size), ("kernel_source", name))
            rows = kernel_rows(*place, conditions, ("message_size",))
            if rows is not None:
                elements_N, seconds_N = rows
                start_s = float(seconds_N.min())
                elements = num_bytes / 2  # message_size counts bf16 elements
                return max(line(elements, elements_N, seconds_N) - start_s, 0.0), start_s
        return self._roofline.allreduce_s(num_bytes, size)

    def exchange_s(self, experts: Experts, tokens: float, deployment: Deployment) -> tuple[float, float]:
        """Measured DeepEP normal dispatch and combine, with what their notifications take; it is all in the bytes."""
        conditions: Conditions = (
            ("node_num", deployment.num_ranks // self.cluster.devices_per_node),
            ("hidden_size", deployment.model.hidden_size),
            ("num_topk", experts.top_k),
            ("num_experts", experts.num_experts),
            ("dispatch_sms", EXCHANGE_SMS),
        )
        times = ("dispatch_transmit_us", "dispatch_notify_us", "combine_transmit_us", "combine_notify_us")
        rows = kernel_rows(
            self.root, self.system, "comm", "sglang", "wideep_deepep_normal_perf", conditions, ("num_token", *times)
        )
        if rows is None:
            return self._roofline.exchange_s(experts, tokens, deployment)
        return line(tokens, rows[0], 1e-6 * np.sum(rows[1:], axis=0)), 0.0


def floor_scaled(measured_s: float, wanted_s: float, near_s: float, floor_s: float) -> float:
    """A measured time carried over to another shape: what lies above the shortest kernel scales with the rooflines.

    >>> floor_scaled(5.0, 2.0, 1.0, 1.0)
    9.0
    """
    return floor_s + max(measured_s - floor_s, 0.0) * wanted_s / near_s


def line(x: float, x_N: Floats, seconds_N: Floats) -> float:
    """Seconds at x between measured sizes; several measurements of one size count as their geometric mean.

    >>> line(4.0, np.array([1.0, 16.0]), np.array([1.0, 4.0]))
    2.0
    >>> line(32.0, np.array([1.0, 16.0]), np.array([1.0, 4.0]))
    8.0
    """
    sizes, index_N = np.unique(x_N, return_inverse=True)
    logs = np.bincount(index_N, np.log(seconds_N)) / np.bincount(index_N)
    if x > sizes[-1]:
        return float(np.exp(logs[-1]) * x / sizes[-1])
    return float(np.exp(np.interp(np.log(max(x, 1e-9)), np.log(sizes), logs)))


def surface(batch: float, length: float, batch_N: Floats, length_N: Floats, seconds_N: Floats) -> float:
    """Seconds at a batch and a length, first along the lengths of each measured batch that come near, then across."""
    batches, found = [], []
    for size in np.unique(batch_N):
        rows = batch_N == size
        if length_N[rows].max() * 2 >= length:
            batches.append(size)
            found.append(line(length, length_N[rows], seconds_N[rows]))
    if not batches:
        rows = batch_N == batch_N.min()
        return line(length, length_N[rows], seconds_N[rows]) * batch / float(batch_N.min())
    return line(batch, np.array(batches), np.array(found))
