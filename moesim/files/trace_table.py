"""A routing trace as an Arrow table and back: the columns, the header, and what can be wrong with them.

The rules here are about the table (columns, types, nulls, every token in every layer); `trace_rules` holds those
about the arrays that come out of it.
"""

from __future__ import annotations

import json
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


def read_header(metadata: dict[bytes, bytes] | None) -> tuple[dict[str, Any], list[str]]:
    """The header facts, and what is wrong with them."""
    raw = (metadata or {}).get(METADATA_KEY)
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


def column_mistakes(table: pa.Table) -> list[str]:
    """Columns that lack, have another type, or hold nulls."""
    found = []
    for name, (kind, said) in _SCALARS.items():
        if name not in table.column_names and name == "token_id":
            continue
        if name not in table.column_names:
            found.append(f"column {name} lacks; the file has {', '.join(table.column_names)}")
        elif table.schema.field(name).type != kind:
            found.append(f"column {name} must be {said}; given {table.schema.field(name).type}")
        elif table[name].null_count:
            row = _first_null(table[name])
            found.append(f"column {name}, row {row}: must not be null; fill it in")
    sizes: dict[str, int] = {}
    for name, kinds in LISTS.items():
        if name not in table.column_names:
            if name == "expert_ids":
                found.append(f"column {name} lacks; the file has {', '.join(table.column_names)}")
            continue
        given = table.schema.field(name).type
        if not pa.types.is_fixed_size_list(given) or given.value_type not in kinds:
            said = " or ".join(str(kind) for kind in kinds)
            found.append(f"column {name} must be a fixed-size list of {said}; given {given}")
            continue
        sizes[name] = given.list_size
        if name == "weights" and sizes.get("expert_ids", given.list_size) != given.list_size:
            asked = f"{sizes['expert_ids']} values a row, as expert_ids"
            found.append(f"column {name} must hold {asked}; given {given.list_size}")
        if name not in PREDICTED and table[name].null_count:
            found.append(f"column {name}, row {_first_null(table[name])}: must not be null; fill it in")
        elif any(chunk.flatten().null_count for chunk in table[name].chunks):
            found.append(f"column {name}: no value inside a list may be null; fill it in")
    return found


def _first_null(column: pa.ChunkedArray) -> int:
    return int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])


def find_layers(table: pa.Table) -> tuple[tuple[int, ...], list[str]]:
    """The layers every token must have, and the first token that does not have them, once each and in
    order.
    """
    layer = table["layer"].to_numpy()
    token = (table["request"].to_numpy().astype(np.int64) << 32) + table["position"].to_numpy()
    layers = tuple(np.unique(layer).tolist())
    starts = np.concatenate([[0], np.flatnonzero(np.diff(token)) + 1, [len(token)]])
    counts = np.diff(starts)
    within = np.arange(len(token)) - np.repeat(starts[:-1], counts)
    wrong = (within >= len(layers)) | (layer != np.asarray(layers)[np.minimum(within, len(layers) - 1)])
    bad = np.logical_or.reduceat(wrong, starts[:-1]) | (counts != len(layers))
    if not bad.any():
        return layers, []
    first = int(bad.argmax())
    row = int(starts[first])
    where = f"request {table['request'][row]} position {table['position'][row]}"
    return layers, [
        f"column layer, row {row}: each token must have the layers {list(layers)} once, in this order; "
        f"{where} has "
        f"{layer[starts[first] : starts[first + 1]].tolist()}; add the rows that lack and sort by "
        f"(request, position, layer) ({int(bad.sum())} tokens)"
    ]


def layer_mistakes(table: pa.Table, num_layers: int) -> list[str]:
    """Facts of a token must be the same in its layers; predictions are null in the last layer and only
    there.
    """
    found = []
    facts = {"phase": _phase_index(table)}
    if "token_id" in table.column_names:
        facts["token_id"] = table["token_id"].to_numpy()
    for name, values in facts.items():
        rows = values.reshape(-1, num_layers)
        differs = (rows != rows[:, :1]).ravel()
        if differs.any():
            row = int(differs.argmax())
            found.append(
                f"column {name}, row {row}: must be the same in every layer of a token; given "
                f"{table[name][row]} "
                f"after {table[name][row // num_layers * num_layers]}"
            )
    phases = set(table["phase"].unique().to_pylist())
    if not phases <= set(PHASES):
        found.append(f"column phase: must be prefill or decode; given {', '.join(sorted(phases - set(PHASES)))}")
    for name, horizon in PREDICTED.items():
        if name not in table.column_names:
            continue
        if horizon > 1 and predicted_column(horizon - 1) not in table.column_names:
            found.append(f"column {name}: needs column {predicted_column(horizon - 1)} beside it; given none")
        null = table[name].is_null().to_numpy(zero_copy_only=False)
        wanted = np.arange(len(null)) % num_layers >= num_layers - horizon
        if (null != wanted).any():
            row = int((null != wanted).argmax())
            rule = "null, as no layer follows" if wanted[row] else "given, as a layer follows"
            found.append(f"column {name}, row {row}: must be {rule}; leave the whole column out otherwise")
    return found


def _phase_index(table: pa.Table) -> NDArray[np.int64]:
    """0 for prefill, 1 for decode, -1 for anything else, whatever order the dictionary has."""
    order = {phase: index for index, phase in enumerate(PHASES)}
    parts = [
        np.asarray([order.get(word, -1) for word in chunk.dictionary.to_pylist()])[chunk.indices.to_numpy()]
        for chunk in table["phase"].chunks
    ]
    return np.concatenate(parts).astype(np.int64)


def to_trace(table: pa.Table, header: dict[str, Any], layers: tuple[int, ...]) -> RoutingTrace:
    """The trace in a table whose columns and layers are right."""
    L = len(layers)

    def lists(name: str, layers_held: int) -> NDArray[Any]:
        flat = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[name].chunks])
        size = table.schema.field(name).type.list_size
        return flat.reshape(-1, layers_held, size) if layers_held else flat.reshape(table.num_rows // L, 0, size)

    return RoutingTrace(
        name=header["name"],
        model=header["model"],
        origin=header["origin"],
        num_experts=header["num_experts"],
        expert_ids_TLK=lists("expert_ids", L),
        request_T=table["request"].to_numpy()[::L],
        position_T=table["position"].to_numpy()[::L],
        is_decode_T=_phase_index(table)[::L] == 1,
        token_id_T=table["token_id"].to_numpy()[::L] if "token_id" in table.column_names else None,
        layers=layers,
        weights_TLK=lists("weights", L) if "weights" in table.column_names else None,
        predicted_HTLW=tuple(
            lists(name, max(L - horizon, 0)) for name, horizon in PREDICTED.items() if name in table.column_names
        ),
        scores_TLE=lists("scores", L) if "scores" in table.column_names else None,
        provenance=header["provenance"],
    )
