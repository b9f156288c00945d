"""What makes a routing trace right, as rules on arrays; each broken rule is one line that says what would
mend it.

The reader and the writer of trace files ask here, so that a file that was written can be read. A line names
the
column and the first row that breaks the rule, rows counted as in the file: row = token * L + layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing.trace import ORIGINS, RoutingTrace

MAX_EXPERTS = 65_536
MAX_HORIZON = 3


def predicted_column(horizon: int) -> str:
    """Name of the column with the predictions of the router `horizon` MoE layers ahead."""
    return "predicted_ids" if horizon == 1 else f"predicted_ids_{horizon}"


def trace_mistakes(trace: RoutingTrace) -> list[str]:
    """Every broken rule of a trace, one line each; an empty list where all is well."""
    header = {
        "name": trace.name,
        "model": trace.model,
        "origin": trace.origin,
        "num_experts": trace.num_experts,
    }
    found = header_mistakes(header | {"provenance": dict(trace.provenance)}) + shape_mistakes(trace)
    return found or token_mistakes(trace) + routing_mistakes(trace)


def header_mistakes(header: Mapping[str, object]) -> list[str]:
    """Broken rules of the header facts: name, model, origin, num_experts, provenance."""
    found = [
        f"header: {key} must be a non-empty string; given {header.get(key)!r}; write what reports should call it"
        for key in ("name", "model")
        if not isinstance(header.get(key), str) or not header[key]
    ]
    if header.get("origin") not in ORIGINS:
        found.append(f"header: origin must be one of {', '.join(ORIGINS)}; given {header.get('origin')!r}")
    experts = header.get("num_experts")
    if not isinstance(experts, int) or isinstance(experts, bool) or not 1 <= experts <= MAX_EXPERTS:
        found.append(
            f"header: num_experts must be a whole number from 1 to {MAX_EXPERTS}; given {experts!r}; "
            "write the number of routed experts of a layer"
        )
    provenance = header.get("provenance")
    if not isinstance(provenance, dict) or not all(
        isinstance(key, str) and isinstance(value, str) for key, value in provenance.items()
    ):
        found.append(f"header: provenance must map strings to strings; given {provenance!r}")
    return found


def shape_mistakes(trace: RoutingTrace) -> list[str]:
    """Broken rules of shapes and types, which every later rule relies on."""
    ids = trace.expert_ids_TLK
    if ids.ndim != 3 or ids.dtype not in (np.uint8, np.uint16):
        return [f"expert_ids must be uint8 or uint16 [T, L, K]; given {ids.dtype} {list(ids.shape)}"]
    T, L, K = ids.shape
    wanted: dict[str, tuple[NDArray[np.generic] | None, tuple[int, ...], tuple[type, ...]]] = {
        "request": (trace.request_T, (T,), (np.int32,)),
        "position": (trace.position_T, (T,), (np.int32,)),
        "phase": (trace.is_decode_T, (T,), (np.bool_,)),
        "token_id": (trace.token_id_T, (T,), (np.int32,)),
        "weights": (trace.weights_TLK, (T, L, K), (np.float16,)),
        "scores": (trace.scores_TLE, (T, L, trace.num_experts), (np.float16,)),
    }
    for horizon, ids_TLW in enumerate(trace.predicted_HTLW, start=1):
        width = ids_TLW.shape[2] if ids_TLW.ndim == 3 else K
        wanted[predicted_column(horizon)] = (ids_TLW, (T, max(L - horizon, 0), width), (np.uint8, np.uint16))
    found = [
        f"{column} must be {' or '.join(t.__name__ for t in types)} {list(shape)}; "
        f"given {array.dtype} {list(array.shape)}"
        for column, (array, shape, types) in wanted.items()
        if array is not None and (array.shape != shape or array.dtype.type not in types)
    ]
    if T == 0 or L == 0 or K == 0:
        found.append(f"the trace is empty (tokens, layers, experts per token = {T}, {L}, {K}); capture some tokens")
    if len(trace.layers) != L:
        found.append(f"layer must name {L} layers, as many as expert_ids has; given {list(trace.layers)}")
    if any(b <= a for a, b in zip((-1, *trace.layers), trace.layers, strict=False)):
        found.append(f"layer must be non-negative and increasing; given {list(trace.layers)}")
    return found


def token_mistakes(trace: RoutingTrace) -> list[str]:
    """Broken rules of the tokens: order, signs, decode after prefill."""
    L = trace.num_layers
    found = []
    for column, values_T in (
        ("request", trace.request_T),
        ("position", trace.position_T),
        ("token_id", trace.token_id_T),
    ):
        if values_T is not None:
            found += first_bad(column, values_T < 0, L, partial(_negative, values_T))
    same_T = np.diff(trace.request_T) == 0
    key_T = (trace.request_T.astype(np.int64) << 32) + trace.position_T
    found += first_bad(
        "position",
        np.concatenate([[False], np.diff(key_T) <= 0]),
        L,
        lambda t: (
            f"rows must be sorted by (request, position), each pair once; request {trace.request_T[t]} "
            "position "
            f"{trace.position_T[t]} follows request {trace.request_T[t - 1]} position "
            f"{trace.position_T[t - 1]}; "
            "sort the rows and drop repeats"
        ),
    )
    found += first_bad(
        "phase",
        np.concatenate([[False], same_T & trace.is_decode_T[:-1] & ~trace.is_decode_T[1:]]),
        L,
        lambda t: f"prefill must come before decode in a request; request {trace.request_T[t]} goes back",
    )
    return found


def _negative(values_T: NDArray[np.int32], token: int) -> str:
    return f"must not be negative; given {values_T[token]}"


def routing_mistakes(trace: RoutingTrace) -> list[str]:
    """Broken rules of the routing: ids in range and distinct, weights finite and not negative."""
    L, E, K = trace.num_layers, trace.num_experts, trace.top_k
    found = []
    if K > E:
        found.append(f"expert_ids: a token cannot choose {K} of {E} experts; correct num_experts in the header")
    found += _id_mistakes("expert_ids", trace.expert_ids_TLK, E, L)
    for horizon, ids_TLW in enumerate(trace.predicted_HTLW, start=1):
        found += _id_mistakes(predicted_column(horizon), ids_TLW, E, L)
    if trace.scores_TLE is not None:
        bad = ~np.isfinite(trace.scores_TLE).all(axis=2).ravel()
        found += first_bad("scores", bad, 1, lambda _row: "router scores must be finite; leave the column out")
    if trace.weights_TLK is not None:
        weights = trace.weights_TLK
        # The bits of a float16 from 0 to the largest finite value are 0x0000 to 0x7bff; 0x8000 is -0.
        bits = weights.view(np.uint16)
        bad_TL = ((bits >= 0x7C00) & (bits != 0x8000)).any(axis=2)
        found += first_bad(
            "weights",
            bad_TL.ravel(),
            1,
            lambda row: (
                "gate weights must be finite and not negative; given "
                f"{weights.reshape(-1, K)[row].tolist()}; "
                "capture again, or leave the column out"
            ),
        )
    return found


def _id_mistakes(column: str, ids: NDArray[Any], num_experts: int, num_layers: int) -> list[str]:
    """Range and distinctness of ids [T, covered layers, K], which may leave out the last layers."""
    covered: int = ids.shape[1]
    rows = ids.reshape(-1, ids.shape[2])
    ordered = np.sort(rows, axis=1)

    def file_row(row: int) -> int:
        return row // covered * num_layers + row % covered

    found = []
    out_of_range = ordered[:, -1] >= num_experts
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    rules = (
        (
            out_of_range,
            f"expert ids must be below num_experts = {num_experts}",
            "correct the ids or num_experts",
        ),
        (repeated, "a token's experts must be distinct", "keep each expert once"),
    )
    for bad, rule, remedy in rules:
        if bad.any():
            row = int(bad.argmax())
            found.append(
                f"column {column}, row {file_row(row)}: {rule}; given {rows[row].tolist()}; "
                f"{remedy} ({_rows(int(bad.sum()))})"
            )
    return found


def first_bad(column: str, bad: NDArray[np.bool_], rows_per_entry: int, say: Callable[[int], str]) -> list[str]:
    """One line for the first True of `bad`, or none; `say(index)` gives the rule and what was given."""
    if not bad.any():
        return []
    index = int(bad.argmax())
    return [f"column {column}, row {index * rows_per_entry}: {say(index)} ({_rows(int(bad.sum()) * rows_per_entry)})"]


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
