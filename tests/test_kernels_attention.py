"""Decode attention over a paged cache against float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
from triton_interpreter import interpreted

# query heads, key heads, key width, value width, values are columns of the keys
SHAPES = {
    "gqa": (6, 2, 32, 32, False),
    "odd width": (4, 4, 24, 24, False),
    "mla": (20, 1, 48, 32, True),
}


def cached(name, dtype, seed, lengths, page=8):
    import torch

    heads, kv_heads, k_width, width, shared = SHAPES[name]
    draw = torch.Generator().manual_seed(seed)
    pages = sum(-(-n // page) for n in lengths) + 3
    order = torch.randperm(pages, generator=draw).tolist()
    table = torch.zeros(len(lengths), max(1, -(-max(lengths) // page)), dtype=torch.int32)
    for b, n in enumerate(lengths):
        for i in range(-(-n // page)):
            table[b, i] = order.pop()

    def normal(*size):
        return torch.randn(size, generator=draw).to(getattr(torch, dtype))

    k = normal(pages, page, kv_heads, k_width)
    v = None if shared else normal(pages, page, kv_heads, width)
    # Pages that no sequence owns must not be read.
    for spare in order:
        k[spare] = float("nan")
        if v is not None:
            v[spare] = float("nan")
    q = normal(len(lengths), heads, k_width)
    return q, k, v, table, torch.tensor(lengths, dtype=torch.int32), k_width**-0.5, width


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@interpreted
def test_matches_float64(name, dtype, tolerance):
    import torch
    from moesim.kernels.decode_attention import Split, decode_attention, reference

    arguments = cached(name, dtype, len(name), [1, 37, 90])
    exact = reference(*arguments)
    out = decode_attention(*arguments, Split(16, 16, 3))
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance * float(exact.abs().max()))


@interpreted
def test_splits_change_nothing_but_rounding():
    import torch
    from moesim.kernels.decode_attention import Split, decode_attention

    arguments = cached("gqa", "float32", 5, [50, 7])
    whole = decode_attention(*arguments, Split(16, 16, 1))
    torch.testing.assert_close(decode_attention(*arguments, Split(16, 16, 7)), whole, rtol=1e-5, atol=1e-6)


@interpreted
def test_equal_keys_average_the_values_and_an_empty_context_gives_zeros():
    import torch
    from moesim.kernels.decode_attention import Split, decode_attention

    q, k, v, table, length, scale, width = cached("gqa", "float32", 6, [19, 0])
    k.fill_(1.0)
    out = decode_attention(q, k, v, table, length, scale, width, Split(16, 16, 2))
    mean = v[table[0].long()].flatten(0, 1)[:19].mean(0).repeat_interleave(3, 0)
    torch.testing.assert_close(out[0], mean, rtol=1e-5, atol=1e-6)
    assert torch.equal(out[1], torch.zeros_like(out[1]))


def test_flops_and_bytes_of_a_shape_one_can_count():
    pytest.importorskip("triton", reason="kernels need triton: moesim[kernels]")
    from moesim.kernels.decode_attention import AttentionShape, flops, num_bytes

    gqa, mla = AttentionShape("", 2, 10, 4, 2, 8, 8), AttentionShape("", 2, 10, 4, 1, 12, 8, True)
    assert flops(gqa) == 2 * 10 * 4 * (2 * 8 + 2 * 8)
    assert num_bytes(gqa) == 2 * (10 * 2 * 16 + 4 * 16) * 2
    assert num_bytes(mla) == 2 * (10 * 12 + 4 * 20) * 2
