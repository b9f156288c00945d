"""Real runs in any known layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesim.files.runs import Run, read_serving_runs
from moesim.files.runs_benchmarks import read_benchmark_runs
from moesim.files.tables import raise_all


def read_runs(path: str | Path, facts: Mapping[str, Any] | None = None) -> list[Run]:
    """Read runs in any known layout: Parquet or CSV of serving runs, JSON or JSON lines of a benchmark or of moesim.

    Args:
        path: a file, or a folder of them.
        facts: of all runs, for layouts that leave them out ("system", "tp_size", ...).

    Raises:
        ValueError: one message with every mistake.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in (".parquet", ".csv", ".json", ".jsonl"))
        raise_all(str(path), [] if found else ["no .parquet, .csv, .json or .jsonl file of runs in it"])
        return [run for file in found for run in read_runs(file, facts)]
    if path.suffix in (".parquet", ".csv"):
        return read_serving_runs(path)
    if path.suffix in (".json", ".jsonl"):
        return read_benchmark_runs(path, facts or {})
    raise ValueError(f"{path}: runs must be .parquet, .csv, .json or .jsonl, not {path.suffix or 'without a suffix'!r}")
