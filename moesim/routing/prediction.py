"""Prediction: how well the experts of a later layer can be told before it is reached, by what, and at what width.

Width is the number of experts that are guessed (and would be prefetched); horizon the number of MoE layers ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.routing.load import Floats, counts_LE
from moesim.routing.locality import mean_over_first
from moesim.routing.structure import check_horizon
from moesim.routing.trace import RoutingTrace

Ids = NDArray[np.unsignedinteger]


@dataclass(frozen=True, eq=False)
class Recall:
    """How good the guesses of layers h, h + 1, ... are.

    Attributes:
        recall_LW: share of a layer's K experts among the W first guesses, [L - h, W]; column w - 1 is width w.
        top1_L: share of tokens whose first guess is the true top-1, [L - h].
    """

    recall_LW: Floats
    top1_L: Floats

    def at_width(self, width: int) -> Floats:
        """Recall of the first `width` guesses, [L - h]; NaN where no guess is so wide."""
        if width > self.recall_LW.shape[1]:
            return np.full(len(self.recall_LW), np.nan)
        return np.asarray(self.recall_LW[:, width - 1])


def gate_recall(trace: RoutingTrace, horizon: int = 1) -> Recall | None:
    """Guesses that the later layer's own router made from the earlier layer's input; None where none were captured.

    Its widths end with the captured ones. Source: speculative loading of Mixtral-offloading (arXiv 2312.17238),
    section 3.2.

    Raises:
        ValueError: `horizon` is not positive.
    """
    check_horizon(horizon)
    if horizon > len(trace.predicted_HTLW):
        return None
    guessed_TLW, true_TLK = trace.predicted_HTLW[horizon - 1], trace.expert_ids_TLK[:, horizon:]
    hits_LW = np.stack(
        [(guessed_TLW[:, :, w, None] == true_TLK).sum(axis=(0, 2)) for w in range(guessed_TLW.shape[2])], axis=1
    )
    recall_LW = hits_LW.cumsum(axis=1) / (trace.num_tokens * trace.top_k)
    return Recall(recall_LW, mean_over_first(guessed_TLW[:, :, 0] == true_TLK[:, :, 0]))


def popularity_recall(trace: RoutingTrace, horizon: int = 1) -> Recall:
    """Guesses that are the same for every token: the most used experts of the later layer in the whole trace.

    Widths 1 ... E; for the top-1, the expert that is top-1 most often.

    Raises:
        ValueError: `horizon` is not positive.
    """
    check_horizon(horizon)
    later_TLK = trace.expert_ids_TLK[:, horizon:]
    return _popularity(later_TLK, later_TLK, trace.num_experts)


def table_recall(trace: RoutingTrace, horizon: int = 1) -> tuple[Recall, Recall] | None:
    """Guesses from a transition table, and from popularity, both learnt on every second request; None for one request.

    The table holds P(b | a): of the tokens that chose a in layer l, the share that chose b in layer l + h. A token's
    guesses are the b with the greatest sum of P(b | a) over its K experts a (the lower id of two), widths 1 ... E; for
    the top-1, b is the later layer's top-1. Learnt on requests 0, 2, 4, ... in their order, judged on 1, 3, 5, ...
    Source: the inter-layer expert affinity of ExFlow (arXiv 2401.08383), used to predict.

    Raises:
        ValueError: `horizon` is not positive.
    """
    check_horizon(horizon)
    is_judged_T = np.unique(trace.request_T, return_inverse=True)[1] % 2 == 1
    if not is_judged_T.any():
        return None
    learnt_TLK, judged_TLK = trace.expert_ids_TLK[~is_judged_T], trace.expert_ids_TLK[is_judged_T]
    E, num_judged = trace.num_experts, len(judged_TLK)
    by_rank, top1 = [], []
    for layer in range(trace.num_layers - horizon):
        learnt_TK, learnt_later_TK = learnt_TLK[:, layer], learnt_TLK[:, layer + horizon]
        now_TK, later_TK = judged_TLK[:, layer], judged_TLK[:, layer + horizon]
        by_rank.append(_hits_by_rank(_table(learnt_TK, learnt_later_TK, E), now_TK, later_TK))
        top1.append(_hits_by_rank(_table(learnt_TK, learnt_later_TK[:, :1], E), now_TK, later_TK[:, :1])[0])
    recall_LW = np.asarray(by_rank, dtype=np.float64).reshape(-1, E).cumsum(axis=1) / (num_judged * trace.top_k)
    recall = Recall(recall_LW, np.asarray(top1, dtype=np.float64) / num_judged)
    return recall, _popularity(learnt_TLK[:, horizon:], judged_TLK[:, horizon:], E)


def _popularity(learnt_TLK: Ids, judged_TLK: Ids, num_experts: int) -> Recall:
    """Guess for the judged tokens the experts that the learnt ones use most."""
    order_LE = np.argsort(-counts_LE(learnt_TLK, num_experts), axis=1, kind="stable")
    hits_LE = np.take_along_axis(counts_LE(judged_TLK, num_experts), order_LE, axis=1).cumsum(axis=1)
    guess_L = counts_LE(learnt_TLK[:, :, :1], num_experts).argmax(axis=1)
    num_uses = judged_TLK.shape[0] * judged_TLK.shape[2]
    return Recall(hits_LE / num_uses, mean_over_first(judged_TLK[:, :, 0] == guess_L))


@njit(cache=True)
def _table(now_TK, later_TJ, num_experts):  # type: ignore[no-untyped-def]
    """P(b among the later experts | a among the experts now), float64 [E, E]; 0 where a was never chosen."""
    table_EE, chosen_E = np.zeros((num_experts, num_experts)), np.zeros(num_experts)
    for t in range(now_TK.shape[0]):
        for k in range(now_TK.shape[1]):
            chosen_E[now_TK[t, k]] += 1
            for j in range(later_TJ.shape[1]):
                table_EE[now_TK[t, k], later_TJ[t, j]] += 1
    for a in range(num_experts):
        table_EE[a] /= max(chosen_E[a], 1.0)
    return table_EE


@njit(cache=True)
def _hits_by_rank(table_EE, now_TK, later_TJ):  # type: ignore[no-untyped-def]
    """How often a true expert is the first, second, ... guess, [E]."""
    num_experts = table_EE.shape[0]
    hits_E = np.zeros(num_experts, np.int64)
    score_E = np.empty(num_experts)
    for t in range(now_TK.shape[0]):
        score_E[:] = 0.0
        for k in range(now_TK.shape[1]):
            for b in range(num_experts):
                score_E[b] += table_EE[now_TK[t, k], b]
        for j in range(later_TJ.shape[1]):
            true = later_TJ[t, j]
            rank = 0
            for b in range(num_experts):
                rank += score_E[b] > score_E[true] or (score_E[b] == score_E[true] and b < true)
            hits_E[rank] += 1
    return hits_E
