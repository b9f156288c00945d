"""SGLang's expert-distribution recordings, as its `srt/eplb/expert_distribution.py` has written them since 2025."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.files.imports.arrays import read_arrays
from moesim.files.imports.counting import count_trace
from moesim.files.imports.facts import Facts
from moesim.files.imports.passes import requests_of
from moesim.files.imports.text import read_json
from moesim.files.imports.tokens import concatenated, routing_trace
from moesim.files.imports.torch_zip import read_torch
from moesim.files.trace_rules import MAX_EXPERTS
from moesim.routing.counts import CountTrace
from moesim.routing.trace import RoutingTrace

Ints = NDArray[np.int64]


def read_sglang(paths: Sequence[Path], facts: Facts) -> RoutingTrace | CountTrace:
    """SGLang expert-distribution recording, `expert_distribution_recorder_*.pt`, or the same keys as .npz or .json.

    Modes stat and stat_approx: logical_count [step, layer, expert] (or [layer, expert]); give one file. Modes per_pass
    and per_token: records, a list of forward passes, and last_physical_to_logical_map [layer, physical expert];
    per_pass has global_physical_count [layer, physical expert] for each pass, summed over the files of all ranks;
    per_token has topk_ids_of_layer [layer, token, 8] (-1 where unused), input_ids, positions, extend_seq_lens and
    forward_mode; give one file for each rank that has tokens of its own (data parallel). Layers without routing (dense
    ones) and passes without tokens are left out.
    """
    dumps = [_dump(path) for path in paths]
    kinds = {_kind(path, dump) for path, dump in zip(paths, dumps, strict=True)}
    if len(kinds) > 1:
        raise ValueError(f"{len(paths)} files: hold recordings of the modes {', '.join(sorted(kinds))}; give one mode")
    if kinds == {"per_token"}:
        return _token_trace(paths, dumps, facts)
    if kinds == {"per_pass"}:
        return _counted(paths, _pass_counts(paths, dumps), facts, "forward passes")
    if len(paths) > 1:
        raise ValueError(f"{paths[1]}: a stat recording is already summed over ranks; convert such files one by one")
    counts = _ints(paths[0], "logical_count", dumps[0]["logical_count"])
    if counts.ndim not in (2, 3):
        raise ValueError(f"{paths[0]}: logical_count must be [step, layer, expert]; given {list(counts.shape)}")
    return _counted(paths, counts if counts.ndim == 3 else counts[None], facts, "forward passes")


def _dump(path: Path) -> Mapping[str, Any]:
    if path.suffix.lower() == ".npz":
        return read_arrays(path)
    dump = read_json(path) if path.suffix.lower() == ".json" else read_torch(path)
    if not isinstance(dump, Mapping):
        raise ValueError(f"{path}: must hold a dict with logical_count or records; given a {type(dump).__name__}")
    return dump


def _kind(path: Path, dump: Mapping[str, Any]) -> str:
    if "logical_count" in dump:
        return "stat"
    records = dump.get("records")
    if not isinstance(records, list) or not records or not all(isinstance(record, Mapping) for record in records):
        keys = ", ".join(map(str, dump)) or "nothing"
        raise ValueError(
            f"{path}: needs logical_count, or a list records with at least one forward pass; it has {keys}"
        )
    for kind, key in (("per_token", "topk_ids_of_layer"), ("per_pass", "global_physical_count")):
        if all(key in record for record in records):
            return kind
    raise ValueError(f"{path}: every record needs topk_ids_of_layer (per_token) or global_physical_count (per_pass)")


def _ints(path: Path, what: str, values: Any) -> Ints:
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        array = np.empty(0, object)
    if not array.size:
        return np.zeros(array.shape, np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{path}: {what} must be an array of whole numbers; given {array.dtype} {list(array.shape)}")
    return array.astype(np.int64)


def _logical_map(path: Path, dump: Mapping[str, Any]) -> Ints | None:
    """Logical expert of each physical one, int64 [layer, physical expert]; None where the recording has none."""
    given = dump.get("last_physical_to_logical_map")
    if given is None:
        return None
    logical = _ints(path, "last_physical_to_logical_map", given)
    if logical.ndim != 2 or not logical.size or not 0 <= logical.min() <= logical.max() < MAX_EXPERTS:
        raise ValueError(
            f"{path}: last_physical_to_logical_map must be [layer, physical expert] of ids from 0 to {MAX_EXPERTS - 1}"
        )
    return logical


def _counted(paths: Sequence[Path], counts_WLE: Ints, facts: Facts, windows: str) -> CountTrace:
    """A count trace of the layers and passes that routed anything."""
    layers = np.flatnonzero(counts_WLE.sum(axis=(0, 2)))
    is_used_W = counts_WLE.sum(axis=(1, 2)) > 0
    return count_trace(paths, facts, counts_WLE[is_used_W][:, layers], layers.tolist(), windows)


def _pass_counts(paths: Sequence[Path], dumps: Sequence[Mapping[str, Any]]) -> Ints:
    """Counts by forward pass and logical expert, summed over ranks, int64 [pass, layer, expert]."""
    by_pass: dict[int, list[Ints]] = {}
    for path, dump in zip(paths, dumps, strict=True):
        logical = _logical_map(path, dump)
        for number, record in enumerate(dump["records"]):
            what = f"records[{number}].global_physical_count"
            count_LP = _ints(path, what, record["global_physical_count"])
            if count_LP.ndim != 2 or (logical is not None and count_LP.shape != logical.shape):
                asked = "[layer, physical expert]" if logical is None else str(list(logical.shape))
                raise ValueError(f"{path}: {what} must be {asked}; given {list(count_LP.shape)}")
            count_LE = count_LP
            if logical is not None:
                count_LE = np.zeros((len(logical), int(logical.max()) + 1), np.int64)
                np.add.at(count_LE, (np.arange(len(logical))[:, None], logical), count_LP)
            step = record.get("forward_pass_id")
            by_pass.setdefault(step if isinstance(step, int) else number, []).append(count_LE)
    shapes = {count_LE.shape for counts in by_pass.values() for count_LE in counts}
    if len(shapes) > 1:
        raise ValueError(
            f"{paths[0]}: every pass must have the same layers and experts; given {sorted(shapes)}; convert them apart"
        )
    return np.stack([np.sum(by_pass[step], axis=0) for step in sorted(by_pass)])


def _token_trace(paths: Sequence[Path], dumps: Sequence[Mapping[str, Any]], facts: Facts) -> RoutingTrace:
    traces: list[RoutingTrace] = []
    for path, dump in zip(paths, dumps, strict=True):
        trace = _one_rank(path, dump, facts)
        for earlier, other in zip(paths, traces, strict=False):
            same_ids = np.array_equal(trace.expert_ids_TLK, other.expert_ids_TLK)
            if same_ids and np.array_equal(trace.position_T, other.position_T):
                raise ValueError(
                    f"{path}: holds the same tokens as {earlier.name}, as ranks of one tensor-parallel group do; "
                    "give one file of each group"
                )
        traces.append(trace)
    return concatenated(paths, traces, facts)


def _one_rank(path: Path, dump: Mapping[str, Any], facts: Facts) -> RoutingTrace:
    """The tokens of one per_token recording."""
    logical, tokens = _logical_map(path, dump), requests_of(path, dump["records"])
    parts: list[Ints] = []
    for number, record in enumerate(dump["records"]):
        if not record["positions"]:
            continue
        ids_LTK = _ints(path, f"records[{number}].topk_ids_of_layer", record["topk_ids_of_layer"])
        if ids_LTK.ndim != 3 or ids_LTK.shape[1] != len(record["positions"]):
            raise ValueError(
                f"{path}: records[{number}].topk_ids_of_layer must be [layer, token, K] with a token for each of its "
                f"{len(record['positions'])} positions; given {list(ids_LTK.shape)}"
            )
        parts.append(ids_LTK.transpose(1, 0, 2))
    if len({part.shape[1:] for part in parts}) != 1:
        raise ValueError(f"{path}: topk_ids_of_layer must have the same layers and K in every record, and some tokens")
    ids_TLK = np.concatenate(parts)
    is_used_TLK = ids_TLK >= 0
    routed_T = is_used_TLK.any(axis=(1, 2))  # padding has none
    layers = np.flatnonzero(is_used_TLK.any(axis=(0, 2)))
    top_k = int(is_used_TLK.any(axis=(0, 1)).sum())
    ids_TLK = ids_TLK[routed_T][:, layers, :top_k]
    if (ids_TLK < 0).any():
        t, i, _ = np.argwhere(ids_TLK < 0)[0]
        token = np.flatnonzero(routed_T)[t]
        raise ValueError(
            f"{path}: every token must have {top_k} experts in every MoE layer; token {token} has "
            f"{ids_TLK[t, i].tolist()} in layer {layers[i]}; record again, without two-batch overlap"
        )
    if logical is not None:
        if ids_TLK.size and (len(logical) <= layers.max() or ids_TLK.max() >= logical.shape[1]):
            raise ValueError(
                f"{path}: last_physical_to_logical_map is {list(logical.shape)}, too small for layer {layers.max()} "
                f"and physical expert {ids_TLK.max()}; record again, without fusing shared experts"
            )
        ids_TLK = logical[layers[None, :, None], ids_TLK]
    return routing_trace(
        path,
        facts,
        ids_TLK=ids_TLK,
        request_T=tokens.request_T[routed_T],
        position_T=tokens.position_T[routed_T],
        is_decode_T=tokens.is_decode_T[routed_T],
        token_id_T=tokens.token_id_T[routed_T],
        num_experts=None if logical is None else int(logical.max()) + 1,
        layers=layers.tolist(),
    )
