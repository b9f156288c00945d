"""What makes a routing trace right, as rules on arrays; each broken rule is one line that says what would
mend it.

The reader and the writer of trace files ask here, so that a file that was written can be read. A line names the
column and the first row that breaks the rule, rows counted as in the file: row = token * L + layer where every token
has all layers. The reader asks before it knows that: `row_T` says at which row each token starts, and where it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.files.trace_passes import bad_floats, bad_ids
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
    return found or _token_rules(trace) + _routing_rules(trace)


def _token_rules(trace: RoutingTrace) -> list[str]:
    facts: dict[str, NDArray[Any]] = {
        "request": trace.request_T,
        "position": trace.position_T,
        "phase": trace.is_decode_T.astype(np.int8),
    }
    if trace.token_id_T is not None:
        facts["token_id"] = trace.token_id_T
    return token_mistakes(facts, np.arange(trace.num_tokens + 1) * trace.num_layers)


def _routing_rules(trace: RoutingTrace) -> list[str]:
    L, E = trace.num_layers, trace.num_experts
    found = [] if trace.top_k <= E else [too_many_experts(trace.top_k, E)]
    found += id_mistakes("expert_ids", trace.expert_ids_TLK, E)
    for horizon, ids_TLW in enumerate(trace.predicted_HTLW, start=1):
        rows_TL = np.arange(trace.num_tokens * L).reshape(-1, L)[:, : max(L - horizon, 0)]
        found += id_mistakes(predicted_column(horizon), ids_TLW, E, rows_TL.ravel())
    if trace.scores_TLE is not None:
        found += score_mistakes(trace.scores_TLE)
    if trace.weights_TLK is not None:
        found += weight_mistakes(trace.weights_TLK)
    return found


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
        wanted[predicted_column(horizon)] = (ids_TLW, (T, max(L - horizon, 0), max(width, 1)), (np.uint8, np.uint16))
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


def token_mistakes(facts: Mapping[str, NDArray[Any]], row_T: NDArray[np.integer]) -> list[str]:
    """Broken rules of the tokens: order, signs, decode after prefill.

    facts: request, position, phase (0 prefill, 1 decode, -1 neither) and token_id [T] by name, those that are known.
    row_T: the row at which each token starts and, as entry T, the number of rows.
    """
    found = []
    for column in ("request", "position", "token_id"):
        if column in facts:
            found += negative(column, facts[column], row_T)
    if "request" not in facts:
        return found
    request_T = facts["request"]
    same_T = request_T[1:] == request_T[:-1]
    if "position" in facts:
        position_T = facts["position"]
        falls_T = (request_T[1:] < request_T[:-1]) | (same_T & (position_T[1:] <= position_T[:-1]))
        found += first_bad(
            "position",
            np.concatenate([[False], falls_T]),
            row_T,
            lambda t: (
                f"rows must be sorted by (request, position), each pair once; request {request_T[t]} position "
                f"{position_T[t]} follows request {request_T[t - 1]} position {position_T[t - 1]}; "
                "sort the rows and drop repeats"
            ),
        )
    if "phase" in facts:
        back_T = same_T & (facts["phase"][:-1] == 1) & (facts["phase"][1:] == 0)
        found += first_bad(
            "phase",
            np.concatenate([[False], back_T]),
            row_T,
            lambda t: f"prefill must come before decode in a request; request {request_T[t]} goes back",
        )
    return found


def negative(column: str, values_T: NDArray[np.integer], row_T: NDArray[np.integer]) -> list[str]:
    """The rule that no value is below 0."""
    return first_bad(column, values_T < 0, row_T, lambda t: f"must not be negative; given {values_T[t]}")


def first_bad(
    column: str, bad_T: NDArray[np.bool_], row_T: NDArray[np.integer], say: Callable[[int], str]
) -> list[str]:
    """One line for the first True, or none; `say(token)` gives the rule and what was given. `row_T` as above."""
    if not bad_T.any():
        return []
    token = int(bad_T.argmax())
    return [f"column {column}, row {row_T[token]}: {say(token)} ({_rows(int(np.diff(row_T)[bad_T].sum()))})"]


def too_many_experts(top_k: int, num_experts: int) -> str:
    """What to say where K > E."""
    return f"expert_ids: a token cannot choose {top_k} of {num_experts} experts; correct num_experts in the header"


def id_mistakes(
    column: str, ids: NDArray[Any], num_experts: int, row_N: NDArray[np.integer] | None = None
) -> list[str]:
    """Range and distinctness of ids [..., K]; the n-th K ids stand in row `row_N[n]` of the file, or row n."""
    ids_NK = ids.reshape(-1, ids.shape[-1])
    out, twice = bad_ids(ids_NK, num_experts)
    rules = (
        (out, f"expert ids must be below num_experts = {num_experts}", "correct the ids or num_experts"),
        (twice, "a token's experts must be distinct", "keep each expert once"),
    )
    return [
        f"column {column}, row {bad.first if row_N is None else row_N[bad.first]}: {rule}; "
        f"given {ids_NK[bad.first].tolist()}; {remedy} ({_rows(bad.rows)})"
        for bad, rule, remedy in rules
        if bad.rows
    ]


def score_mistakes(scores: NDArray[np.float16]) -> list[str]:
    """Router scores [..., E] are finite."""
    bad = bad_floats(scores.reshape(-1, scores.shape[-1]), negative=True)
    rule = "router scores must be finite; leave the column out"
    return [f"column scores, row {bad.first}: {rule} ({_rows(bad.rows)})"] if bad.rows else []


def weight_mistakes(weights: NDArray[np.float16]) -> list[str]:
    """Gate weights [..., K] are finite and not negative."""
    weights_NK = weights.reshape(-1, weights.shape[-1])
    bad = bad_floats(weights_NK, negative=False)
    if not bad.rows:
        return []
    return [
        f"column weights, row {bad.first}: gate weights must be finite and not negative; given "
        f"{weights_NK[bad.first].tolist()}; capture again, or leave the column out ({_rows(bad.rows)})"
    ]


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
