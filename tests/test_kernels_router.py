"""Router, permute and copy against torch, in Triton's interpreter."""

from __future__ import annotations

import pytest
from triton_interpreter import interpreted

RULES = {
    "mixtral": (8, ("softmax", True, 1, 1, 1.0), 2),
    "olmoe, raw weights": (64, ("softmax", False, 1, 1, 1.0), 8),
    "odd": (37, ("softmax", True, 1, 1, 1.0), 5),
    "deepseek-v3": (64, ("sigmoid", True, 8, 4, 2.5), 8),
    "odd groups": (30, ("sigmoid", False, 5, 2, 1.0), 6),
    "groups of one": (6, ("sigmoid", True, 6, 3, 1.0), 3),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@interpreted
def test_router_matches_float64(name, bias):
    import torch
    from moesim.kernels.router import Rule, reference, route

    num_experts, rest, top_k = RULES[name]
    draw = torch.Generator().manual_seed(num_experts)
    logit_TE = torch.randn(21, num_experts, generator=draw)
    bias_E = torch.randn(num_experts, generator=draw) * 0.3 if bias else None
    rule = Rule(top_k, *rest)
    expert_TK, weight_TK = route(logit_TE, rule, bias_E)
    exact_TK, exact_weight_TK = reference(logit_TE, rule, bias_E)
    torch.testing.assert_close(expert_TK.long(), exact_TK, rtol=0, atol=0)
    torch.testing.assert_close(weight_TK.double(), exact_weight_TK, rtol=1e-5, atol=1e-7)


@interpreted
def test_router_breaks_ties_by_id():
    import torch
    from moesim.kernels.router import Rule, route

    expert_TK, weight_TK = route(torch.zeros(3, 9), Rule(4))
    assert expert_TK.tolist() == [[0, 1, 2, 3]] * 3
    assert weight_TK.tolist() == [[0.25] * 4] * 3


@pytest.mark.parametrize(
    ("num_experts", "rule", "message"),
    [
        (8, {"top_k": 9}, "top_k must be 1 to 8"),
        (8, {"top_k": 2, "num_groups": 3}, "equal groups"),
        (8, {"top_k": 2, "scoring": "relu"}, "softmax or sigmoid"),
    ],
)
@interpreted
def test_router_refuses_rules_that_do_not_fit(num_experts, rule, message):
    import torch
    from moesim.kernels.router import Rule, route

    with pytest.raises(ValueError, match=message):
        route(torch.zeros(1, num_experts), Rule(**rule))


LOADS = {"random": None, "all on one": 3, "none of ours": 99}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("tokens", "top_k", "block_m"), [(300, 2, 16), (5, 3, 32), (1, 1, 16)])
@interpreted
def test_permute_is_a_stable_sort(load, tokens, top_k, block_m):
    import torch
    from moesim.kernels.permute import permute

    E = 7
    draw = torch.Generator().manual_seed(tokens)
    # Ids from -1 and up to 8: -1, 7 and 8 are experts of other ranks.
    expert_TK = torch.randint(-1, 9, (tokens, top_k), generator=draw)
    if LOADS[load] is not None:
        expert_TK.fill_(LOADS[load])
    rows = permute(expert_TK, E, block_m)
    flat = expert_TK.flatten()
    assert rows.count_E.tolist() == [int((flat == e).sum()) for e in range(E)]
    expected, blocks = [], []
    for e in range(E):
        slots = torch.where(flat == e)[0].tolist()
        padding = -len(slots) % block_m
        expected += slots + [flat.numel()] * padding
        blocks += [e] * ((len(slots) + padding) // block_m)
    assert rows.used.item() == len(blocks)
    assert rows.expert_B.tolist() == blocks + [-1] * (rows.expert_B.numel() - len(blocks))
    assert rows.slot_P.tolist() == expected + [flat.numel()] * (rows.slot_P.numel() - len(expected))
    place = {slot: row for row, slot in enumerate(expected)}
    assert rows.row_TK.flatten().tolist() == [
        place[s] if 0 <= e < E else -1 for s, e in enumerate(flat.tolist())
    ]  # fmt: skip


@pytest.mark.parametrize("splits", [0, 3], ids=["whole", "partial sums"])
@interpreted
def test_gather_then_combine(splits):
    import torch
    from moesim.kernels.permute import combine, combine_reference, gather, permute

    draw = torch.Generator().manual_seed(splits)
    expert_TK = torch.randint(0, 6, (23, 2), generator=draw)  # expert 5 is another rank's
    x_TH, weight_TK = torch.randn(23, 72, generator=draw), torch.rand(23, 2, generator=draw)
    rows = permute(expert_TK, 5, 16)
    y_PH = gather(x_TH, rows, torch.full((rows.slot_P.numel(), 72), float("nan")))
    used = int(rows.used) * 16
    assert y_PH[:used].isfinite().all()
    assert y_PH[used:].isnan().all()
    real = torch.where(rows.slot_P < 46)[0]
    assert torch.equal(y_PH[real], x_TH[rows.slot_P[real].long() // 2])
    parts = y_PH if not splits else torch.stack([y_PH * share for share in (0.5, 0.25, 0.25)])
    out_TH = combine(parts, rows, weight_TK, torch.full((23, 72), float("nan")))
    exact = combine_reference(y_PH, rows, weight_TK)
    torch.testing.assert_close(out_TH.double(), exact, rtol=1e-5, atol=1e-6)
    # Every row is its token's, so the whole is the token times the weights it kept.
    kept = (weight_TK * (expert_TK < 5)).sum(1, keepdim=True)
    torch.testing.assert_close(out_TH, x_TH * kept, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 1000, 4097])
@interpreted
def test_copy(size):
    import torch
    from moesim.kernels.memory_copy import copy

    x = torch.randn(size, generator=torch.Generator().manual_seed(size))
    assert torch.equal(copy(x, torch.full_like(x, float("nan"))), x)
