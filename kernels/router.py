"""Router: from logits to each token's experts and weights, in one kernel.

Softmax routing (Mixtral, Qwen3-MoE, OLMoE): the K largest probabilities, renormalised to sum 1 or not. Sigmoid routing
(DeepSeek-V3): a correction bias is added for the choice only, groups are scored by the sum of their two best experts,
the best groups stay, and the K best experts of those get their sigmoid, renormalised and scaled. Ties go to the lower
id. Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2; auxiliary-loss-free balancing, arXiv 2408.15664.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from moesim.kernels.tiles import ceil_div, check_contiguous, power_of_two


@dataclass(frozen=True)
class Rule:
    """How a family chooses."""

    top_k: int
    scoring: str = "softmax"  # or "sigmoid"
    renormalise: bool = True
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0


@triton.jit
def best(score, AXIS: tl.constexpr):
    """Largest value along an axis, and the lowest place that holds it; both keep the axis with length 1."""
    value = tl.max(score, axis=AXIS, keep_dims=True)
    # Axes are [tokens, groups] or [tokens, experts]: places run along the last.
    place = tl.broadcast_to(tl.arange(0, score.shape[AXIS])[None, :], score.shape)
    return value, tl.min(tl.where(score == value, place, score.shape[AXIS]), axis=AXIS, keep_dims=True), place


@triton.jit
def keep_groups(choice, T: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, TOP: tl.constexpr):
    """Excludes, with -inf, all experts but those of the TOP groups whose two best experts sum highest."""
    grouped = tl.reshape(choice, [T, GROUPS, SIZE])
    place = tl.arange(0, SIZE)[None, None, :]
    first = tl.max(grouped, axis=2)
    where = tl.min(tl.where(grouped == first[:, :, None], place, SIZE), axis=2)
    second = tl.max(tl.where(place == where[:, :, None], float("-inf"), grouped), axis=2)
    # A group of one expert counts that one.
    score = first + tl.where(second == float("-inf"), 0.0, second)
    kept = tl.zeros([T, GROUPS], tl.int32)
    for _ in tl.static_range(TOP):
        _value, at, place_TG = best(score, 1)
        kept = tl.where(place_TG == at, 1, kept)
        score = tl.where(place_TG == at, float("-inf"), score)
    return tl.reshape(tl.where(kept[:, :, None] > 0, grouped, float("-inf")), [T, GROUPS * SIZE])


@triton.jit
def router_kernel(
    logit_ptr, bias_ptr, expert_ptr, weight_ptr, T, E, group_size, num_groups, scale,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, BIAS: tl.constexpr, RENORMALISE: tl.constexpr,
    TOP_GROUPS: tl.constexpr, BLOCK_T: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    LIMITED: tl.constexpr,
):  # fmt: skip
    """Columns are laid out as GROUPS x SIZE, both powers of two; those that stand for no expert never win."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, GROUPS * SIZE)
    group, member = column // SIZE, column % SIZE
    expert = group * group_size + member
    exists = (group < num_groups) & (member < group_size)
    mask = (token < T)[:, None] & exists[None, :]
    at = token.to(tl.int64)[:, None] * E + expert[None, :]
    logit = tl.load(logit_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if SIGMOID:
        score = tl.sigmoid(logit)
    else:
        logit = tl.where(exists[None, :], logit, float("-inf"))
        score = tl.exp(logit - tl.max(logit, axis=1, keep_dims=True))
        score = score / tl.sum(score, axis=1, keep_dims=True)
    choice = score
    if BIAS:
        choice = score + tl.load(bias_ptr + expert, mask=exists, other=0.0).to(tl.float32)[None, :]
    choice = tl.where(exists[None, :], choice, float("-inf"))
    if LIMITED:
        choice = keep_groups(choice, BLOCK_T, GROUPS, SIZE, TOP_GROUPS)
    total = tl.zeros([BLOCK_T], tl.float32)
    for k in tl.static_range(TOP_K):
        _value, at, place = best(choice, 1)
        hit = place == at
        weight = tl.sum(tl.where(hit, score, 0.0), axis=1)
        chosen = tl.sum(tl.where(hit, expert[None, :], 0), axis=1)
        choice = tl.where(hit, float("-inf"), choice)
        total += weight
        tl.store(expert_ptr + token * TOP_K + k, chosen, mask=token < T)
        tl.store(weight_ptr + token * TOP_K + k, weight * scale, mask=token < T)
    if RENORMALISE:
        # Each thread group reads back only rows that this program wrote.
        tl.debug_barrier()
        for k in tl.static_range(TOP_K):
            weight = tl.load(weight_ptr + token * TOP_K + k, mask=token < T, other=0.0)
            tl.store(weight_ptr + token * TOP_K + k, weight / total, mask=token < T)


def route(logit_TE: torch.Tensor, rule: Rule, bias_E: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids (int32) and weights (fp32), both [T, K], best first.

    Raises:
        ValueError: the rule does not fit the number of experts.
    """
    T, E = logit_TE.shape
    if rule.scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring must be softmax or sigmoid, given {rule.scoring!r}")
    if E % rule.num_groups or not 1 <= rule.top_groups <= rule.num_groups:
        raise ValueError(f"{E} experts do not make {rule.num_groups} equal groups of which {rule.top_groups} stay")
    group_size = E // rule.num_groups
    if not 1 <= rule.top_k <= group_size * rule.top_groups:
        raise ValueError(f"top_k must be 1 to {group_size * rule.top_groups}, given {rule.top_k}")
    check_contiguous(logit_TE=logit_TE)
    expert_TK = torch.empty((T, rule.top_k), dtype=torch.int32, device=logit_TE.device)
    weight_TK = torch.empty((T, rule.top_k), dtype=torch.float32, device=logit_TE.device)
    groups, size = power_of_two(rule.num_groups), power_of_two(group_size)
    block_t = max(1, min(16, 1024 // (groups * size)))
    if T:
        router_kernel[(ceil_div(T, block_t),)](
            logit_TE, logit_TE if bias_E is None else bias_E, expert_TK, weight_TK,
            T, E, group_size, rule.num_groups, rule.scale,
            TOP_K=rule.top_k, SIGMOID=rule.scoring == "sigmoid", BIAS=bias_E is not None,
            RENORMALISE=rule.renormalise, TOP_GROUPS=rule.top_groups, BLOCK_T=block_t, GROUPS=groups, SIZE=size,
            LIMITED=rule.top_groups < rule.num_groups, num_warps=4,
        )  # fmt: skip
    return expert_TK, weight_TK


def reference(
    logit_TE: torch.Tensor, rule: Rule, bias_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float64 with torch's own softmax and topk."""
    logit_TE = logit_TE.double()
    score_TE = logit_TE.sigmoid() if rule.scoring == "sigmoid" else logit_TE.softmax(1)
    choice_TE = score_TE if bias_E is None else score_TE + bias_E.double()
    if rule.top_groups < rule.num_groups:
        grouped = choice_TE.unflatten(1, (rule.num_groups, -1))
        best_groups = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(2).topk(rule.top_groups).indices
        out = torch.ones(grouped.shape[:2], dtype=torch.bool, device=grouped.device).scatter(1, best_groups, False)
        choice_TE = grouped.masked_fill(out[..., None], float("-inf")).flatten(1)
    expert_TK = choice_TE.topk(rule.top_k).indices
    weight_TK = score_TE.gather(1, expert_TK)
    if rule.renormalise:
        weight_TK = weight_TK / weight_TK.sum(1, keepdim=True)
    return expert_TK, weight_TK * rule.scale


def num_bytes(num_tokens: int, num_experts: int, top_k: int, logit_bytes: int = 4) -> int:
    """Logits read, ids and weights written."""
    return num_tokens * (num_experts * logit_bytes + 8 * top_k)


def flops(num_tokens: int, num_experts: int, top_k: int) -> int:
    """Softmax (5 per logit: largest, difference, power, sum, quotient) and one comparison per logit and choice."""
    return num_tokens * num_experts * (5 + top_k)


#: (num_tokens, num_experts, rule) of Mixtral-8x7B, OLMoE-1B-7B, Qwen3-30B-A3B and DeepSeek-V3, from their config.json.
CASES = tuple(
    (tokens, num_experts, rule)
    for num_experts, rule in (
        (8, Rule(2)), (64, Rule(8, renormalise=False)), (128, Rule(8)), (256, Rule(8, "sigmoid", True, 8, 4, 2.5)),
    )
    for tokens in (1, 64, 1024, 8192)
)  # fmt: skip
