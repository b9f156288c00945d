"""Seconds of collectives on a cluster of two levels: latency plus bytes over the achieved bandwidth of a level."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.costs.compute import efficiency
from moesim.hardware import Cluster, Link

Floats = NDArray[np.float64]


def all_to_all_s(traffic_CLR: NDArray[np.int32], token_bytes: float, cluster: Cluster, bound: str = "value") -> Floats:
    """Dispatch (or combine) seconds for each layer and rank, [L, R].

    seconds = latency + max over levels of max(sent, received) x token_bytes / bandwidth

    Args:
        traffic_CLR: tokens sent inside the node, sent outside, received inside, received outside.
        token_bytes: bytes of one token's message.

    Source: alpha-beta model with per-level injection limits; one message per token and destination rank as in
        DeepEP's low-latency kernels.
    Holds for: full bisection at each level, so that only a rank's own ports limit it.
    """
    achieved = efficiency(cluster.device, "network", bound)
    near = np.maximum(traffic_CLR[0], traffic_CLR[2]) * (token_bytes / (cluster.scale_up.bytes_per_s * achieved))
    far = np.maximum(traffic_CLR[1], traffic_CLR[3]) * (token_bytes / (cluster.scale_out.bytes_per_s * achieved))
    latency = cluster.scale_out.latency_s if cluster.num_nodes > 1 else cluster.scale_up.latency_s
    return np.asarray(np.maximum(near, far) + latency + cluster.device.launch_s)


def all_reduce_s(num_bytes: Floats, size: int, cluster: Cluster, bound: str = "value") -> Floats:
    """Two-shot all-reduce among `size` neighbouring ranks: reduce-scatter, then all-gather.

    seconds = 2 (size - 1) / size x num_bytes / bandwidth + 2 latency + launch

    Source: Thakur, Rabenseifner, Gropp, IJHPCA 2005, with direct (all-to-all) exchange inside a node.
    """
    return 2 * half_all_reduce_s(num_bytes, size, cluster, bound) - cluster.device.launch_s


def half_all_reduce_s(num_bytes: Floats, size: int, cluster: Cluster, bound: str = "value") -> Floats:
    """Reduce-scatter or all-gather of `num_bytes` (the whole buffer) among `size` neighbouring ranks."""
    link: Link = cluster.scale_up if size <= cluster.devices_per_node else cluster.scale_out
    rate = link.bytes_per_s * efficiency(cluster.device, "network", bound)
    return np.asarray((size - 1) / size * num_bytes / rate + link.latency_s + cluster.device.launch_s)


def copy_s(num_bytes: float, cluster: Cluster, bound: str = "value") -> float:
    """Host memory to device memory over the device's host link, pinned."""
    link = cluster.host_link
    return num_bytes / (link.bytes_per_s * efficiency(cluster.device, "network", bound)) + link.latency_s
