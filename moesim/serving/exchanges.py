"""How the tokens of an instance reach their experts, by the engine's backend, and what one message costs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.costs import network
from moesim.costs.operators import Operators
from moesim.hardware import Cluster
from moesim.layout import Layout
from moesim.model import BYTES_PER_PARAM, ModelSpec
from moesim.policies.collective import ALL_TO_ALLS
from moesim.serving.prices import ADDED, BY_CHOICE, BY_NODE, BY_RANK, GATHERED, NO_EXCHANGE

Floats = NDArray[np.float64]


def exchange_of(backend: str, layout: Layout, cluster: Cluster) -> tuple[int, str | None]:
    """How tokens reach their experts, and the all-to-all of `ALL_TO_ALLS` whose rates are reached, if one's are.

    vLLM dispatches nothing inside one tensor-parallel group: tokens are on all its ranks, and results are added up. So
    does "none". DeepEP's kernels are taken as named even there, as SGLang runs them.

    Raises:
        ValueError: an unknown backend, or "none" with several data-parallel groups.
    """
    dp, ep = layout.attention.dp, layout.experts.ep
    if ep == 1:
        return NO_EXCHANGE, None
    if backend == "none" and dp > 1:
        raise ValueError(
            f'engine.all2all_backend: "none" adds up results inside one tensor-parallel group, given '
            f'data_parallel_size = {dp}; "allgather_reducescatter" would do'
        )
    if backend == "none" or (backend == "allgather_reducescatter" and dp == 1):
        return ADDED, None
    if backend == "allgather_reducescatter":
        return GATHERED, None
    if backend == "deepep_high_throughput":
        return (BY_RANK if ep <= cluster.devices_per_node else BY_NODE), "rails"
    if backend == "deepep_low_latency":
        return BY_CHOICE, "low_latency"
    raise ValueError(
        f"engine.all2all_backend: unknown {backend!r}; allgather_reducescatter, deepep_high_throughput, "
        "deepep_low_latency or none would do"
    )


def exchange_prices(
    model: ModelSpec, cluster: Cluster, layout: Layout, exchange: int, algorithm: str | None, ops: Operators
) -> Floats:
    """Seconds of one message at a rank's ports, and of a start.

    A gathered token brings the router's scores along, in 16 bits, as vLLM's do; sent ones have chosen before.
    """
    if exchange in (NO_EXCHANGE, ADDED):
        return np.zeros(5)
    reached = ALL_TO_ALLS[algorithm].reached if algorithm else None
    near, far = network.reached_fractions(cluster, ops.bound, reached)
    near_s, far_s = 1 / (cluster.scale_up.bytes_per_s * near), 1 / (cluster.scale_out.bytes_per_s * far)
    h, activation = model.hidden_size, BYTES_PER_PARAM[model.dtypes.activation]
    there = h * (BYTES_PER_PARAM["fp8_block"] if model.dtypes.experts == "fp8_block" else activation)
    if exchange == GATHERED:
        there = (h + model.experts.num_experts) * activation
    back = h * activation
    sizes = np.array([there * near_s, there * far_s, back * near_s, back * far_s])
    start = ops.collective_start(layout.experts.ep, cluster)
    return np.append(ops.collective(sizes).seconds, float(start.seconds))
