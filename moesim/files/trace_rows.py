"""From the columns of a trace file to the trace: which rows are one token, and every rule that the rows break.

Each rule is asked wherever the columns that it needs are right, so that one reading finds as much as can be found: a
token without all of its layers hides neither a wrong id nor a wrong weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.files.trace_rules import (
    MAX_EXPERTS,
    header_mistakes,
    id_mistakes,
    negative,
    predicted_column,
    score_mistakes,
    token_mistakes,
    too_many_experts,
    weight_mistakes,
)
from moesim.files.trace_table import PREDICTED, Columns
from moesim.routing.trace import RoutingTrace


def mistakes_of_rows(columns: Columns, header: dict[str, Any]) -> list[str]:
    """Every rule that the rows break, of those that the right columns and facts of the header allow to ask."""
    if columns.num_rows == 0:
        return ["the trace is empty (no rows); capture some tokens"]
    scalars, found = columns.scalars, []
    each_row = np.arange(columns.num_rows + 1) if "layer" in scalars and scalars["layer"].min() < 0 else None
    if each_row is not None:
        found += negative("layer", scalars["layer"], each_row)
    if {"request", "position"} <= scalars.keys():
        starts_T = token_starts(columns)
        if "layer" in scalars:
            found += _layer_mistakes(columns, starts_T)
        found += _fact_mistakes(columns, starts_T)
    else:  # a row is the least that is one token
        starts_T = np.arange(columns.num_rows)
    facts = {name: values[starts_T] for name, values in scalars.items() if name != "layer"}
    found += token_mistakes(facts, np.append(starts_T, columns.num_rows))
    return found + _prediction_mistakes(columns) + _list_mistakes(columns, header)


def token_starts(columns: Columns) -> NDArray[np.intp]:
    """The row at which each token starts: request or position differ from the row before."""
    request, position = columns.scalars["request"], columns.scalars["position"]
    is_start = np.ones(columns.num_rows, np.bool_)
    np.not_equal(request[1:], request[:-1], out=is_start[1:])
    is_start[1:] |= position[1:] != position[:-1]
    return np.flatnonzero(is_start)


def _layer_mistakes(columns: Columns, starts_T: NDArray[np.intp]) -> list[str]:
    """Each token has every layer of the file, once and in order; the first one that does not."""
    layer = columns.scalars["layer"]
    counts_T = np.diff(starts_T, append=columns.num_rows)
    L = int(counts_T[0])
    # The common case in one pass: every token has as many rows as the first, whose layers rise and come again.
    if (counts_T == L).all() and (layer[1:L] > layer[: L - 1]).all() and (layer[L:] == layer[:-L]).all():
        return []
    layers = np.unique(layer)
    within = np.arange(len(layer)) - np.repeat(starts_T, counts_T)
    wrong = (within >= len(layers)) | (layer != layers[np.minimum(within, len(layers) - 1)])
    bad_T = np.logical_or.reduceat(wrong, starts_T) | (counts_T != len(layers))
    token = int(bad_T.argmax())
    row, end = int(starts_T[token]), int(starts_T[token] + counts_T[token])
    where = f"request {columns.scalars['request'][row]} position {columns.scalars['position'][row]}"
    return [
        f"column layer, row {row}: each token must have the layers {layers.tolist()} once, in this order; "
        f"{where} has {layer[row:end].tolist()}; add the rows that lack and sort by (request, position, layer) "
        f"({int(bad_T.sum())} tokens)"
    ]


def _fact_mistakes(columns: Columns, starts_T: NDArray[np.intp]) -> list[str]:
    """Facts of a token are the same in its layers."""
    found = []
    for name in ("phase", "token_id"):
        if name not in columns.scalars:
            continue
        values = columns.scalars[name]
        differs = values[1:] != values[:-1]
        differs[starts_T[1:] - 1] = False
        if differs.any():
            row = int(differs.argmax()) + 1
            given, before = (_said(name, values[at]) for at in (row, row - 1))
            found.append(
                f"column {name}, row {row}: must be the same in every layer of a token; given {given} after {before}"
            )
    return found


def _said(name: str, value: int) -> str:
    return {0: "prefill", 1: "decode", -1: "another word"}[int(value)] if name == "phase" else str(value)


def _prediction_mistakes(columns: Columns) -> list[str]:
    """Predictions are null in the layers that no layer of their horizon follows, and only there."""
    found = []
    for name, null in columns.null.items():
        horizon = PREDICTED[name]
        if horizon > 1 and predicted_column(horizon - 1) not in columns.null:
            found.append(f"column {name}: needs column {predicted_column(horizon - 1)} beside it; given none")
        if "layer" not in columns.scalars:
            continue
        layer = columns.scalars["layer"]
        wanted = layer >= np.unique(layer)[-horizon:][0]
        differs = null != wanted
        if differs.any():
            row = int(differs.argmax())
            rule = "null, as no layer follows" if wanted[row] else "given, as a layer follows"
            found.append(f"column {name}, row {row}: must be {rule}; leave the whole column out otherwise")
    return found


def _list_mistakes(columns: Columns, header: dict[str, Any]) -> list[str]:
    """Rules of ids, weights and scores, row by row."""
    lists, found = columns.lists, []
    known = not any("num_experts" in mistake for mistake in header_mistakes(header))
    E: int = header["num_experts"] if known else MAX_EXPERTS
    K = lists["expert_ids"].shape[1] if "expert_ids" in lists else None
    if K is not None and K > E:
        found.append(too_many_experts(K, E))
    for name in ("expert_ids", *PREDICTED):
        if name in lists:
            rows = np.flatnonzero(~columns.null[name]) if name in columns.null else None
            found += id_mistakes(name, lists[name], E, rows)
    if "scores" in lists:
        width = lists["scores"].shape[1]
        if known and width != E:
            found.append(f"column scores must hold {E} values a row, as num_experts in the header; given {width}")
        found += score_mistakes(lists["scores"])
    if "weights" in lists:
        width = lists["weights"].shape[1]
        if K is not None and width != K:
            found.append(f"column weights must hold {K} values a row, as expert_ids; given {width}")
        found += weight_mistakes(lists["weights"])
    return found


def to_trace(columns: Columns, header: dict[str, Any]) -> RoutingTrace:
    """The trace of columns and a header without mistakes: ids, weights and scores are views, the rest is small."""
    starts_T = token_starts(columns)
    T, scalars, lists = len(starts_T), columns.scalars, columns.lists
    L = columns.num_rows // T
    return RoutingTrace(
        name=header["name"],
        model=header["model"],
        origin=header["origin"],
        num_experts=header["num_experts"],
        expert_ids_TLK=lists["expert_ids"].reshape(T, L, -1),
        request_T=scalars["request"][starts_T],
        position_T=scalars["position"][starts_T],
        is_decode_T=scalars["phase"][starts_T] == 1,
        token_id_T=scalars["token_id"][starts_T] if "token_id" in scalars else None,
        layers=tuple(scalars["layer"][:L].tolist()),
        weights_TLK=lists["weights"].reshape(T, L, -1) if "weights" in lists else None,
        predicted_HTLW=tuple(
            lists[name].reshape(T, max(L - horizon, 0), lists[name].shape[1])
            for name, horizon in PREDICTED.items()
            if name in lists
        ),
        scores_TLE=lists["scores"].reshape(T, L, -1) if "scores" in lists else None,
        provenance=header["provenance"],
    )
