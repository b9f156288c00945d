"""The CUDA device at hand, and its device file from what was timed. Importing this does not import torch."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from moesim.profile.ceilings import MATRIX_FORMAT, Ceilings
from moesim.profile.cuda_cells import cell_work
from moesim.profile.shapes import Cell

POWER_W = 700.0
"""Where the driver does not say: the board of an H100 SXM (NVIDIA's data sheet)."""


class DeviceInfo(NamedTuple):
    """What the driver says.

    capability: such as 90. power_w: its limit, None if not told. driver: its version.
    """

    name: str
    capability: int
    capacity_bytes: int
    power_w: float | None
    has_triton: bool
    driver: str = "not said"

    @property
    def facts(self) -> dict[str, Any]:
        """What timings rest on."""
        return {"gpu": self.name, "capability": self.capability, "triton": self.has_triton, "driver": self.driver}


def device_info() -> DeviceInfo:
    """The first CUDA device that torch sees.

    Raises:
        ValueError: torch finds none.
    """
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    told = torch.cuda.get_device_properties(0)
    driver, power_w = driver_and_power(f"GPU-{told.uuid}")
    has_triton = find_spec("triton") is not None
    return DeviceInfo(told.name, 10 * told.major + told.minor, told.total_memory, power_w, has_triton, driver)


def driver_and_power(device: str, program: str = "nvidia-smi") -> tuple[str, float | None]:
    """Version of the driver and enforced power limit of a device; "not said" and None where the program fails."""
    asked = [
        program,
        f"--id={device}",
        "--query-gpu=driver_version,enforced.power.limit",
        "--format=csv,noheader,nounits",
    ]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
        driver, _, power = told.strip().partition(", ")
    except (OSError, subprocess.SubprocessError):
        return "not said", None
    try:
        return driver or "not said", float(power)
    except ValueError:  # "[N/A]"
        return driver or "not said", None


def cuda_toml(seconds: Mapping[Cell, float], found: Ceilings, info: DeviceInfo, facts: Mapping[str, Any]) -> str:
    """The device file: peaks as measured, and what fraction of them was achieved."""
    said = json.dumps(f"measured: {info.name}, torch {facts['torch']}, device events")
    launch = next((s for cell, s in seconds.items() if cell.op == "launch"), None)
    assumed = "assumed: not told by the driver"
    lines = [
        f"# {info.name}, as timed by `moesim profile run`.",
        'kind = "gpu"',
        f"launch_s = {launch if launch else 4e-6:.3g}",
        f"power_w = {info.power_w or POWER_W:.1f}",
        "[memory]",
        f"capacity_bytes = {info.capacity_bytes}",
        f"bytes_per_s = {found.copy_bytes_per_s:.4g}  # the best copy, read and written",
        "latency_s = 7e-7",
        "[flops_per_s]",
        *(f"{dtype} = {peak:.4g}  # the best product" for dtype, peak in sorted(found.matrix_flops_per_s.items())),
        "[efficiency]",
        *(f"{kind} = {{ {entry} }}" for kind, entry in _efficiencies(seconds, found).items()),
        'network = { value = 0.8, low = 0.6, high = 0.92, source = "assumed", note = "not timed" }',
        "[sources]",
        f"memory = {json.dumps(json.loads(said) + '; the latency is assumed')}",
        f"flops = {said}",
        f"launch = {said if launch else json.dumps('assumed: not timed')}",
        f"power = {json.dumps('read from the driver: enforced limit' if info.power_w else assumed)}",
        f"efficiency = {said}",
        "",
    ]
    return "\n".join(lines)


def _efficiencies(seconds: Mapping[Cell, float], found: Ceilings) -> dict[str, str]:
    """Achieved fraction of each kind of work: median, 10th and 90th percentile of the cells that it bounds."""
    rates: dict[str, list[float]] = {"gemm": [], "grouped_gemm": [], "attention": [], "memory": []}
    kinds = {"gemm": "gemm", "moe": "grouped_gemm", "context_attention": "attention", "context_mla": "attention"}
    for cell, s in seconds.items():
        amount = cell_work(cell)
        peak = found.matrix_flops_per_s.get(MATRIX_FORMAT.get(cell.dtype, cell.dtype))
        top = found.copy_bytes_per_s
        if cell.op not in (*kinds, "generation_attention", "generation_mla") or not peak or not top:
            continue
        if cell.op in kinds and amount.flops / peak > amount.num_bytes / top:
            rates[kinds[cell.op]].append(amount.flops / s / peak)
        else:
            rates["memory"].append(amount.num_bytes / s / top)
    note = json.dumps("median, 10th and 90th percentile of what was timed, all kernels")
    said = {}
    for kind, values in rates.items():
        if values:
            low, value, high = (min(1.0, float(x)) for x in np.percentile(values, (10, 50, 90)))
            entry = f'value = {value:.4f}, low = {low:.4f}, high = {high:.4f}, source = "measured", note = {note}'
        else:
            entry = 'value = 0.5, low = 0.2, high = 0.8, source = "assumed", note = "not timed"'
        said[kind] = entry
    return said
