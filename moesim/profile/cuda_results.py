"""What the timings of a CUDA device become: measured tables, a device file, ceilings, and forward passes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moesim.costs.measured import MeasuredTable
from moesim.files.profiles.tables import write_tables
from moesim.profile.ceilings import Ceilings, ceilings
from moesim.profile.cuda_cells import without_kernel
from moesim.profile.cuda_device import DeviceInfo, cuda_toml
from moesim.profile.forward_times import Forward, forward_csv
from moesim.profile.machine import write_whole
from moesim.profile.rounds import Samples
from moesim.profile.shapes import Cell
from moesim.profile.tables import medians, provenance_of, tables_of

CLOCK = "wall_s"


class Results(NamedTuple):
    """The ceilings, the files that were written, and in words what was not."""

    ceilings: Ceilings
    written: tuple[Path, ...]
    left_out: tuple[str, ...] = ()


def fastest(cells: Sequence[Cell], samples: Samples) -> tuple[list[Cell], Samples]:
    """Of the kernels of each cell the fastest, by median: its timings, under the cell without a kernel.

    The cost model so takes the faster one at each point; what each kernel took is in the ceilings.
    """
    best: dict[Cell, tuple[float, Cell]] = {}
    for cell, seconds in medians(cells, samples, CLOCK).items():
        place = without_kernel(cell)
        if place not in best or seconds < best[place][0]:
            best[place] = (seconds, cell)
    return list(best), Samples(laps={place.key: samples.laps[cell.key] for place, (_, cell) in best.items()})


def cuda_tables(
    cells: Sequence[Cell], samples: Samples, device: str, provenance: Mapping[str, str]
) -> list[MeasuredTable]:
    """The tables that the cost model takes: of the fastest kernel at each point."""
    return tables_of(*fastest(cells, samples), CLOCK, device, provenance)


def write_results(
    out: Path,
    cells: Sequence[Cell],
    samples: Samples,
    tiles: Mapping[str, str],
    facts: Mapping[str, Any],
    info: DeviceInfo,
    runs: Sequence[Forward] = (),
) -> Results:
    """Write tables.parquet, ceilings.json and .txt, NAME.toml and, where passes were timed, forward.csv.

    The device is named as the folder is. Its file needs a copy and a matrix product in bf16.

    Raises:
        ValueError: nothing was timed.
    """
    seconds = medians(cells, samples, CLOCK)
    if not any(cell.shape for cell in seconds):
        raise ValueError(f"{out}: no cell was timed; see what failed, or give a larger --budget")
    found = ceilings(seconds, tiles)
    tables = out / "tables.parquet"
    write_tables(cuda_tables(cells, samples, out.name, provenance_of(facts)), tables)
    texts = {"ceilings.json": json.dumps(found.as_json(), indent=1) + "\n", "ceilings.txt": found.table() + "\n"}
    left_out: tuple[str, ...] = ()
    if found.copy_bytes_per_s is None or "bf16" not in found.matrix_flops_per_s:
        left_out = (f"{out.name}.toml is not written: no copy, or no matrix product in bf16, was timed",)
    else:
        texts[f"{out.name}.toml"] = cuda_toml(seconds, found, info, facts)
    if any(run.key in samples.laps for run in runs):
        texts["forward.csv"] = forward_csv(runs, samples, out.name)
    for name, text in texts.items():
        write_whole(text, out / name)
    return Results(found, (tables, *(out / name for name in texts)), left_out)
