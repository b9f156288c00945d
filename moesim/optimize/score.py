"""What a placement is worth: every term of the objective, on any demand; what its rank loads are, step by step."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.optimize.demand import Demand
from moesim.optimize.problem import Problem, Weights

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Score:
    """Terms of the objective, see `Weights`; and what tokens do that several of their experts share.

    reach: nodes that a token's experts of one layer lie in, mean: messages that leave for nodes, deduplicated, where
        tokens come back to their own rank after each layer. fresh: of these, nodes that the token was not in for the
        layer before: messages where tokens stay where their experts are. Both NaN without tokens (loads alone).
    """

    load: float
    steps: float
    rank: float
    node: float
    rack: float
    spread: float
    moved: float
    reach: float
    fresh: float

    def objective(self, weights: Weights) -> float:
        """The weighted sum of its terms."""
        return float(sum(getattr(weights, item.name) * getattr(self, item.name) for item in fields(weights)))


def shares_LP(problem: Problem, slot_LP: Ints) -> Floats:
    """Share of its expert's tokens that each slot gets where copies share evenly, [L, P]."""
    count_LE = problem.counts(slot_LP)
    return np.asarray(1 / np.take_along_axis(count_LE, slot_LP.astype(np.int64), axis=1))


def slot_load_SLP(problem: Problem, slot_LP: Ints, load_SLE: Floats, share_LP: Floats | None = None) -> Floats:
    """Tokens of each slot in each step, [S, L, P]; shares are even if None."""
    share_LP = shares_LP(problem, slot_LP) if share_LP is None else share_LP
    return np.asarray(np.take_along_axis(load_SLE, slot_LP[None].astype(np.int64), axis=2) * share_LP)


def rank_sums(problem: Problem, load_SLP: Floats) -> Floats:
    """Tokens of each rank, [S, L, R], of tokens of each slot, [S, L, P]."""
    whole = np.concatenate([load_SLP, np.zeros((*load_SLP.shape[:2], 1))], axis=2)
    return np.asarray(np.add.reduceat(whole, problem.first_R[:-1], axis=2) * (problem.slots_R > 0))


def rank_load_SLR(problem: Problem, slot_LP: Ints, load_SLE: Floats, share_LP: Floats | None = None) -> Floats:
    """Tokens of each rank in each step, [S, L, R]."""
    return rank_sums(problem, slot_load_SLP(problem, slot_LP, load_SLE, share_LP))


def fullest_L(problem: Problem, slot_LP: Ints, load_LE: Floats) -> Floats:
    """Load of the fullest rank of each layer over its speed, [L]."""
    return np.asarray((rank_load_SLR(problem, slot_LP, load_LE[None])[0] / problem.speed_R).max(axis=1))


def fullest_SL(problem: Problem, rank_SLR: Floats) -> Floats:
    """How full the fullest rank is, over the mean, in each step and layer, [S, L]; 1 where nothing is to be done."""
    mean_SL = rank_SLR.sum(axis=2) / problem.speed_R.sum()
    fullest = (rank_SLR / problem.speed_R).max(axis=2)
    return np.asarray(np.divide(fullest, mean_SL, out=np.ones_like(mean_SL), where=mean_SL > 0))


def in_groups_LEG(problem: Problem, slot_LP: Ints, level: str) -> Floats:
    """Share of each expert in each group of ranks, [L, E, G]."""
    group_P = problem.group_R(level)[problem.rank_P]
    found = np.zeros((len(slot_LP), problem.num_experts, int(group_P.max()) + 1))
    layers = np.arange(len(slot_LP))[:, None]
    np.add.at(found, (layers, slot_LP, group_P[None]), shares_LP(problem, slot_LP))
    return found


def left_fraction(problem: Problem, slot_LP: Ints, demand: Demand, level: str) -> float:
    """Share of transitions that go to another group."""
    total = float(demand.next_LEE.sum())
    if not total:
        return 0.0
    groups = in_groups_LEG(problem, slot_LP, level).astype(np.float32)
    stays = sum(
        float((here * (pairs_EE @ there)).sum())
        for here, there, pairs_EE in zip(groups[:-1], groups[1:], demand.next_LEE, strict=True)
    )
    return 1 - stays / total


def spread_fraction(problem: Problem, slot_LP: Ints, demand: Demand) -> float:
    """Share of pairs of one token's choices in one layer that lie in different nodes."""
    total = float(demand.together_LEE.sum())
    if not total:
        return 0.0
    groups = in_groups_LEG(problem, slot_LP, "node").astype(np.float32)
    pairs = zip(groups, demand.together_LEE, strict=True)
    return 1 - sum(float((here * (pairs_EE @ here)).sum()) for here, pairs_EE in pairs) / total


def moved_fraction(problem: Problem, slot_LP: Ints, before_LP: Ints) -> float:
    """Share of slots whose expert was not on that rank before: what must travel."""
    moved = 0
    for now_P, old_P in zip(slot_LP, before_LP, strict=True):
        held = set(zip(problem.rank_P.tolist(), old_P.tolist(), strict=True))
        moved += sum(pair not in held for pair in zip(problem.rank_P.tolist(), now_P.tolist(), strict=True))
    return moved / slot_LP.size


@njit(cache=True)
def _reach(ids_TLK, slots_LEX, count_LE, node_P, num_nodes):  # type: ignore[no-untyped-def]
    """Nodes that tokens use, layer by layer, and of these new ones; copies in turn, by the token's number."""
    num_tokens, num_layers, top_k = ids_TLK.shape
    seen_N = np.full(num_nodes, -1, np.int64)
    reached, fresh = 0, 0
    for t in range(num_tokens):
        for layer in range(num_layers):
            stamp = t * (num_layers + 1) + layer + 1
            for k in range(top_k):
                e = ids_TLK[t, layer, k]
                node = node_P[slots_LEX[layer, e, t % count_LE[layer, e]]]
                if seen_N[node] != stamp:
                    reached += 1
                    fresh += int(seen_N[node] != stamp - 1)
                    seen_N[node] = stamp
    return reached, fresh


def reach_of(problem: Problem, slot_LP: Ints, demand: Demand) -> tuple[float, float]:
    """Nodes that a token reaches in a layer, and of these those that it was not in for the layer before."""
    tokens = demand.ids_TLK.shape[0] * demand.ids_TLK.shape[1]
    if not tokens:
        return float("nan"), float("nan")
    from moesim.layout import Placement

    slots_LEX, count_LE = Placement(slot_LP, problem.num_ranks).replicas(problem.num_experts)
    node_P = problem.node_R[problem.rank_P]
    reached, fresh = _reach(demand.ids_TLK, slots_LEX, count_LE, node_P, problem.num_nodes)
    return reached / tokens, fresh / tokens


def scored(problem: Problem, slot_LP: Ints, demand: Demand, share_LP: Floats | None = None) -> Score:
    """Every term, on a demand.

    Args:
        share_LP: what each slot gets of its expert's tokens, for the terms of load; even shares if None.
    """
    rank_SLR = rank_load_SLR(problem, slot_LP, demand.load_SLE, share_LP)
    return Score(
        load=float(fullest_SL(problem, rank_SLR.sum(axis=0, keepdims=True)).mean()),
        steps=float(fullest_SL(problem, rank_SLR).mean()),
        rank=left_fraction(problem, slot_LP, demand, "rank"),
        node=left_fraction(problem, slot_LP, demand, "node"),
        rack=left_fraction(problem, slot_LP, demand, "rack") if problem.per_rack else 0.0,
        spread=spread_fraction(problem, slot_LP, demand),
        moved=moved_fraction(problem, slot_LP, problem.today) if problem.today is not None else 0.0,
        **dict(zip(("reach", "fresh"), reach_of(problem, slot_LP, demand), strict=True)),
    )
