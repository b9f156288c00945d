"""How near kernels come to what the device was measured to do, and to the vendor's library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moesim.profile.cuda_cells import LIBRARY, cell_work, distribution_of, kernel_of, without_kernel
from moesim.profile.shapes import Cell

MOE_AIM, DECODE_AIM = 0.80, 0.85
MATRIX_FORMAT = {"fp8_block": "fp8", "int4": "bf16", "fp32": "bf16"}
"""Format that a kernel multiplies in, where it is not that of its weights."""
DECODE_OPS = ("generation_attention", "generation_mla")


@dataclass(frozen=True)
class Reached:
    """One timed cell.

    Attributes:
        tile: the candidate that was fastest, in words.
        copy_fraction, matrix_fraction: of the measured ceilings; None where that ceiling was not measured.
        library_ratio: seconds of the fastest library path at the same cell over its own: above 1 it is faster; None
            where there is no library path, or this is one.
    """

    op: str
    kernel: str
    dtype: str
    distribution: str
    shape: tuple[int, ...]
    tile: str
    seconds: float
    flops_per_s: float
    bytes_per_s: float
    copy_fraction: float | None
    matrix_fraction: float | None
    library_ratio: float | None


@dataclass(frozen=True)
class Ceilings:
    """All cells against the ceilings.

    Attributes:
        copy_bytes_per_s: the best copy within the device's memory, read and written, of the largest size that was
            timed (a small one fits in a cache); None if none was.
        matrix_flops_per_s: by format, the best matrix product of the library.
        moe_library_rate: share of the MoE cells with a library path where the fastest of our kernels is not slower.
        decode_copy_fraction: median of `copy_fraction` over the kernels for decode: attention, and experts at the loads
            where the kernel for decode was tried.
    """

    copy_bytes_per_s: float | None
    matrix_flops_per_s: Mapping[str, float]
    rows: tuple[Reached, ...]
    moe_library_rate: float | None
    decode_copy_fraction: float | None

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the aims beside what was reached."""
        return asdict(self) | {"aims": {"moe_library_rate": MOE_AIM, "decode_copy_fraction": DECODE_AIM}}

    def table(self) -> str:
        """The rows in columns, and the two figures with their aims."""
        heads = (
            "operator",
            "kernel",
            "format",
            "load",
            "shape",
            "time",
            "TFLOP/s",
            "GB/s",
            "copy",
            "matrix",
            "library",
        )
        lines = [heads, *(_words(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
        text = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([*(line.rstrip() for line in text), *self.figures()])

    def figures(self) -> tuple[str, ...]:
        """What was reached of the two aims, in words."""
        figures = (
            ("MoE cells where the grouped GEMM is at or above the library", self.moe_library_rate, MOE_AIM),
            ("median fraction of copy bandwidth of the decode kernels", self.decode_copy_fraction, DECODE_AIM),
        )
        return tuple(f"{name}: {_percent(value) or 'not timed'} (aim {aim:.0%})" for name, value, aim in figures)


def ceilings(seconds: Mapping[Cell, float], tiles: Mapping[str, str] | None = None) -> Ceilings:
    """Every timed cell that has a kernel against the ceilings that the same timings give.

    Args:
        seconds: of each cell that was timed.
        tiles: the fastest candidate by key of the cell.
    """
    cells = {cell: cell_work(cell) for cell in seconds if kernel_of(cell)}
    copies = [(cells[cell].num_bytes, 1 / seconds[cell]) for cell in cells if cell.op == "copy"]
    top = float(np.prod(max(copies))) if copies else None
    matrix: dict[str, float] = {}
    for cell, amount in cells.items():
        if cell.op == "gemm":
            matrix[cell.dtype] = max(matrix.get(cell.dtype, 0.0), amount.flops / seconds[cell])
    library = {without_kernel(cell): seconds[cell] for cell in cells if kernel_of(cell) == LIBRARY}
    rows = []
    for cell, amount in cells.items():
        speed, rate = amount.flops / seconds[cell], amount.num_bytes / seconds[cell]
        peak = matrix.get(MATRIX_FORMAT.get(cell.dtype, cell.dtype))
        kernel, tile = kernel_of(cell), (tiles or {}).get(cell.key, "")
        beside = library.get(without_kernel(cell)) if kernel != LIBRARY else None
        rows.append(
            Reached(
                cell.op, kernel, cell.dtype, distribution_of(cell), cell.shape, tile, seconds[cell], speed, rate,
                rate / top if top else None, speed / peak if peak and amount.flops else None,
                beside / seconds[cell] if beside else None,
            )
        )  # fmt: skip
    return Ceilings(top, matrix, tuple(rows), _moe_rate(rows), _decode_fraction(rows))


def _moe_rate(rows: list[Reached]) -> float | None:
    best: dict[tuple[object, ...], float] = {}
    for row in rows:
        if row.op == "moe" and row.library_ratio is not None:
            cell = (row.dtype, row.distribution, row.shape)
            best[cell] = max(best.get(cell, 0.0), row.library_ratio)
    return float(np.mean([ratio >= 1 for ratio in best.values()])) if best else None


def _decode_fraction(rows: list[Reached]) -> float | None:
    found = [
        row.copy_fraction
        for row in rows
        if row.copy_fraction is not None
        and (row.kernel == "triton_decode" or (row.op in DECODE_OPS and row.kernel == "triton"))
    ]
    return float(np.median(found)) if found else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _words(row: Reached) -> tuple[str, ...]:
    ratio = "" if row.library_ratio is None else f"{row.library_ratio:.2f}x"
    return (
        row.op, row.kernel, row.dtype, row.distribution, "x".join(map(str, row.shape)), f"{row.seconds * 1e6:.1f} us",
        f"{row.flops_per_s / 1e12:.1f}", f"{row.bytes_per_s / 1e9:.0f}", _percent(row.copy_fraction),
        _percent(row.matrix_fraction), ratio,
    )  # fmt: skip
