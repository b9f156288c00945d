"""Real serving runs as rows: what was deployed, what was asked of it, and the time per output token that came out.

Here the tables of aiconfigurator's layout; `moesim.files.runs_benchmarks` has others, `moesim.files.runs_layouts` all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from moesim.files.keys import nearest
from moesim.files.tables import raise_all


@dataclass(frozen=True)
class Run:
    """One benchmark point.

    Attributes:
        name: unique in its file.
        model: preset name or path of a config.json; system, backend, version: in the source's words.
        is_disaggregated: whether prefill ran on other devices.
        prompt_tokens, output_tokens: nominal lengths of a request; length_fraction: mean share of them that was asked.
        concurrency: requests in flight, over all decode instances.
        dp, tp, ep, etp: ranks of one decode instance: attention dp x tp, experts ep x etp.
        tpot_s, ttft_s: measured mean seconds per output token after the first, and to the first (None: not given).
        kv_dtype: storage format of the KV cache.
        expert_dtype: storage format of the experts where it is not the model's own; "" where it is.
        num_draft_tokens: tokens guessed beside each decoded one (multi-token prediction).
        num_instances: decode instances that share the requests.
        max_requests_per_rank: requests that one attention rank of an instance decodes at a time; None: no limit.
        is_told_by_time: whether one of these facts was chosen by looking at the measured time.
        source, measured_on: where the row is from, and the day.
    """

    name: str
    model: str
    system: str
    backend: str
    prompt_tokens: float
    output_tokens: float
    concurrency: float
    tp: int
    tpot_s: float
    version: str = ""
    is_disaggregated: bool = False
    dp: int = 1
    ep: int = 1
    etp: int = 1
    ttft_s: float | None = None
    kv_dtype: str = "bf16"
    expert_dtype: str = ""
    num_draft_tokens: int = 0
    num_instances: int = 1
    max_requests_per_rank: int | None = None
    length_fraction: float = 1.0
    is_told_by_time: bool = False
    source: str = ""
    measured_on: str = ""

    @property
    def group(self) -> str:
        """Model, system and backend."""
        return f"{self.model} {self.system} {self.backend}"

    @property
    def configuration(self) -> str:
        """All that was set before the run; runs of one configuration repeat each other."""
        kind = "disaggregated" if self.is_disaggregated else "aggregated"
        return (
            f"{self.group} {self.version or '-'} {kind} {self.prompt_tokens:g}+{self.output_tokens:g} "
            f"c{self.concurrency:g} x{self.num_instances} dp{self.dp} tp{self.tp} ep{self.ep} etp{self.etp} "
            f"draft{self.num_draft_tokens}"
        )


EXPERT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "nvfp4",
                 "int4_wo": "int4", "w4a16_mxfp4": "mxfp4", "w4a8_mxfp4_mxfp8": "mxfp4"}  # fmt: skip
"""moe_quant_mode -> storage format."""
SIZES = ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
_TEXTS = ("id", "backend", "model_path", "system", "mode")
_OPTIONAL_TEXTS = ("backend_version", "measured", "silicon_data_source", "moe_quant_mode")
_NUMBERS = ("isl", "osl", "silicon_concurrency", "silicon_tpot_ms")


def read_serving_runs(path: str | Path) -> list[Run]:
    """Read a table of serving runs, Parquet or CSV, one benchmark point a row.

    Columns: id, backend, model_path ("maker/Model"), system, mode ("agg", or "disagg": prefill and decode apart), isl
    and osl (prompt and output tokens), silicon_concurrency, silicon_tpot_ms; the parallel sizes tp_size,
    attention_dp_size, moe_tp_size, moe_ep_size, with "decode_" before them where disaggregated; optional
    backend_version, silicon_ttft_ms, measured, silicon_data_source, and moe_quant_mode, a key of `EXPERT_DTYPES`. Other
    columns are left alone. In this layout tp_size excludes data parallelism.
    """
    path = Path(path)
    rows = _rows(path)
    needed = [*_TEXTS, *_NUMBERS]
    present = rows[0].keys() if rows else needed
    lacking = [name for name in needed if name not in present]
    raise_all(str(path), [f"column {name} lacks; serving runs need {', '.join(needed)}" for name in lacking])
    mistakes: list[str] = [] if rows else ["no rows; give at least one run"]
    runs = [_run(row, i, mistakes) for i, row in enumerate(rows)]
    count = Counter(run.name for run in runs if run)
    mistakes += [f"column id: {name!r} names {n} rows; give each row its own" for name, n in count.items() if n > 1]
    raise_all(str(path), mistakes)
    return [run for run in runs if run]


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a table of serving runs")
    try:
        words = dict.fromkeys((*_TEXTS, *_OPTIONAL_TEXTS), pa.string())  # or a version 0.8 would be a number
        options = pyarrow.csv.ConvertOptions(column_types=words, strings_can_be_null=True)
        is_parquet = path.suffix == ".parquet"
        table = pq.read_table(path) if is_parquet else pyarrow.csv.read_csv(path, convert_options=options)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not a whole {path.suffix[1:]} table ({error}); write it again") from error
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def positive(row: Mapping[str, Any], key: str, where: str, mistakes: list[str]) -> float:
    """A positive finite number under a key, or a mistake and 1."""
    value = row.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    mistakes.append(f"{where}: {key} must be a positive number, not {value!r}")
    return 1.0


def _run(row: Mapping[str, Any], index: int, mistakes: list[str]) -> Run | None:
    before, where = len(mistakes), f"row {index}"
    blank = [name for name in _TEXTS if not isinstance(row[name], str) or not row[name].strip()]
    mistakes += [f"{where}: {name} must be a word, not {row[name]!r}" for name in blank]
    if row["mode"] not in ("agg", "disagg"):
        mistakes.append(f"{where}: mode must be agg or disagg, not {row['mode']!r}")
    numbers = {name: positive(row, name, where, mistakes) for name in _NUMBERS}
    prefix = "decode_" if row["mode"] == "disagg" else ""
    sizes = [positive(row, prefix + name, where, mistakes) for name in SIZES]
    tp, dp, etp, ep = (int(size) for size in sizes)
    if len(mistakes) == before and dp * tp != etp * ep:
        mistakes.append(
            f"{where}: attention has {dp} x {tp} ranks but the experts {ep} x {etp}; both must be all of them"
        )
    quantised = row.get("moe_quant_mode")
    if quantised is not None and quantised not in EXPERT_DTYPES:
        mistakes.append(f"{where}: moe_quant_mode {quantised!r} is not known; {nearest(str(quantised), EXPERT_DTYPES)}")
    if len(mistakes) > before:
        return None
    ttft_ms = row.get("silicon_ttft_ms")
    return Run(
        name=row["id"],
        model=row["model_path"].rpartition("/")[2].lower(),
        system=row["system"],
        backend=row["backend"],
        version=row.get("backend_version") or "",
        is_disaggregated=row["mode"] == "disagg",
        prompt_tokens=numbers["isl"],
        output_tokens=numbers["osl"],
        concurrency=numbers["silicon_concurrency"],
        dp=dp, tp=tp, ep=ep, etp=etp,
        tpot_s=numbers["silicon_tpot_ms"] / 1e3,
        ttft_s=ttft_ms / 1e3 if ttft_ms else None,
        expert_dtype=EXPERT_DTYPES.get(quantised or "", ""),
        source=row.get("silicon_data_source") or "",
        measured_on=str(row.get("measured") or "")[:10],
    )  # fmt: skip


def groups_of(runs: Sequence[Run]) -> list[str]:
    """Groups in order of appearance."""
    return list(dict.fromkeys(run.group for run in runs))
