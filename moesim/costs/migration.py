"""What it costs to move experts from one placement to another."""

from __future__ import annotations

import numpy as np

from moesim.costs.compute import efficiency
from moesim.layout import Placement
from moesim.model import BYTES_PER_PARAM, ModelSpec
from moesim.network.routes import Fabric
from moesim.network.sends import Sends, seconds


def moving(before: Placement, after: Placement, model: ModelSpec, fabric: Fabric) -> tuple[int, float]:
    """Experts that are new to a rank, of all layers, and seconds until every rank has its own, each from the nearest
    rank that had it (in turn among several), all at once over the links that there are."""
    ep, moved, cluster = before.ep, 0, fabric.cluster
    size_E = np.array([model.experts.expert_params(model.hidden_size, width) for width in model.experts.expert_widths])
    bytes_RR, per_node = np.zeros((ep, ep)), cluster.devices_per_node
    for old_P, new_P in zip(before.slot_expert_LP, after.slot_expert_LP, strict=True):
        old_RS, new_RS = old_P.reshape(ep, -1), new_P.reshape(ep, -1)
        holders: dict[int, list[int]] = {}
        for rank in range(ep):
            for expert in old_RS[rank].tolist():
                holders.setdefault(expert, []).append(rank)
        for rank in range(ep):
            for expert in set(new_RS[rank].tolist()) - set(old_RS[rank].tolist()) - {-1}:
                near = [r for r in holders[expert] if r // per_node == rank // per_node] or holders[expert]
                bytes_RR[near[rank % len(near)], rank] += size_E[expert]
                moved += 1
    sends = Sends.of_matrix(bytes_RR * BYTES_PER_PARAM[model.dtypes.experts])
    return moved, seconds([sends], fabric)[0] / efficiency(cluster.device, "network", "value")
