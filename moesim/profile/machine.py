"""The machine that is timed: its name, and its device file from what was measured.

Importing this does not import torch, so that `one_thread` can speak before it.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.profile.shapes import SHAPES, Cell, work

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of mallopt(3)."""


def one_thread() -> None:
    """Keep the libraries of this process to one thread each.

    More threads than free cores are many times slower, and not steadily so. Torch must not be imported yet; where it
    is, it is told directly.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    if sys.modules.get("torch") is not None:
        sys.modules["torch"].set_num_threads(1)


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, where it can be told (glibc).

    A pass frees a few hundred megabytes of caches at its end. Handed back, they come again page by page in the next
    pass, where a part timed on its own finds its little memory still there.
    """
    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    if tell is not None:
        tell(_MMAP_MAX, 0)
        tell(_TRIM_THRESHOLD, 2**31 - 1)


def cpu_name() -> str:
    """The CPU's model name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def machine_facts() -> dict[str, Any]:
    """CPU, cores, threads used, and versions of what computes."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def write_whole(text: str, path: Path) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


class Peaks(NamedTuple):
    """The best that was seen of this machine: FLOP/s of a matrix product, bytes/s read and written by any operator."""

    flops_per_s: float
    bytes_per_s: float


def rates(cells: Mapping[Cell, float]) -> dict[str, NDArray[np.float64]]:
    """Achieved FLOP/s of `gemm`, `grouped_gemm` and `attention`, and bytes/s of `memory`, from seconds of cells.

    Arithmetic is judged on cells with 64 rows or more, memory on matrix-vector products and copies of 8 MiB or more.
    """
    found: dict[str, list[float]] = {"gemm": [], "grouped_gemm": [], "attention": [], "memory": []}
    for cell, seconds in cells.items():
        at = cell.shape
        if cell.op == "gemm" and at[0] >= 64:
            found["gemm"].append(2.0 * at[0] * at[1] * at[2] / seconds)
        elif cell.op == "gemm" and at[0] == 1:
            found["memory"].append(4.0 * at[1] * at[2] / seconds)
        elif cell.op == "copy" and at[0] >= 8 << 20:
            found["memory"].append(2.0 * at[0] / seconds)
        elif cell.op == "moe_block" and at[1] >= 64:
            found["grouped_gemm"].append(work(SHAPES[cell.model], "moe_block", at)[0] / seconds)
        elif cell.op == "attention_prefill" and at[1] >= 64:
            found["attention"].append(work(SHAPES[cell.model], cell.op, at)[0] / seconds)
    return {kind: np.array(values) for kind, values in found.items()}


def peaks(found: Mapping[str, NDArray[np.float64]]) -> Peaks:
    """The highest rates.

    Raises:
        ValueError: there is no cell to tell them from.
    """
    arithmetic = np.concatenate([found["gemm"], found["grouped_gemm"], found["attention"]])
    if not arithmetic.size or not found["memory"].size:
        raise ValueError("no matrix product of 64 rows, or no copy, was timed; give a larger budget")
    return Peaks(float(arithmetic.max()), float(found["memory"].max()))


def device_toml(cells: Mapping[Cell, float], facts: Mapping[str, Any]) -> str:
    """The device file of one thread of this CPU, fp32, as `moesim run` reads it.

    Args:
        cells: seconds of what was timed.
        facts: of the machine, for the sources.
    """
    found = rates(cells)
    top = peaks(found)
    launch_s = next(seconds for cell, seconds in cells.items() if cell.op == "launch")
    said = f"measured: one thread of {facts['cpu']}, fp32, torch {facts['torch']}, CPU seconds"
    lines = [
        f"# {facts['cpu']}: one thread, as timed by `moesim profile run`.",
        'kind = "cpu"',
        f"launch_s = {launch_s:.3g}  # one small operator called from Python",
        "power_w = 10.0",
        "",
        "[memory]",
        f"capacity_bytes = {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')}",
        f"bytes_per_s = {top.bytes_per_s:.4g}  # the best of copies and matrix-vector products",
        "latency_s = 1e-7",
        "",
        "[flops_per_s]",
        f"fp32 = {top.flops_per_s:.4g}  # the best of all matrix products, experts and attention",
        "",
        "[efficiency]",
    ]
    for kind in ("gemm", "grouped_gemm", "attention", "memory"):
        share = found[kind] / (top.bytes_per_s if kind == "memory" else top.flops_per_s)
        if share.size:
            low, value, high = (min(1.0, float(x)) for x in np.percentile(share, (10, 50, 90)))
            entry = f'value = {value:.4f}, low = {low:.4f}, high = {high:.4f}, source = "measured"'
        else:
            entry = 'value = 0.5, low = 0.2, high = 0.8, source = "assumed"'
        lines.append(
            f"{kind} = {{ {entry}, note = {json.dumps('median, 10th and 90th percentile of what was timed')} }}"
        )
    lines += [
        'network = { value = 0.8, low = 0.6, high = 0.92, source = "assumed", note = "not timed" }',
        "",
        "[sources]",
        f"memory = {json.dumps(said + '; the latency is assumed')}",
        f"flops = {json.dumps(said)}",
        f"launch = {json.dumps(said)}",
        'power = "assumed: one core\'s share of a server socket"',
        f"efficiency = {json.dumps(said)}",
        "",
    ]
    return "\n".join(lines)
