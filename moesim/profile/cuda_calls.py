"""What each cell of a CUDA device calls: the library's operator, or a Triton kernel with each of its candidates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear, pad, scaled_dot_product_attention, silu

from moesim.profile.cuda_cells import LIBRARY, MLA_KEYS, MLA_VALUES, chosen_experts, distribution_of, kernel_of
from moesim.profile.shapes import Cell

Candidates = Mapping[str, Callable[[], object]]
"""Calls that do the same, by the words of their tile; "" where there is nothing to choose."""
PAGE = 64
"""Tokens of a page of the cache."""
FP8_GROUP = INT4_GROUP = 128
MLA_QUERY, MLA_OUT = 192, 128
"""Widths of queries and values of DeepSeek-V3 in prefill."""
NUM_SPLITS = (1, 2, 4)
_CUDA: Any = torch.cuda


class Calls:
    """Makes the calls of cells on one device; experts' weights are made once and kept."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._weights: dict[tuple[object, ...], tuple[torch.Tensor, ...]] = {}

    def of(self, cell: Cell) -> Candidates:
        """The candidates of a cell.

        Raises:
            ValueError: there is no such operator.
        """
        if cell.op.startswith("copy_"):
            return {"": self._host_copy(cell.op, *cell.shape)}
        make = getattr(self, f"_{cell.op}", None)
        if make is None:
            raise ValueError(f"{cell.op} is no operator that is timed on a CUDA device")
        found: Candidates = make(cell)
        return found

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.bfloat16, device=self.device)

    def _bytes(self, dtype: torch.dtype, *size: int) -> torch.Tensor:
        """Bytes that are finite and positive in every format."""
        return torch.randint(1, 100, size, dtype=torch.uint8, device=self.device).view(dtype)

    def _gemm(self, cell: Cell) -> Candidates:
        m, n, k = cell.shape
        if cell.dtype == "bf16":
            return {"": partial(linear, self._random(m, k), self._random(n, k))}
        left, right = self._bytes(torch.float8_e4m3fn, m, k), self._bytes(torch.float8_e4m3fn, n, k).t()
        one = torch.ones((), device=self.device)
        scaled = partial(torch._scaled_mm, left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        return {f"use_fast_accum={fast}": partial(scaled, use_fast_accum=fast) for fast in (True, False)}

    def _moe(self, cell: Cell) -> Candidates:
        tokens, hidden, width, top_k, experts = cell.shape[:5]
        ids = torch.from_numpy(chosen_experts(tokens, top_k, experts, distribution_of(cell))).to(self.device)
        weights = torch.full((tokens, top_k), 1 / top_k, device=self.device)
        key = (cell.dtype, hidden, width, experts)
        if key not in self._weights:
            self._weights[key] = self._experts_weights(cell.dtype, hidden, width, experts)
        held = self._weights[key]
        given = (self._random(tokens, hidden), *held, ids, weights)
        if kernel_of(cell) == LIBRARY:
            return {"": partial(torch_experts, *given)}
        return _triton_experts(cell.dtype, kernel_of(cell), given, tokens * top_k / experts)

    def _experts_weights(self, dtype: str, hidden: int, width: int, experts: int) -> tuple[torch.Tensor, ...]:
        """In the order of the kernels' inputs: gate and up, their scales if any, down, its scales if any."""
        sides = ((2 * width, hidden), (width, hidden)), ((hidden, width), (hidden, width))
        found: list[torch.Tensor] = []
        for (rows, columns), (scaled_rows, _) in sides:
            if dtype == "bf16":
                found.append(self._random(experts, rows, columns) * columns**-0.5)
            elif dtype == "int4":
                found.append(self._bytes(torch.uint8, experts, rows, columns // 2))
                found.append(self._random(experts, rows, columns // INT4_GROUP).abs() * 0.01)
            else:
                blocks = (rows // scaled_rows) * -(-scaled_rows // FP8_GROUP)  # gate and up are scaled apart
                found.append(self._bytes(torch.float8_e4m3fn, experts, rows, columns))
                found.append(torch.full((experts, blocks, -(-columns // FP8_GROUP)), 1e-3, device=self.device))
        return tuple(found)

    def _generation_attention(self, cell: Cell) -> Candidates:
        heads, kv_heads, width = cell.shape[2:]
        return self._decode(cell, heads, kv_heads, width, width, width**-0.5, shared=False)

    def _generation_mla(self, cell: Cell) -> Candidates:
        return self._decode(cell, cell.shape[2], 1, MLA_KEYS, MLA_VALUES, MLA_QUERY**-0.5, shared=True)

    def _decode(
        self, cell: Cell, heads: int, kv_heads: int, k_width: int, width: int, scale: float, *, shared: bool
    ) -> Candidates:
        batch, context = cell.shape[:2]
        if kernel_of(cell) == LIBRARY:
            query, keys = self._random(batch, heads, 1, k_width), self._random(batch, kv_heads, context, k_width)
            values = keys[..., :width] if shared else self._random(batch, kv_heads, context, width)
            grouped = query.view(batch, kv_heads, heads // kv_heads, k_width)
            found = {
                "SDPA, heads of a group as queries": partial(
                    scaled_dot_product_attention, grouped, keys, values, scale=scale
                ),
                "two products": partial(torch_attention, grouped, keys, values, scale),
            }
            if not shared:  # else it would write each key out for all heads
                gqa = partial(scaled_dot_product_attention, query, keys, values, scale=scale, enable_gqa=True)
                found["SDPA, enable_gqa"] = gqa
            return found
        from moesim.kernels.decode_attention import GQA_SPLITS, MLA_SPLITS, decode_attention

        pages = -(-context // PAGE)
        table = torch.arange(batch * pages, dtype=torch.int32, device=self.device).view(batch, pages)
        length = torch.full((batch,), context, dtype=torch.int32, device=self.device)
        key = self._random(batch * pages, PAGE, kv_heads, k_width)
        value = None if shared else self._random(batch * pages, PAGE, kv_heads, width)
        query = self._random(batch, heads, k_width)
        return {
            str(sizes): partial(decode_attention, query, key, value, table, length, scale, width, sizes)
            for sizes in (MLA_SPLITS if shared else GQA_SPLITS)
        }

    def _context_attention(self, cell: Cell) -> Candidates:
        batch, tokens, heads, kv_heads, width = cell.shape
        query = self._random(batch, heads, tokens, width)
        key, value = (self._random(batch, kv_heads, tokens, width) for _ in range(2))
        return {"": partial(scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True)}

    def _context_mla(self, cell: Cell) -> Candidates:
        batch, tokens, heads = cell.shape
        query, key = (self._random(batch, heads, tokens, MLA_QUERY) for _ in range(2))
        value = self._random(batch, heads, tokens, MLA_OUT)
        wide = partial(torch_padded_attention, query, key, value)
        return {"SDPA": partial(scaled_dot_product_attention, query, key, value, is_causal=True), "values padded": wide}

    def _router(self, cell: Cell) -> Candidates:
        tokens, experts, top_k = cell.shape
        logits = torch.randn((tokens, experts), device=self.device)
        if kernel_of(cell) == LIBRARY:
            return {"": partial(torch_route, logits, top_k)}
        from moesim.kernels.router import Rule, route

        return {"": partial(route, logits, Rule(top_k))}

    def _expert_gather(self, cell: Cell) -> Candidates:
        tokens, hidden, top_k, experts = cell.shape
        x_TH = self._random(tokens, hidden)
        ids = torch.from_numpy(chosen_experts(tokens, top_k, experts, "uniform")).to(self.device)
        if kernel_of(cell) == LIBRARY:
            token_S = torch.sort(ids.flatten()).indices // top_k
            return {"": partial(torch.index_select, x_TH, 0, token_S)}
        from moesim.kernels.permute import gather, permute

        return {f"block_m={size}": partial(gather, x_TH, permute(ids, experts, size)) for size in (16, 64)}

    def _expert_combine(self, cell: Cell) -> Candidates:
        tokens, hidden, top_k, experts = cell.shape
        ids = torch.from_numpy(chosen_experts(tokens, top_k, experts, "uniform")).to(self.device)
        weights = torch.full((tokens, top_k), 1 / top_k, device=self.device)
        if kernel_of(cell) == LIBRARY:
            place_S = torch.argsort(torch.sort(ids.flatten()).indices)
            return {"": partial(torch_combine, self._random(tokens * top_k, hidden), place_S, weights)}
        from moesim.kernels.permute import combine, permute

        rows = permute(ids, experts, 16)
        return {"": partial(combine, self._random(rows.slot_P.numel(), hidden), rows, weights)}

    def _copy(self, cell: Cell) -> Candidates:
        source = self._random(cell.shape[0] // 2)
        target = torch.empty_like(source)
        if kernel_of(cell) == LIBRARY:
            return {"": partial(target.copy_, source)}
        from moesim.kernels.memory_copy import CANDIDATES, copy

        return {
            f"block={block}, num_warps={warps}": partial(copy, source, target, block, warps)
            for block, warps in CANDIDATES
        }

    def _host_copy(self, op: str, num_bytes: int) -> Callable[[], object]:
        host = torch.ones(num_bytes, dtype=torch.uint8, pin_memory="_pinned" in op)
        device = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        source, target = (host, device) if "to_device" in op else (device, host)
        if not op.endswith("_loaded"):
            return partial(target.copy_, source, non_blocking=True)
        other, beside = _CUDA.Stream(), torch.empty(num_bytes * 4, dtype=torch.uint8, pin_memory=True)
        on_device = torch.empty_like(beside, device=self.device)
        load_source, load_target = (on_device, beside) if "to_device" in op else (beside, on_device)

        def loaded() -> None:
            other.wait_stream(_CUDA.current_stream())
            with _CUDA.stream(other):
                load_target.copy_(load_source, non_blocking=True)
            target.copy_(source, non_blocking=True)

        return loaded


def _triton_experts(dtype: str, kernel: str, given: tuple[torch.Tensor, ...], rows_per_expert: float) -> Candidates:
    from moesim.kernels import expert_shapes, grouped_gemm, grouped_gemm_decode, grouped_gemm_fp8, grouped_gemm_int4
    from moesim.kernels.tiles import capability

    if dtype == "fp8_block":
        run_fp8, inputs_fp8 = grouped_gemm_fp8.experts, grouped_gemm_fp8.Fp8Inputs(*given)
        return {str(tile): partial(run_fp8, inputs_fp8, tile) for tile in grouped_gemm_fp8.TILES}
    if dtype == "int4":
        run_int4, inputs_int4 = grouped_gemm_int4.experts, grouped_gemm_int4.Int4Inputs(*given)
        return {str(tile): partial(run_int4, inputs_int4, tile) for tile in grouped_gemm_int4.TILES}
    inputs = expert_shapes.ExpertsInputs(*given)
    if kernel == "triton_decode":
        return {
            f"{tile}, num_splits={splits}": partial(grouped_gemm_decode.experts, inputs, tile, splits)
            for tile in grouped_gemm_decode.TILES
            for splits in NUM_SPLITS
        }
    tiles = expert_shapes.candidate_tiles(rows_per_expert, capability(given[0].device))
    return {str(tile): partial(grouped_gemm.experts, inputs, tile) for tile in tiles}


def torch_experts(
    x_TH: torch.Tensor,
    gate_up_EJH: torch.Tensor,
    down_EHI: torch.Tensor,
    expert_TK: torch.Tensor,
    weight_TK: torch.Tensor,
) -> torch.Tensor:
    """One layer's experts by torch's grouped matrix product: sort, gate and up, down, weighted sum; never waits."""
    ids_S, order_S = torch.sort(expert_TK.flatten())
    top_k, num_experts = expert_TK.shape[1], len(down_EHI)
    each_E = torch.arange(num_experts, device=ids_S.device, dtype=ids_S.dtype)
    ends_E = torch.searchsorted(ids_S, each_E, right=True, out_int32=True)
    rows_SH = x_TH[order_S // top_k]
    gate_SI, up_SI = torch._grouped_mm(rows_SH, gate_up_EJH.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    out_SH = torch._grouped_mm(silu(gate_SI) * up_SI, down_EHI.transpose(1, 2), offs=ends_E)
    return torch_combine(out_SH, torch.argsort(order_S), weight_TK)


def torch_combine(y_SH: torch.Tensor, place_S: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    """Weighted sum of each token's rows, [T, H]; `place_S` is the row of each slot."""
    y_TKH = y_SH[place_S].view(*weight_TK.shape, y_SH.shape[1])
    return (y_TKH * weight_TK[..., None].to(y_SH.dtype)).sum(dim=1)


def torch_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention by two batched products and a softmax, as cuBLAS has them."""
    return (query @ keys.transpose(-1, -2)).mul(scale).softmax(dim=-1) @ values


def torch_padded_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention with values padded to the keys' width, which FlashAttention wants alike."""
    wide = pad(value, (0, key.shape[-1] - value.shape[-1]))
    return scaled_dot_product_attention(query, key, wide, is_causal=True)[..., : value.shape[-1]]


def torch_route(logit_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids and renormalised weights, both [T, K]."""
    weight_TK, expert_TK = logit_TE.softmax(dim=1).topk(top_k, dim=1)
    return expert_TK, weight_TK / weight_TK.sum(dim=1, keepdim=True)
