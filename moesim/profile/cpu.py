"""Everything that is timed on a CPU: machine cells, the parts of models, and passes of these models, as jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.profile.parts import ModelParts, machine_job
from moesim.profile.passes import Pass, counts_of, draw_passes, forced_ids
from moesim.profile.rounds import Job
from moesim.profile.shapes import Cell, ModelShape, machine_cells, model_cells


@dataclass(frozen=True)
class Limits:
    """The largest requests in a batch, tokens of a cache, and tokens of prompts in all that a table covers."""

    batch: int = 24
    context: int = 640
    tokens: int = 512


@dataclass(frozen=True)
class Whole:
    """A pass of a whole model that is timed.

    Attributes:
        counts_LE: tokens of each expert in each layer.
        is_closure: whether it is part of the profile: even routing, on the table's points.
    """

    key: str
    shape: ModelShape
    run: Pass
    counts_LE: NDArray[np.int64]
    is_closure: bool


def table_jobs(shapes: Sequence[ModelShape], limits: Limits, seed: int) -> tuple[list[Cell], list[Job]]:
    """The table's cells and their jobs: of the machine, then of each model."""
    cells = machine_cells()
    jobs = [machine_job(cell) for cell in cells]
    for shape in shapes:
        mine = model_cells(shape, limits.batch, limits.context, limits.tokens)
        parts = ModelParts(shape, _most_requests(mine), limits.context, seed)
        cells += mine
        jobs += [parts.job(cell) for cell in mine]
    return cells, jobs


def jobs_with_passes(
    shapes: Sequence[ModelShape], limits: Limits, num_prefill: int, num_decode: int, seed: int
) -> tuple[list[Cell], list[Job], list[Whole]]:
    """As `table_jobs`, with passes to predict and closure passes; a later model is dropped before an earlier one."""
    cells = machine_cells()
    jobs = [machine_job(cell) for cell in cells]
    wholes: list[Whole] = []
    for place, shape in enumerate(shapes):
        mine = model_cells(shape, limits.batch, limits.context, limits.tokens, first_rank=1 + 2 * place)
        parts = ModelParts(shape, _most_requests(mine), limits.context, seed)
        cells += mine
        jobs += [parts.job(cell) for cell in mine]
        drawn = draw_passes(mine, num_prefill, num_decode, limits.batch, limits.context, limits.tokens, seed)
        for is_closure, runs in ((True, closure_passes(mine)), (False, drawn)):
            for run in runs:
                ids = forced_ids(shape, run, seed)
                key = f"{shape.name}: {run.key}{' (closure)' if is_closure else ''}"
                job = parts.pass_job(key, run.batch, run.tokens, run.context, ids, rank=1 + 2 * place)
                counts = parts.natural_counts(job) if ids is None else counts_of(ids, shape.experts)
                jobs.append(job)
                wholes.append(Whole(key, shape, run, counts, is_closure))
    return cells, jobs, wholes


def _most_requests(cells: Sequence[Cell]) -> int:
    return max(cell.shape[0] for cell in cells if cell.op == "attention_decode")


def closure_passes(cells: Sequence[Cell]) -> list[Pass]:
    """A few even passes on the grid's own points: what they miss by is not interpolation, but parts against whole."""
    found = []
    for op, batches, shares in (("attention_prefill", (1, 4), (0.3, 0.6)), ("attention_decode", (2, 7, 16), (0.5,))):
        for batch in batches:
            lengths = sorted(cell.shape[1] for cell in cells if cell.op == op and cell.shape[0] == batch)
            for share in shares if lengths else ():
                length = lengths[round(share * (len(lengths) - 1))]
                prefill = op == "attention_prefill"
                found.append(Pass(batch, length if prefill else 1, 0 if prefill else length, "even"))
    return list(dict.fromkeys(found))
