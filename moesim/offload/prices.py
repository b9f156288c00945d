"""Seconds of an expert on each unit of one machine, by its tokens; and of its copy to the device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.costs import compute
from moesim.costs.operators import Operators
from moesim.hardware import SOURCES, Cluster, Device
from moesim.model import BYTES_PER_PARAM, ModelSpec

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

NUMA_BLIND = 0.725
"""Of the bandwidth of all sockets, what code reaches that spreads its data over them unseen: half of what a core reads
is remote, at 125 in place of 220 GB/s. Source: kTransformers (SOSP 2025), two sockets of Xeon 8452Y."""


def host_of(cluster: Cluster, numa_aware: bool = True) -> Device | None:
    """The sockets of a node as one processor."""
    host, sockets = cluster.host, max(cluster.num_hosts, 1)
    if host is None or not host.flops_per_s:
        return None
    factor = sockets * (1.0 if numa_aware or sockets == 1 else NUMA_BLIND)
    memory = replace(host.memory, bytes_per_s=host.memory.bytes_per_s * factor)
    peaks = {dtype: peak * sockets for dtype, peak in host.flops_per_s.items()}
    return replace(host, memory=memory, flops_per_s=peaks)


def host_bytes_per_s(cluster: Cluster, bound: str) -> float:
    """What host memory has for everybody; 0 where there is no host."""
    host = host_of(cluster) or cluster.host
    return host.memory.bytes_per_s * compute.efficiency(host, "memory", bound) if host else 0.0


class Prices:
    """Experts of one model on one machine.

    Args:
        operators: of the GPU, at the bound that is asked for.
        host: the processor that computes experts, None where there is none; likewise the cluster's near-data unit.

    Attributes:
        bytes_E: of the weights of each expert of a layer.
        copy_s: of the largest of them over the host link; copy_bytes_per_s while it moves.
        launch_s: that experts computed together share. cold_s: to wake the host's threads.
        host_bytes_per_s: what host memory has for everybody. disk_start_s, disk_bytes_per_s: of a read from disk.
    """

    def __init__(self, model: ModelSpec, cluster: Cluster, operators: Operators, host: Device | None) -> None:
        self._model, self._ops, self._host = model, operators, host
        ffn, hidden = model.experts, model.hidden_size
        params_E = np.array([float(ffn.expert_params(hidden, width)) for width in ffn.expert_widths])
        self.bytes_E = params_E * BYTES_PER_PARAM[model.dtypes.experts]
        self._params_W, self._kind_E = np.unique(params_E, return_inverse=True)
        largest = operators.host_copy(float(self.bytes_E.max()), cluster)
        self.copy_s, self.copy_shares_X = float(largest.seconds), largest.shares_X
        self.start_s = float(operators.host_copy(0.0, cluster).seconds)
        self.copy_bytes_per_s = float(self.bytes_E.max()) / max(self.copy_s - self.start_s, 1e-30)
        self.launch_s = float(operators.launches(2.0).seconds)
        bound = operators.bound
        self.cold_s = compute.launch_s(host, bound) if host else 0.0
        self.host_bytes_per_s = host_bytes_per_s(cluster, bound)
        disk = cluster.disk
        self.disk_start_s = disk.memory.latency_s + compute.launch_s(disk, bound) if disk else 0.0
        self.disk_bytes_per_s = disk.memory.bytes_per_s * compute.efficiency(disk, "memory", bound) if disk else np.inf
        self._near = cluster.near
        self._gpu_WN = self._cpu_WN = self._near_WN = np.zeros((len(self._params_W), 0))
        self.gpu_shares_X = self.cpu_shares_X = self.near_shares_X = np.zeros(len(SOURCES))
        self.flops_per_byte = 2.0 / BYTES_PER_PARAM[model.dtypes.experts]
        self.hop_s = 2 * cluster.host_link.latency_s if cluster.host is not None else 0.0

    def gpu_s(self, ids: Ids, load: Ids) -> Floats:
        """Of each expert on the GPU, without the launches."""
        if len(load) and load.max() >= self._gpu_WN.shape[1]:
            self._price_gpu(_wider(load))
        return np.asarray(self._gpu_WN[self._kind_E[ids], load])

    def cpu_s(self, ids: Ids, load: Ids) -> Floats:
        """Of each expert on the CPU, infinite where there is none; `cold_s` comes on top, once for a burst."""
        if self._host is None:
            return np.full(len(load), np.inf)
        if len(load) and load.max() >= self._cpu_WN.shape[1]:
            self._cpu_WN, self.cpu_shares_X = self._price_on(self._host, _wider(load))
        return np.asarray(self._cpu_WN[self._kind_E[ids], load])

    def near_s(self, ids: Ids, load: Ids) -> Floats:
        """Of each expert on the near-data unit, infinite where there is none."""
        if self._near is None:
            return np.full(len(load), np.inf)
        if len(load) and load.max() >= self._near_WN.shape[1]:
            self._near_WN, self.near_shares_X = self._price_on(self._near, _wider(load))
        return np.asarray(self._near_WN[self._kind_E[ids], load])

    def near_start_s(self, tokens: int, is_beside: bool) -> float:
        """To start the near-data unit on a layer; where it is beside another memory, tokens travel there and back."""
        start_s = compute.launch_s(self._near, self._ops.bound) if self._near else 0.0
        if not is_beside:
            return start_s
        moved = 2 * tokens * self._model.hidden_size * BYTES_PER_PARAM[self._model.dtypes.activation]
        return start_s + self.hop_s + moved / self.copy_bytes_per_s

    def _price_gpu(self, size: int) -> None:
        m, load_N11 = self._model, np.arange(size, dtype=np.int32).reshape(-1, 1, 1)
        rows = []
        for params in self._params_W:
            params_N11 = np.full(load_N11.shape, params)
            timed = self._ops.experts(load_N11, params_N11, m.experts, m.hidden_size, m.dtypes.experts)
            rows.append(np.maximum(timed.seconds[:, 0] - self.launch_s, 0.0) if params else np.zeros(size))
            self.gpu_shares_X = timed.shares_X
        self._gpu_WN = np.stack(rows)

    def _price_on(self, unit: Device, size: int) -> tuple[Floats, Floats]:
        """Of 0, 1, ... tokens on a processor that is not the GPU, [W, N]; and what that rests on."""
        m, load_N11 = self._model, np.arange(size, dtype=np.int32).reshape(-1, 1, 1)
        rows = [
            compute.experts_s(load_N11, params, m.hidden_size, unit, m.dtypes.experts, self._ops.bound)[:, 0]
            for params in self._params_W
        ]
        shares_X = np.zeros(len(SOURCES))
        shares_X[compute.source(unit, "grouped_gemm", "memory")] = 1.0
        return np.stack(rows), shares_X


def _wider(load: Ids) -> int:
    return int(2 ** np.ceil(np.log2(int(load.max()) + 2)))
