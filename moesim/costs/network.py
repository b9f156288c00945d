"""Seconds of collectives on a cluster of two levels: bytes over the achieved bandwidth of a level, and time to start.

Latency is apart from the bytes, since it rests on other numbers.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.costs.compute import efficiency
from moesim.hardware import Cluster, Efficiency, Link

Floats = NDArray[np.float64]


def reached_fractions(
    cluster: Cluster, bound: str = "value", reached: tuple[Efficiency, Efficiency] | None = None
) -> tuple[float, float]:
    """Share of a link's rate that a collective reaches inside a node and beyond; the device's where it says none."""
    if reached is None:
        return (efficiency(cluster.device, "network", bound),) * 2
    return getattr(reached[0], bound), getattr(reached[1], bound)


def all_to_all_s(
    traffic_CLR: NDArray[np.int32],
    token_bytes: float,
    cluster: Cluster,
    bound: str = "value",
    reached: tuple[Efficiency, Efficiency] | None = None,
) -> Floats:
    """Dispatch seconds for each layer and rank, [L, R]; those of combine, which is its reverse, are the same.

    seconds = max over levels of max(sent, received) x token_bytes / bandwidth

    Args:
        traffic_CLR: messages sent inside the node, sent outside, received inside, received outside.
        token_bytes: bytes of one message.
        reached: see `reached_fractions`.

    Source: alpha-beta model with per-level injection limits; both levels move at once, as in DeepEP's kernels.
    Holds for: full bisection at each level, so that only a rank's own ports limit it.
    """
    near_fraction, far_fraction = reached_fractions(cluster, bound, reached)
    near_s = token_bytes / (cluster.scale_up.bytes_per_s * near_fraction)
    far_s = token_bytes / (cluster.scale_out.bytes_per_s * far_fraction)
    return np.asarray(_ports_s(traffic_CLR, near_s, far_s))


@njit(cache=True)
def _ports_s(traffic_CLR, near_s, far_s):  # type: ignore[no-untyped-def]
    num_layers, num_ranks = traffic_CLR.shape[1], traffic_CLR.shape[2]
    seconds_LR = np.empty((num_layers, num_ranks))
    for layer in range(num_layers):
        for rank in range(num_ranks):
            near = max(traffic_CLR[0, layer, rank], traffic_CLR[2, layer, rank]) * near_s
            far = max(traffic_CLR[1, layer, rank], traffic_CLR[3, layer, rank]) * far_s
            seconds_LR[layer, rank] = max(near, far)
    return seconds_LR


def half_all_reduce_s(num_bytes: Floats, size: int, cluster: Cluster, bound: str = "value", stride: int = 1) -> Floats:
    """Reduce-scatter or all-gather of `num_bytes` (the whole buffer) among `size` ranks, neighbours or `stride` apart.

    seconds = (size - 1) / size x num_bytes / bandwidth; an all-reduce is both, one after the other.

    Source: Thakur, Rabenseifner, Gropp, IJHPCA 2005, with direct (all-to-all) exchange inside a node.
    """
    return np.asarray((size - 1) / size * num_bytes / rate_bytes_per_s(size * stride, cluster, bound))


def rate_bytes_per_s(size: int, cluster: Cluster, bound: str = "value") -> float:
    """What is reached of the slowest level that `size` neighbouring ranks span."""
    return _level(size, cluster).bytes_per_s * efficiency(cluster.device, "network", bound)


def latency_s(size: int, cluster: Cluster) -> float:
    """Latency of the slowest level that `size` neighbouring ranks span."""
    return _level(size, cluster).latency_s


def _level(size: int, cluster: Cluster) -> Link:
    return cluster.scale_up if size <= cluster.devices_per_node else cluster.scale_out


def copy_s(num_bytes: float, cluster: Cluster, bound: str = "value") -> float:
    """Host memory to device memory over the device's host link, pinned; without the time to start."""
    link = cluster.host_link
    return num_bytes / (link.bytes_per_s * efficiency(cluster.device, "network", bound))
