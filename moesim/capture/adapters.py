"""Adapters: how to read what a router chose, one for each way in which model families hand the choice on.

Nearly every family hands `(hidden, ids, weights)` to an experts module, and the choice is read there, from what is
dispatched. It is never computed again from router logits, since many families bend the choice afterwards (groups,
correction biases, hashes). The few families whose experts are given something else have an adapter of their own,
which reads the router's output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

EXPERTS = re.compile(r"Experts$")
ROUTER = re.compile(r"(Router|Gating|MoEV1Gate)$")
ATTENTION = re.compile(r"(^|[._])(self_)?(attn|attention)\.")


class Choice(NamedTuple):
    """What a router chose for N tokens, best expert first where both are known.

    Attributes:
        ids: int64 [N, K], or None where the router only scores.
        weights: float32 [N, K], or None.
        scores: float [N, E], what each expert got before the choice, or None.
    """

    ids: Tensor | None
    weights: Tensor | None
    scores: Tensor | None


@dataclass(frozen=True)
class Adapter:
    """One way of reading a router.

    Attributes:
        name: the idea, as `moesim capture --families` shows it.
        routers: which router classes it reads, by name.
        read: the choice in the output of a router, given the router and the place of the scores in a tuple.
        at_experts: whether the choice that counts is the one that the experts module is given.
    """

    name: str
    routers: re.Pattern[str]
    read: Callable[[nn.Module, Any, int | None], Choice]
    at_experts: bool = False


def _plain(_router: nn.Module, output: Any, place: int | None) -> Choice:
    """Ids by type, weights by the ids' shape, scores by the place that the model names, else by their width."""
    values = list(output) if isinstance(output, tuple | list) else [output]
    tables = [_table(value) if isinstance(value, Tensor) and value.ndim >= 2 else None for value in values]
    ids = next((t for t in tables if t is not None and not t.is_floating_point() and t.dtype != torch.bool), None)
    floats = {at: t for at, t in enumerate(tables) if t is not None and t.is_floating_point()}
    width = 0 if ids is None else ids.shape[1]
    scored = [at for at in ([place] if place in floats else floats) if floats[at].shape[1] >= width]
    scores = next((at for at in scored if floats[at].shape[1] > width), scored[0] if scored else None)
    weights = None
    if ids is not None:
        weights = next((t for at, t in floats.items() if at != scores and t.shape == ids.shape), None)
        if weights is None and scores is not None and floats[scores].shape == ids.shape:
            weights, scores = floats[scores], None
    return best_first(ids, weights, None if scores is None else floats[scores])


def _dense(router: Any, output: Any, _place: int | None) -> Choice:
    """Llama 4: the router gives each token a weight for every expert, 0 for those not chosen, and the logits."""
    weights, logits = map(_table, output)
    return _choose(weights, logits, int(router.top_k))


def _top1_mask(_router: nn.Module, output: Any, _place: int | None) -> Choice:
    """Switch: a one-hot mask, empty where the expert was full, the weight of the choice, and the logits."""
    mask, weight, logits = map(_table, output)
    return _choose(mask * weight, logits, 1)


def _top2_mask(_router: nn.Module, output: Any, _place: int | None) -> Choice:
    """NLLB: the weights of both choices as a row over the experts, 0 for what was dropped, and the logits."""
    _first, weights, logits = map(_table, output)
    return _choose(weights, logits, 2)


def _sorted_assignments(router: Any, output: Any, _place: int | None) -> Choice:
    """JetMoE: the token-expert pairs sorted by expert, how many each expert has, and a weight for each pair."""
    order, _token, weight, counts, logits = output
    num_pairs = int(order.numel())
    expert = torch.repeat_interleave(
        torch.arange(len(counts), device=order.device), torch.as_tensor(counts, device=order.device)
    )
    ids = torch.empty(num_pairs, dtype=torch.int64, device=order.device)
    weights = torch.empty(num_pairs, dtype=weight.dtype, device=order.device)
    ids[order], weights[order] = expert, weight.detach()
    top_k = int(router.top_k)
    return best_first(ids.view(-1, top_k), weights.view(-1, top_k), _table(logits))


def _skip_expert(router: Any, output: Any, place: int | None) -> Choice:
    """ZAYA: a token that skips the experts is handed on as (expert 0, weight 0); here it has the id after the last."""
    choice = _plain(router, output, place)
    assert choice.ids is not None and choice.weights is not None
    return choice._replace(ids=choice.ids.masked_fill(choice.weights == 0, int(router.num_experts)))


PLAIN = Adapter("what the experts are given", ROUTER, _plain, at_experts=True)
ADAPTERS = (
    Adapter("router: dense weights", re.compile(r"^Llama4Router$"), _dense),
    Adapter("router: one-hot mask, drops", re.compile(r"^SwitchTransformersTop1Router$"), _top1_mask),
    Adapter("router: two choices, drops", re.compile(r"^NllbMoeTop2Router$"), _top2_mask),
    Adapter("router: pairs by expert", re.compile(r"^JetMoeTopKGating$"), _sorted_assignments),
    Adapter("router: may skip experts", re.compile(r"^ZayaRouter$"), _skip_expert),
    PLAIN,
)
"""Looked through in this order."""


def adapter_of(router: nn.Module) -> Adapter | None:
    """The adapter for a module, None where its class is no router."""
    name = type(router).__name__
    return next((adapter for adapter in ADAPTERS if adapter.routers.search(name)), None)


def given_to_experts(values: Sequence[Any]) -> Choice:
    """The choice among what an experts module is given after the hidden states, told by type and shape."""
    return _plain(nn.Identity(), list(values), None)._replace(scores=None)


def best_first(ids: Tensor | None, weights: Tensor | None, scores: Tensor | None) -> Choice:
    """Ids and weights ordered by falling weight; some routers return their choice unsorted."""
    if ids is None or weights is None:
        return Choice(ids, None, scores)
    weights = weights.float()
    order = weights.argsort(dim=-1, descending=True, stable=True)
    return Choice(ids.long().gather(-1, order), weights.gather(-1, order), scores)


def ranking(choice: Choice, width: int) -> Tensor | None:
    """`width` experts, best first: those chosen, then the others by falling score; None where too few are known."""
    ids, scores = choice.ids, choice.scores
    if ids is None or width <= ids.shape[1]:
        return None if ids is None else ids[:, :width]
    if scores is None or scores.shape[1] < width:
        return None
    others = scores.float().scatter(1, ids, float("-inf")).topk(width - ids.shape[1], dim=1).indices
    return torch.cat([ids, others], dim=1)


def _choose(weights: Tensor, logits: Tensor, top_k: int) -> Choice:
    """The `top_k` of each row by weight; where fewer have one, those dropped, which the logits still tell."""
    kept = logits.float().softmax(dim=1) + 2 * (weights > 0)
    ids = kept.topk(top_k, dim=1).indices
    return best_first(ids, weights.gather(1, ids), logits)


def _table(value: Tensor) -> Tensor:
    """[..., E] -> [N, E], out of the graph."""
    return value.detach().reshape(-1, value.shape[-1])
