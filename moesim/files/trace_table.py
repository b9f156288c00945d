"""A routing trace as an Arrow table and back: the columns, the header, and what can be wrong with each by itself.

`trace_rows` makes a trace of the columns that are right; `trace_rules` holds the rules of the arrays.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moesim.files.trace_rules import MAX_HORIZON, header_mistakes, predicted_column
from moesim.routing.trace import RoutingTrace

FORMAT = 1
METADATA_KEY = b"moesim"
PHASES = ("prefill", "decode")

_SCALARS = {
    "request": (pa.int32(), "int32"),
    "position": (pa.int32(), "int32"),
    "phase": (pa.dictionary(pa.int8(), pa.string()), "dictionary of strings"),
    "layer": (pa.int16(), "int16"),
    "token_id": (pa.int32(), "int32"),  # optional
}
_IDS, _FLOATS = (pa.uint8(), pa.uint16()), (pa.float16(),)
PREDICTED = {predicted_column(horizon): horizon for horizon in range(1, MAX_HORIZON + 1)}
LISTS = {"expert_ids": _IDS, "weights": _FLOATS, "scores": _FLOATS, **dict.fromkeys(PREDICTED, _IDS)}


def header_facts(trace: RoutingTrace) -> dict[str, object]:
    """The facts of the whole trace, as they stand in the metadata."""
    return {
        "format": FORMAT,
        "name": trace.name,
        "model": trace.model,
        "origin": trace.origin,
        "num_experts": trace.num_experts,
        "provenance": dict(trace.provenance),
    }


def to_table(trace: RoutingTrace) -> pa.Table:
    """The rows of a right trace, [T x L], with its header as metadata."""
    T, L, _K = trace.expert_ids_TLK.shape
    phases = pa.DictionaryArray.from_arrays(pa.array(np.repeat(trace.is_decode_T, L).astype(np.int8)), pa.array(PHASES))
    columns = {
        "request": pa.array(np.repeat(trace.request_T, L)),
        "position": pa.array(np.repeat(trace.position_T, L)),
        "phase": phases,
        **({} if trace.token_id_T is None else {"token_id": pa.array(np.repeat(trace.token_id_T, L))}),
        "layer": pa.array(np.tile(np.asarray(trace.layers, dtype=np.int16), T)),
        "expert_ids": _lists(trace.expert_ids_TLK),
    }
    if trace.weights_TLK is not None:
        columns["weights"] = _lists(trace.weights_TLK)
    if trace.scores_TLE is not None:
        columns["scores"] = _lists(trace.scores_TLE)
    for horizon, ids_TLW in enumerate(trace.predicted_HTLW, start=1):
        padded = np.pad(ids_TLW, ((0, 0), (0, min(horizon, L)), (0, 0)))
        columns[predicted_column(horizon)] = _lists(padded, np.tile(np.arange(L) >= L - horizon, T))
    metadata = {METADATA_KEY: json.dumps(header_facts(trace), sort_keys=True).encode()}
    return pa.table(columns).replace_schema_metadata(metadata)


def _lists(values_TLK: NDArray[Any], missing: NDArray[np.bool_] | None = None) -> pa.FixedSizeListArray:
    mask = None if missing is None else pa.array(missing)
    return pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(values_TLK).ravel()), values_TLK.shape[2], mask=mask
    )


def read_header(table: pa.Table) -> tuple[dict[str, Any], list[str]]:
    """The header facts, and what is wrong with them."""
    raw = (table.schema.metadata or {}).get(METADATA_KEY)
    if raw is None:
        return {}, ["header: the schema metadata has no key 'moesim'; write the file with moesim"]
    try:
        header = json.loads(raw)
    except ValueError as error:
        return {}, [f"header: the metadata under 'moesim' is not JSON ({error}); write the file with moesim"]
    if not isinstance(header, dict):
        return {}, [f"header: the metadata under 'moesim' must be a JSON object; given {header!r}"]
    found = header_mistakes(header)
    if header.get("format") != FORMAT:
        found.insert(0, f"header: format must be {FORMAT}; given {header.get('format')!r}; update moesim")
    return header, found


@dataclass
class Columns:
    """The columns of a table that have no mistake of their own, as arrays; views of the table where it is in one piece.

    Attributes:
        num_rows: N.
        scalars: request, position, layer, token_id and phase (0 prefill, 1 decode, -1 neither) by name, [N].
        lists: expert_ids, weights, scores and the predictions by name, [rows that are not null, K].
        null: for each column of predictions, whether a row is null, bool [N].
    """

    num_rows: int
    scalars: dict[str, NDArray[Any]] = field(default_factory=dict)
    lists: dict[str, NDArray[Any]] = field(default_factory=dict)
    null: dict[str, NDArray[np.bool_]] = field(default_factory=dict)


def read_columns(table: pa.Table) -> tuple[Columns, list[str]]:
    """The right columns, and what is wrong with the others: they lack, have another type, or hold nulls."""
    columns, found = Columns(table.num_rows), []
    given_names = ", ".join(table.column_names)
    twice = sorted(name for name, times in Counter(table.column_names).items() if times > 1)
    if twice:  # no column can be asked for by such a name
        return columns, [f"column {name} stands there more than once; keep it once" for name in twice]
    for name, (kind, said) in _SCALARS.items():
        if name not in table.column_names:
            if name != "token_id":
                found.append(f"column {name} lacks; the file has {given_names}")
        elif table.schema.field(name).type != kind:
            found.append(f"column {name} must be {said}; given {table.schema.field(name).type}")
        elif table[name].null_count:
            found.append(_null_row(name, table[name]))
        else:
            columns.scalars[name] = table[name].to_numpy() if name != "phase" else _phase_codes(table[name])
    if "phase" in columns.scalars and (columns.scalars["phase"] < 0).any():
        words = {str(word) for word in table["phase"].unique().to_pylist()} - set(PHASES)
        found.append(f"column phase: must be prefill or decode; given {', '.join(sorted(words))}")
    for name, kinds in LISTS.items():
        if name not in table.column_names:
            if name == "expert_ids":
                found.append(f"column {name} lacks; the file has {given_names}")
            continue
        given = table.schema.field(name).type
        if not pa.types.is_fixed_size_list(given) or given.value_type not in kinds:
            said = " or ".join(str(kind) for kind in kinds)
            found.append(f"column {name} must be a fixed-size list of {said}; given {given}")
        elif given.list_size == 0:
            found.append(f"column {name} must hold at least 1 value a row; given {given}")
        elif name not in PREDICTED and table[name].null_count:
            found.append(_null_row(name, table[name]))
        else:
            _read_lists(name, table[name], columns, found)
    return columns, found


def _null_row(name: str, column: pa.ChunkedArray) -> str:
    row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
    return f"column {name}, row {row}: must not be null; fill it in"


def _phase_codes(column: pa.ChunkedArray) -> NDArray[np.int8]:
    """0 for prefill, 1 for decode, -1 for anything else, whatever order the dictionary has."""
    order = {phase: index for index, phase in enumerate(PHASES)}
    parts = [
        np.asarray([order.get(word, -1) for word in chunk.dictionary.to_pylist()], np.int8)[chunk.indices.to_numpy()]
        for chunk in column.chunks
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.int8)


def _read_lists(name: str, column: pa.ChunkedArray, columns: Columns, found: list[str]) -> None:
    """Add the values of a column of lists to `columns`: a view of one chunk, one copy of several."""
    chunks = [chunk.flatten() for chunk in column.chunks]  # leaves null rows out
    if any(chunk.null_count for chunk in chunks):
        found.append(f"column {name}: no value inside a list may be null; fill it in")
        return
    parts = [chunk.to_numpy() for chunk in chunks] or [np.empty(0, column.type.value_type.to_pandas_dtype())]
    values = parts[0] if len(parts) == 1 else np.concatenate(parts)
    columns.lists[name] = values.reshape(-1, column.type.list_size)
    if name in PREDICTED:
        columns.null[name] = column.is_null().to_numpy()
