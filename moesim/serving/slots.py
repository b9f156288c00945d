"""Experts of a rank: coefficients of their rooflines, or a table by rows and slots that have any."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.costs import compute
from moesim.costs.measured_experts import experts_format
from moesim.costs.operators import Operators, Timed
from moesim.layout import Layout
from moesim.model import BYTES_PER_PARAM, ModelSpec
from moesim.serving.grids import points

Floats = NDArray[np.float64]


def _is_tabled(model: ModelSpec, ops: Operators) -> bool:
    """As `Operators.experts` decides it."""
    ffn = model.experts
    is_alike = ffn.gated and len(set(ffn.expert_widths)) == 1
    return is_alike and experts_format(ops.tables, model.dtypes.experts) is not None


def experts_prices(model: ModelSpec, ops: Operators, layout: Layout, most_tokens: int) -> dict[str, Any]:
    """Coefficients of the experts' rooflines, and the table by rows and active slots where one was measured."""
    found: dict[str, Any] = {
        "has_experts_table": False, "roofline": np.zeros(5), "rows_I": np.arange(2.0), "active_J": np.arange(2.0),
        "experts_s_IJ": np.zeros((2, 2)),
    }  # fmt: skip
    if not model.moe_layers:
        return found
    dtype, device, bound = model.dtypes.experts, ops.device, ops.bound
    factor = ops.calibration.values["experts_factor"] if ops.calibration else 1.0
    peak = compute.arithmetic_flops_per_s(device, dtype) * compute.efficiency(device, "grouped_gemm", bound)
    rate = device.memory.bytes_per_s * compute.efficiency(device, "memory", bound)
    launches_s = float(ops.launches(2.0).seconds)
    found["roofline"] = np.array(
        [BYTES_PER_PARAM[dtype], 4.0 * model.hidden_size, factor / peak, factor / rate, launches_s]
    )
    if _is_tabled(model, ops):
        num_slots = (model.experts.num_experts + layout.num_redundant_experts) // layout.experts.ep
        rows_I = points(1, 64, most_tokens * model.experts.top_k, 1.1)
        active_J = points(1, 32, max(num_slots, 2), 1.1)
        timed = _loaded(model, ops, layout, rows_I, active_J, num_slots)
        found |= {"has_experts_table": True, "rows_I": rows_I, "active_J": active_J, "experts_s_IJ": timed.seconds}
    return found


def _loaded(
    model: ModelSpec, ops: Operators, layout: Layout, rows_I: Floats, active_J: Floats, num_slots: int
) -> Timed:
    """Experts of a rank whose rows fall evenly on so many slots, [I, J]; at least one in each."""
    rows, active = (
        a.ravel().astype(np.int64) for a in np.meshgrid(rows_I, np.minimum(active_J, num_slots), indexing="ij")
    )
    rows = np.maximum(rows, active)
    slot = np.arange(num_slots)
    load_MS = np.where(slot < active[:, None], rows[:, None] // active[:, None], 0)
    load_MS += slot < (rows % active)[:, None]
    ffn = model.experts
    params = ffn.expert_params(model.hidden_size, ffn.expert_widths[0]) / layout.experts.etp
    load_LRS = load_MS.astype(np.int32)[None]
    timed = ops.experts(load_LRS, np.full(load_LRS.shape, params), ffn, model.hidden_size, model.dtypes.experts)
    return replace(timed, seconds=timed.seconds.reshape(len(rows_I), len(active_J)))


def experts_timed(model: ModelSpec, ops: Operators, layout: Layout) -> Timed:
    """Experts at a few loads, for what they rest on."""
    if not model.moe_layers:
        return Timed.of(0.0, 0)
    num_slots = (model.experts.num_experts + layout.num_redundant_experts) // layout.experts.ep
    rows_I = points(1, 1, max(64 * num_slots, 2), 2.0)
    return _loaded(model, ops, layout, rows_I, np.array([1.0, num_slots]), num_slots)
