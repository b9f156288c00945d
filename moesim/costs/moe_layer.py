"""What a routing does to one MoE layer of a machine: load, traffic, FLOP and seconds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.costs import network
from moesim.costs.operators import Operators
from moesim.hardware import Cluster
from moesim.model import Experts
from moesim.routing.variants import Routed

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class LayerEffects:
    """One batch through one layer.

    Attributes:
        distinct_experts: experts that compute at least one token.
        rank_imbalance: busiest rank's choices over the mean; NaN where nothing is computed.
        rank_messages: tokens sent to other ranks, once for each rank that a token needs.
        node_messages: tokens sent to other nodes, once for each node that a token needs.
        dropped: choices that capacity refused.
        flops: of the experts, over all ranks; a multiply-add is 2.
        dispatch_s, experts_s, combine_s: on the slowest rank; exchanges are 0 on a single rank.
    """

    distinct_experts: int
    rank_imbalance: float
    rank_messages: int
    node_messages: int
    dropped: int
    flops: float
    dispatch_s: float
    experts_s: float
    combine_s: float

    @property
    def seconds(self) -> float:
        """Dispatch, experts and combine, one after the other."""
        return self.dispatch_s + self.experts_s + self.combine_s


def layer_effects(
    routed: Routed, ffn: Experts, hidden_size: int, cluster: Cluster, ep: int, weight_dtype: str = "bf16"
) -> LayerEffects:
    """Effects of a routing, with experts in order over `ep` ranks and tokens in even runs over the same ranks.

    Free experts are computed where the token is: no message, no FLOP. Rows travel in 16 bits both ways, from a rank
    to each rank that a token needs.

    Args:
        routed: [T, E]; its experts that are not free are those of `ffn`, in order.
        hidden_size: width of a row (of a sub-token's, for multi-head routing).
        ep: ranks, of the first devices of the cluster.

    Raises:
        ValueError: the experts do not match, or `ep` does not divide them or exceeds the cluster.
    """
    paid_TE = routed.chosen_TE[:, ~routed.is_free_E]
    _T, E = paid_TE.shape
    widths_E = np.array([width for width in ffn.expert_widths if width])
    if len(widths_E) != E or ep < 1 or E % ep or ep > cluster.num_ranks:
        raise ValueError(
            f"routing of {E} experts that compute, a layer of {len(widths_E)}, on ep = {ep} of {cluster.num_ranks} "
            f"devices: the first two must agree, and ep must divide them and fit the machine"
        )
    load_E = paid_TE.sum(axis=0)
    params_E = np.array([ffn.expert_params(hidden_size, int(width)) for width in widths_E], np.float64)
    load_LRS, params_LRS = load_E.reshape(1, ep, -1).astype(np.int32), params_E.reshape(1, ep, -1)
    load_R = load_LRS.sum(axis=(0, 2))
    sent_RR = rank_messages(paid_TE, ep)
    node_R = np.arange(ep) // cluster.devices_per_node
    operators = Operators(cluster.device)
    experts_s = operators.experts(load_LRS, params_LRS, ffn, hidden_size, weight_dtype).seconds.max()
    exchange_s = 0.0
    if ep > 1:
        moved_s = network.all_to_all_s(traffic(sent_RR, node_R), 2.0 * hidden_size, cluster).max()
        exchange_s = float((operators.collective_start(ep, cluster) + operators.collective(moved_s)).seconds)
    return LayerEffects(
        distinct_experts=int(np.count_nonzero(load_E)),
        rank_imbalance=float(load_R.max() / load_R.mean()) if load_R.any() else float("nan"),
        rank_messages=int(sent_RR.sum()),
        node_messages=_node_messages(paid_TE, node_R),
        dropped=int(routed.dropped_TE.sum()),
        flops=float(2 * load_E @ params_E),
        dispatch_s=exchange_s, experts_s=float(experts_s), combine_s=exchange_s,
    )  # fmt: skip


def source_ranks(num_tokens: int, num_ranks: int) -> Ints:
    """Rank of each token, [T], in even runs."""
    return np.arange(num_tokens) * num_ranks // max(num_tokens, 1)


def rank_messages(paid_TE: NDArray[np.bool_], num_ranks: int) -> Ints:
    """Tokens that each rank (row) sends to each other one (column), [R, R]: one message for all its experts there."""
    T = len(paid_TE)
    needs_TR = paid_TE.reshape(T, num_ranks, -1).any(axis=2)
    sent_RR = np.zeros((num_ranks, num_ranks), np.int64)
    np.add.at(sent_RR, source_ranks(T, num_ranks), needs_TR)
    np.fill_diagonal(sent_RR, 0)
    return sent_RR


def traffic(sent_RR: Ints, node_R: Ints) -> NDArray[np.int32]:
    """Messages as `network.all_to_all_s` wants them, [4, 1, R]: sent inside the node and out of it, then received."""
    is_far_RR = node_R[:, None] != node_R[None, :]
    near_RR, far_RR = np.where(is_far_RR, 0, sent_RR), np.where(is_far_RR, sent_RR, 0)
    sums = near_RR.sum(axis=1), far_RR.sum(axis=1), near_RR.sum(axis=0), far_RR.sum(axis=0)
    return np.stack(sums).astype(np.int32)[:, None, :]


def _node_messages(paid_TE: NDArray[np.bool_], node_R: Ints) -> int:
    T, num_nodes = len(paid_TE), int(node_R[-1]) + 1
    node_E = np.repeat(node_R, paid_TE.shape[1] // len(node_R))
    needs_TN = np.stack([paid_TE[:, node_E == node].any(axis=1) for node in range(num_nodes)], axis=1)
    own_T = node_R[source_ranks(T, len(node_R))]
    return int(needs_TN.sum() - needs_TN[np.arange(T), own_T].sum())
