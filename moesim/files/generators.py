"""Fitted trace generators as files: a NumPy archive of the fitted trace, its token classes and its settings."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.files.trace_rules import trace_mistakes
from moesim.files.trace_table import header_facts
from moesim.routing.generator import TraceGenerator
from moesim.routing.trace import RoutingTrace

KIND = "moesim trace generator"
FORMAT = 1
_ARRAYS = (
    "expert_ids_TLK", "request_T", "position_T", "is_decode_T", "token_id_T", "weights_TLK", "scores_TLE",
)  # fmt: skip
_OPTIONAL = ("token_id_T", "weights_TLK", "scores_TLE")


def write_generator(generator: TraceGenerator, path: str | os.PathLike[str]) -> None:
    """Write a generator to `path` (.npz); the file appears whole or not at all.

    Raises:
        ValueError: the file cannot be written.
    """
    path, trace = Path(path), generator.trace
    header = header_facts(trace) | {
        "kind": KIND,
        "format": FORMAT,
        "layers": list(trace.layers),
        "run_tokens": generator.run_tokens,
        "crossover_rate": generator.crossover_rate,
    }
    arrays: dict[str, Any] = {name: getattr(trace, name) for name in _ARRAYS if getattr(trace, name) is not None}
    arrays |= {f"predicted_{h}": ids_TLW for h, ids_TLW in enumerate(trace.predicted_HTLW, start=1)}
    arrays |= {"class_T": generator.class_T, "near_QN": generator.near_QN}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)
        part.replace(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot write the generator: {error}; choose a file in a writable folder") from error
    finally:
        part.unlink(missing_ok=True)


def read_generator(path: str | os.PathLike[str]) -> TraceGenerator:
    """The generator in the file `path`, checked as a trace is.

    Raises:
        ValueError: the file is missing, is no generator, or breaks rules: all of them in one message.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(str(arrays.pop("header")))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise ValueError(f"{path}: no trace generator ({error}); make one with `moesim trace fit`") from error
    if not isinstance(header, dict) or header.get("kind") != KIND or header.get("format") != FORMAT:
        raise ValueError(f"{path}: no trace generator of format {FORMAT}; make one with `moesim trace fit`")
    wanted = ["class_T", "near_QN", *(name for name in _ARRAYS if name not in _OPTIONAL)]
    if lacking := [name for name in wanted if name not in arrays]:
        raise ValueError(f"{path}: the generator lacks {', '.join(lacking)}; make it again with `moesim trace fit`")
    fields: dict[str, Any] = {
        **{name: header.get(name) for name in ("name", "model", "origin", "num_experts", "provenance")},
        **{name: arrays.get(name) for name in _ARRAYS},
    }
    trace = RoutingTrace(
        **fields,
        layers=tuple(header.get("layers", ())),
        predicted_HTLW=tuple(arrays[f"predicted_{h}"] for h in (1, 2, 3) if f"predicted_{h}" in arrays),
    )
    mistakes = trace_mistakes(trace) or _mistakes(header, trace, arrays["class_T"], arrays["near_QN"])
    if mistakes:
        raise ValueError(f"{path}: not a right generator:\n" + "\n".join(f"  {mistake}" for mistake in mistakes))
    return TraceGenerator(trace, arrays["class_T"], arrays["near_QN"], header["run_tokens"], header["crossover_rate"])


def _mistakes(header: dict[str, Any], trace: RoutingTrace, class_T: NDArray[Any], near_QN: NDArray[Any]) -> list[str]:
    """What the compiled walk relies on, beyond a right trace."""
    num_requests = len(np.unique(trace.request_T))
    found = []
    if class_T.shape != (trace.num_tokens,) or class_T.dtype != np.int32 or class_T.min() < 0:
        found.append(f"class_T must be int32 [{trace.num_tokens}], not negative; given {class_T.dtype} {class_T.shape}")
    ok = near_QN.ndim == 2 and len(near_QN) == num_requests and near_QN.shape[1] and near_QN.dtype == np.int32
    if not ok or not (near_QN.min() >= 0 and near_QN.max() < num_requests):
        found.append(f"near_QN must be int32 [{num_requests}, N] of requests; given {near_QN.dtype} {near_QN.shape}")
    for key, low, high in (("run_tokens", 1.0, np.inf), ("crossover_rate", 0.0, 1.0)):
        value = header.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            found.append(f"header: {key} must be a number in {low:g}..{high:g}; given {value!r}")
    return found
