"""Kernels from measured tables where they hold the shape, from the roofline elsewhere.

Tables are asked in the order: the run's own backend, then others on the same system, since some kernels are shared; the
newest version first. Of a table, only the rows at the model's own widths and the run's own cut count. Between and
beyond measured sizes, `moesim.costs.measured` says how long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np

from moesim.calibrate.parts import Deployment, Kernels, Roofline, Step
from moesim.costs.measured import MeasuredTable, MeasuredTables
from moesim.costs.measured_experts import MXFP4
from moesim.costs.operators import attention_coordinates
from moesim.files.profiles import tables_of_device
from moesim.files.runs import Run
from moesim.hardware import Cluster
from moesim.mixers import Attention, Mixer
from moesim.model import Experts

BACKENDS = ("trtllm", "vllm", "sglang")
DISTRIBUTIONS = ("power_law_1.01", "balanced")
"""Skew of the measured routing: real routers are skewed."""
EXCHANGE_SMS = 20
"""Streaming multiprocessors of an exchange: DeepEP's default, and the one size that all tables hold."""
_NAMES = ("gemm_perf", "moe_perf", "context_attention_perf", "generation_attention_perf", "context_mla_perf",
          "generation_mla_perf", "custom_allreduce_perf", "wideep_deepep_normal_perf")  # fmt: skip


def load_kernels(path: str | Path) -> Callable[[Cluster, Run], Kernels]:
    """Kernels for runs, from aiconfigurator's folder or profiles of ours; a system's tables are read when a run asks.

    What is returned raises ValueError where there are no tables of a run's system.
    """

    @cache
    def tables(system: str) -> MeasuredTables:
        found = tables_of_device(Path(path), system, _NAMES).tables
        return MeasuredTables([table for table in found if "eager" not in table.facts.get("kernel", "")])

    made: dict[tuple[str, str, int], Kernels] = {}

    def make(cluster: Cluster, run: Run) -> Kernels:
        key = run.system, run.backend, cluster.num_nodes
        if key not in made:
            made[key] = Measured(cluster, tables(run.system), run.backend)
        return made[key]

    return make


@dataclass(frozen=True)
class Measured:
    """Kernels of one system and backend; tables of kernels launched one by one (eager) are left out before.

    Decoding runs captured graphs. Source of the tables: NVIDIA aiconfigurator (one kernel at a time, warm).
    """

    cluster: Cluster
    tables: MeasuredTables
    backend: str
    _found: dict[object, MeasuredTable | None] = field(default_factory=dict, compare=False, repr=False)
    _known: dict[object, float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def _roofline(self) -> Roofline:
        return Roofline(self.cluster)

    def _find(self, op: str, dtypes: tuple[str, ...], shape: Mapping[str, float], **facts: str) -> MeasuredTable | None:
        """Rows of that very shape: those of the table that has most of them, of the first backend and version."""
        key = op, dtypes, *shape.values(), *facts.values()
        if key not in self._found:
            cuts = [_cut(table, shape) for table in self.tables.tables if table.op == op]
            fitting = MeasuredTables([table for table in cuts if table is not None])
            versions = sorted({table.facts.get("version", "") for table in fitting.tables}, key=_version, reverse=True)
            asked = sorted(product(dtypes, BACKENDS), key=lambda pair: pair[1] != self.backend)
            found = (
                fitting.find(op, dtype, backend=backend, version=version, **facts)
                for (dtype, backend), version in product(asked, versions)
            )
            self._found[key] = next((table for table in found if table is not None), None)
        return self._found[key]

    def _seconds(self, table: MeasuredTable, shape: Mapping[str, float], **size: float) -> float:
        """Many runs ask for the same kernel."""
        key = id(table), *shape.values(), *size.values()
        if key not in self._known:
            self._known[key] = float(table.seconds({**shape, **size}).seconds[0])
        return self._known[key]

    def gemm_s(self, m: float, n: float, k: float, dtype: str) -> float:
        """Measured product."""
        table = self._find("gemm", (dtype,), {})
        return self._seconds(table, {}, m=m, n=n, k=k) if table else self._roofline.gemm_s(m, n, k, dtype)

    def attention_s(self, mixer: Mixer, step: Step, deployment: Deployment) -> float:
        """Measured attention of that batch and context, but no less than the roofline of all its queries."""
        roofline_s = self._roofline.attention_s(mixer, step, deployment)
        phase, tokens = ("prefill", step.tokens) if step.is_prefill else ("decode", step.requests * step.context)
        asked = attention_coordinates(mixer, phase, np.array(step.requests), np.array(tokens), deployment.tp)
        if asked is None:
            return roofline_s
        shape = {name: float(np.asarray(value)) for name, value in asked[1].items()}
        size = {name: shape.pop(name) for name in ("batch_size", "seq_len", "kv_len") if name in shape}
        facts = {"window": str(mixer.window or 0)} if isinstance(mixer, Attention) else {}
        dtype = "bf16" if step.is_prefill else deployment.kv_dtype
        table = self._find(asked[0], (dtype,), shape, cache_dtype=deployment.kv_dtype, **facts)
        if table is None:
            return roofline_s
        measured_s = self._seconds(table, shape, **size)
        return max(measured_s, roofline_s)  # measured with one query to a request; with drafts there are more

    def experts_s(self, experts: Experts, tokens: float, deployment: Deployment) -> float:
        """Measured experts of that shape and cut, on the busiest rank under skewed routing."""
        dtype = deployment.model.dtypes.experts
        shape: dict[str, float] = {
            "hidden_size": deployment.model.hidden_size, "inter_size": max(experts.expert_widths),
            "top_k": experts.top_k, "num_experts": experts.num_experts, "tp": deployment.etp, "ep": deployment.ep,
        }  # fmt: skip
        for distribution in DISTRIBUTIONS:
            table = self._find("moe", MXFP4 if dtype == "mxfp4" else (dtype,), shape, distribution=distribution)
            if table:
                return self._seconds(table, shape, num_tokens=tokens)
        return self._roofline.experts_s(experts, tokens, deployment)

    def allreduce_s(self, num_bytes: float, size: int) -> tuple[float, float]:
        """Measured all-reduce inside a node: what the bytes add to the smallest one, and that one."""
        shape = {"num_gpus": float(size)}
        table = self._find("all_reduce", ("bf16",), shape) if size <= self.cluster.devices_per_node else None
        if table is None:
            return self._roofline.allreduce_s(num_bytes, size)
        start_s = float(table.seconds_N.min())
        return max(self._seconds(table, shape, message_bytes=max(num_bytes, 1.0)) - start_s, 0.0), start_s

    def exchange_s(self, experts: Experts, tokens: float, deployment: Deployment) -> tuple[float, float]:
        """Measured DeepEP normal dispatch and combine; to start them, the roofline.

        Each begins with a barrier (notify). The tables have 30 us for it among 16 ranks, and up to 16 ms in larger
        batches on more of them: mostly waiting for ranks that came late to the benchmark, no property of the kernel.
        """
        roofline = self._roofline.exchange_s(experts, tokens, deployment)
        shape: dict[str, float] = {
            "node_num": deployment.num_ranks // self.cluster.devices_per_node,
            "hidden_size": deployment.model.hidden_size, "top_k": experts.top_k, "num_experts": experts.num_experts,
            "num_sms": EXCHANGE_SMS,
        }  # fmt: skip
        ways = [self._find(op, ("bf16",), shape, mode="normal") for op in ("dispatch", "combine")]
        measured_s = [self._seconds(table, shape, num_tokens=tokens) for table in ways if table]
        return sum(measured_s) if len(measured_s) == 2 else roofline[0], roofline[1]


def preferred(tables: MeasuredTables, backend: str) -> MeasuredTables:
    """Of the tables of one operator, format and conditions only the first backend's newest, in the order above."""
    order = sorted(BACKENDS, key=lambda name: name != backend)

    def of(table: MeasuredTable) -> tuple[object, ...]:
        told = {name: fact for name, fact in table.facts.items() if name not in ("backend", "version", "kernel")}
        return table.op, table.dtype, *sorted(told.items())

    def rank(table: MeasuredTable) -> tuple[int, list[tuple[int, str]]]:
        known = table.facts.get("backend", "")
        return -order.index(known) if known in order else -len(order), _version(table.facts.get("version", ""))

    best: dict[tuple[object, ...], tuple[int, list[tuple[int, str]]]] = {}
    for table in tables.tables:
        best[of(table)] = max(best.get(of(table), rank(table)), rank(table))
    return MeasuredTables([table for table in tables.tables if rank(table) == best[of(table)]])


def _cut(table: MeasuredTable, shape: Mapping[str, float]) -> MeasuredTable | None:
    """The table's rows of that very shape; None where it has none."""
    if not {*shape} <= {*table.axes}:
        return None
    columns = [table.axes.index(name) for name in shape]
    here_N = (table.points_ND[:, columns] == [*shape.values()]).all(axis=1)
    if here_N.all() or not here_N.any():
        return table if here_N.any() else None
    return MeasuredTable(
        table.op, table.dtype, table.device, table.axes, table.points_ND[here_N], table.seconds_N[here_N],
        facts=table.facts,
    )  # fmt: skip


def _version(text: str) -> list[tuple[int, str]]:
    """Versions in order: numbers as numbers, so that 0.5.14 is newer than 0.5.6."""
    parts = text.replace("rc", ".-1.").replace("post", "").split(".")
    return [(int(part), "") if part.lstrip("-").isdigit() else (-1, part) for part in parts]
