"""Kernels from measured tables where they hold the shape, from the roofline elsewhere.

Tables are asked in the order: the run's own backend, then others on the same system, since some kernels are shared.
Between and beyond measured sizes, `moesim.costs.measured` says how long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moesim.calibrate.parts import Deployment, Kernels, Roofline, Step
from moesim.costs.measured import MeasuredTable
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
    made: dict[tuple[str, str, int], Kernels] = {}

    def make(cluster: Cluster, run: Run) -> Kernels:
        key = run.system, run.backend, cluster.num_nodes
        return made.setdefault(key, Measured(cluster, root, run.system, run.backend))

    return make


@dataclass(frozen=True)
class Measured:
    """Kernels of one system and backend. Source: NVIDIA aiconfigurator's tables (one kernel at a time, warm)."""

    cluster: Cluster
    root: Path
    system: str
    backend: str
    _tables: dict[tuple[str, str, Conditions], MeasuredTable] = field(default_factory=dict, compare=False, repr=False)
    _known: dict[tuple[object, ...], float] = field(default_factory=dict, compare=False, repr=False)

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

    def _once(self, key: tuple[object, ...], price: Callable[[], float]) -> float:
        """Many runs ask for the same kernel."""
        if key not in self._known:
            self._known[key] = price()
        return self._known[key]

    def _seconds(
        self,
        op: str,
        dtype: str,
        conditions: Conditions,
        points: Mapping[str, Floats],
        seconds_N: Floats,
        **where: float,
    ) -> float:
        """Seconds at one point of a table; of several measurements of a point, the geometric mean counts.

        where: a coordinate of each axis; axes that `points` lacks are the same in the whole table.
        """
        key = op, dtype, conditions
        if key not in self._tables:
            columns = [points.get(name, np.full(len(seconds_N), value)) for name, value in where.items()]
            points_ND, index_N = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
            mean_N = np.bincount(index_N.ravel(), np.log(seconds_N)) / np.bincount(index_N.ravel())
            self._tables[key] = MeasuredTable(op, dtype, self.system, tuple(where), points_ND, np.exp(mean_N))
        asked = (key, *where.values())
        return self._once(asked, lambda: float(self._tables[key].seconds(where).seconds[0]))

    def gemm_s(self, m: float, n: float, k: float, dtype: str) -> float:
        """Measured product."""
        conditions: Conditions = (("gemm_dtype", _DTYPES.get(dtype, dtype)),)
        rows = self._rows("gemm", "gemm_perf", conditions, ("m", "n", "k"))
        if rows is None:
            return self._roofline.gemm_s(m, n, k, dtype)
        points = dict(zip("mnk", rows[:3], strict=True))
        return self._seconds("gemm", dtype, conditions, points, rows[3], m=m, n=n, k=k)

    def attention_s(self, mixer: Mixer, step: Step, deployment: Deployment) -> float:
        """Measured attention of that batch and context, but no less than the roofline of all its queries."""
        roofline_s = self._roofline.attention_s(mixer, step, deployment)
        phase = "context" if step.is_prefill else "generation"
        heads = mixer.num_heads // deployment.tp if isinstance(mixer, Attention | LatentAttention) else 0
        conditions: Conditions = (
            ("num_heads", heads), ("kv_cache_dtype", _DTYPES.get(deployment.kv_dtype, deployment.kv_dtype))
        )  # fmt: skip
        shape = {"num_heads": float(heads)}
        if isinstance(mixer, LatentAttention):
            family, name = "mla", f"{phase}_mla"
        elif isinstance(mixer, Attention):
            family, name = "attention", f"{phase}_attention"
            kv_heads = max(mixer.num_kv_heads // deployment.tp, 1)
            conditions += (
                ("num_key_value_heads", kv_heads), ("head_dim", mixer.head_dim), ("window_size", mixer.window or 0),
                ("attn_dtype", "bfloat16"),
            )  # fmt: skip
            shape |= {"num_kv_heads": float(kv_heads), "head_dim": float(mixer.head_dim)}
        else:
            return roofline_s
        rows = self._rows(family, f"{name}_perf", conditions, ("batch_size", "isl", "step"))
        if rows is None:
            return roofline_s
        batch_N, length_N, step_N, seconds_N = rows
        if step.is_prefill:
            points, length = {"batch_size": batch_N, "seq_len": length_N}, {"seq_len": step.tokens / step.requests}
        else:
            points, length = {"batch_size": batch_N, "kv_len": length_N + step_N - 1}, {"kv_len": step.context}
        where = {"batch_size": step.requests, **length, **shape}
        measured_s = self._seconds(name, deployment.kv_dtype, conditions, points, seconds_N, **where)
        return max(measured_s, roofline_s)  # measured with one query to a request; with drafts there are more

    def experts_s(self, experts: Experts, tokens: float, deployment: Deployment) -> float:
        """Measured experts of that shape and cut, on the busiest rank under skewed routing."""
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
                    where = {
                        "num_tokens": tokens, "hidden_size": deployment.model.hidden_size,
                        "inter_size": max(experts.expert_widths), "top_k": experts.top_k,
                        "num_experts": experts.num_experts, "tp": deployment.etp, "ep": deployment.ep,
                    }  # fmt: skip
                    return self._seconds("moe", dtype, conditions, {"num_tokens": rows[0]}, rows[1], **where)
        return self._roofline.experts_s(experts, tokens, deployment)

    def allreduce_s(self, num_bytes: float, size: int) -> tuple[float, float]:
        """Measured all-reduce of the backend inside a node: what the bytes add to the smallest one, and that one."""
        place = (self.root, self.system, "comm", self.backend, "custom_allreduce_perf")
        names = kernel_words(*place, "kernel_source") if size <= self.cluster.devices_per_node else ()
        for name in (name for name in names if "eager" not in name):  # decoding runs captured graphs
            conditions: Conditions = (("num_gpus", size), ("kernel_source", name))
            rows = kernel_rows(*place, conditions, ("message_size",))
            if rows is not None:
                start_s = float(rows[1].min())
                points = {"message_bytes": 2 * rows[0]}  # message_size counts bf16 elements
                where = {"message_bytes": max(num_bytes, 1.0), "num_gpus": float(size)}
                seconds = self._seconds("all_reduce", "bf16", conditions, points, rows[1], **where)
                return max(seconds - start_s, 0.0), start_s
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
        seconds_N = 1e-6 * np.sum(rows[1:], axis=0)
        return self._seconds("deepep", "fp8", conditions, {"tokens": rows[0]}, seconds_N, tokens=tokens), 0.0
