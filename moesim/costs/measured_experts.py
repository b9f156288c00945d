"""Seconds of a rank's experts from measured tables, for the tokens that each of its slots really got."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.costs.measured import Interpolated, MeasuredTables
from moesim.costs.work import moe_work

MXFP4 = ("w4a8_mxfp4_mxfp8", "w4a16_mxfp4")
"""Formats of tables whose experts are in MXFP4: activations of eight bits, where the device has them, or of sixteen."""


def experts_format(tables: MeasuredTables, dtype: str) -> str | None:
    """Under which format the tables have experts whose weights are in one; None where they have none."""
    asked = MXFP4 if dtype == "mxfp4" else (dtype,)
    return next((name for name in asked for op in ("moe", "grouped_gemm") if (op, name) in tables), None)


def experts_seconds(
    tables: MeasuredTables,
    load_LRS: NDArray[np.int32],
    hidden_size: int,
    inter_size: int,
    top_k: int,
    num_experts: int,
    dtype: str,
    **facts: str,
) -> Interpolated:
    """Seconds of the gated experts on each rank, [L, R] each: three matrices per expert, 0 where no token came.

    With a table "moe": the roofline is taken at the rank's own FLOP and bytes (weights of those slots only that have
    tokens), the ratio of measured to roofline where a slot has as many tokens in the mean. With a table "grouped_gemm"
    (num_experts, m, n, k): gate and up, then down, each over the slots that have tokens, at their mean load. "moe"
    goes first.

    Args:
        load_LRS: tokens in each slot.
        inter_size: of one expert, or of its slice on the rank under tensor parallelism.
        top_k, num_experts: of the whole model, as tables "moe" are entered by them.
        facts: of the table; where none is named, evenly loaded experts are preferred, as their load is known.

    Holds for: one kernel over all slots of a rank; how uneven loads share the device's tiles is not in a mean.

    Raises:
        ValueError: there is neither table.
    """
    load = np.asarray(load_LRS, np.float64)
    rows, active = load.sum(axis=-1), (load > 0).sum(axis=-1).astype(np.float64)
    busy = rows > 0
    parts = []
    if ("moe", dtype) in tables:
        if tables.find("moe", dtype, **{"distribution": "balanced", **facts}) is not None:
            facts = {"distribution": "balanced", **facts}
        tokens = rows[busy] / load.shape[-1] * num_experts / top_k
        table = tables.find("moe", dtype, **facts)
        assert table is not None
        where = {
            "num_tokens": tokens,
            "hidden_size": hidden_size,
            "inter_size": inter_size,
            "top_k": top_k,
            "num_experts": num_experts,
            "tp": 1,
            "ep": 1,
        }
        parts = [table.seconds(where, moe_work(rows[busy], active[busy], hidden_size, inter_size, dtype))]
    else:
        for n, k in ((2 * inter_size, hidden_size), (hidden_size, inter_size)):
            where = {"num_experts": active[busy], "m": rows[busy] / active[busy], "n": n, "k": k}
            parts.append(tables.seconds("grouped_gemm", dtype, where, **facts))
    found = np.zeros((3, *rows.shape))
    inside = np.ones(rows.shape, bool)
    for part in parts:
        found[:, busy] += (part.seconds, part.low, part.high)
        inside[busy] &= part.inside
    return Interpolated(found[0], found[1], found[2], inside)
