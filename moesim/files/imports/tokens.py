"""From the arrays of a source, of whatever types, to one right routing trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.files.imports.facts import Facts
from moesim.files.tables import raise_all
from moesim.files.trace_rules import MAX_EXPERTS, trace_mistakes
from moesim.routing.trace import RoutingTrace, joined

MAX_LAYER = int(np.iinfo(np.int16).max)
_INT32_MAX = int(np.iinfo(np.int32).max)


def routing_trace(
    path: Path,
    facts: Facts,
    *,
    ids_TLK: NDArray[Any],
    request_T: NDArray[Any],
    position_T: NDArray[Any],
    is_decode_T: NDArray[np.bool_] | None,
    num_experts: int | None,
    layers: Sequence[int],
    token_id_T: NDArray[Any] | None = None,
    weights_TLK: NDArray[Any] | None = None,
) -> RoutingTrace:
    """A trace of arrays of any integer (and float) types, in any order of tokens, checked.

    Tokens are sorted by (request, position), stably, and a token's experts by falling weight where there are weights.

    Args:
        path: the source, for messages.
        is_decode_T: None where the source does not tell: then `facts.phase`, and where that is None too a request
            whose first token here has position 0 is prefill, another one decode.
        num_experts: what the source says; None where only `facts` can tell.

    Raises:
        ValueError: the arrays break a rule of traces, or nobody says the number of experts.
    """
    if num_experts is not None and facts.num_experts not in (None, num_experts):
        raise ValueError(f"{path}: has {num_experts} experts a layer, --num-experts says {facts.num_experts}; leave it")
    if is_decode_T is not None and facts.phase is not None:
        raise ValueError(f"{path}: says itself which tokens are prefill and which decode; leave --phase out")
    num_experts = facts.num_experts if num_experts is None else num_experts
    if num_experts is None:
        top = f"; its highest id is {ids_TLK.max()}" if ids_TLK.size else ""
        raise ValueError(f"{path}: does not say how many experts a layer has; give --num-experts E{top}")
    mistakes = _range_mistakes(ids_TLK, num_experts, request_T, position_T, token_id_T)
    if max(layers, default=0) > MAX_LAYER:
        mistakes.append(f"layer must be from 0 to {MAX_LAYER}; given {max(layers)}")
    raise_all(str(path), mistakes)
    order = np.lexsort((position_T, request_T))
    request_T, position_T = request_T[order].astype(np.int32), position_T[order].astype(np.int32)
    ids_TLK = ids_TLK[order].astype(np.uint8 if num_experts <= 256 else np.uint16)
    if weights_TLK is not None:
        weights_TLK = weights_TLK[order].astype(np.float16)
        best_TLK = np.argsort(-weights_TLK, axis=2, kind="stable")
        ids_TLK = np.take_along_axis(ids_TLK, best_TLK, axis=2)
        weights_TLK = np.take_along_axis(weights_TLK, best_TLK, axis=2)
    trace = RoutingTrace(
        name=facts.name_of([path]),
        model=facts.model_name(),
        origin=facts.origin or "trained",
        num_experts=num_experts,
        expert_ids_TLK=ids_TLK,
        request_T=request_T,
        position_T=position_T,
        is_decode_T=_phase(facts.phase, request_T, position_T) if is_decode_T is None else is_decode_T[order],
        token_id_T=None if token_id_T is None else token_id_T[order].astype(np.int32),
        layers=tuple(int(layer) for layer in layers),
        weights_TLK=weights_TLK,
        provenance=facts.provenance([path]),
    )
    raise_all(str(path), trace_mistakes(trace))
    return trace


def _range_mistakes(ids: NDArray[Any], num_experts: int, *columns: NDArray[Any] | None) -> list[str]:
    """What would not survive the narrow types of a trace."""
    if not 1 <= num_experts <= MAX_EXPERTS:
        return [f"num_experts must be from 1 to {MAX_EXPERTS}; given {num_experts}"]
    found = []
    if not ids.size:
        found.append("there is no routing in it; record some tokens")
    elif ids.min() < 0 or ids.max() >= num_experts:
        bad = ids.min() if ids.min() < 0 else ids.max()
        t, i, _ = np.argwhere(ids == bad)[0]
        found.append(
            f"expert ids must be from 0 to {num_experts - 1}; given {bad} (token {t}, layer number {i}); "
            "correct the ids or --num-experts"
        )
    for name, values in zip(("request", "position", "token_id"), columns, strict=True):
        if values is not None and values.size and not 0 <= values.min() <= values.max() <= _INT32_MAX:
            found.append(f"{name} must be from 0 to {_INT32_MAX}; given {values.min()} to {values.max()}")
    return found


def _phase(phase: str | None, request_T: NDArray[np.int32], position_T: NDArray[np.int32]) -> NDArray[np.bool_]:
    if phase is not None:
        return np.full(len(request_T), phase == "decode")
    _, first, lengths = np.unique(request_T, return_index=True, return_counts=True)
    return np.repeat(position_T[first] > 0, lengths)


def concatenated(paths: Sequence[Path], traces: Sequence[RoutingTrace], facts: Facts) -> RoutingTrace:
    """Traces of several files as one: requests of a later file come after, and get numbers after, the earlier ones'.

    Raises:
        ValueError: the files differ in layers, experts, K, columns or origin.
    """
    if len(traces) == 1:
        return traces[0]
    mistakes = [
        f"{path}: {what} must be as in {paths[0].name}, {wanted}; given {given}; convert such files one by one"
        for path, trace in zip(paths[1:], traces[1:], strict=True)
        for (what, wanted), given in zip(_shape(traces[0]).items(), _shape(trace).values(), strict=True)
        if given != wanted
    ]
    raise_all(f"{len(paths)} files", mistakes)
    parts, next_request = [], 0
    for trace in traces:
        if next_request + int(trace.request_T[-1]) > _INT32_MAX:
            raise ValueError(f"{paths[0]}: request numbers of all files together pass {_INT32_MAX}; number from 0")
        parts.append(replace(trace, request_T=trace.request_T + np.int32(next_request)))
        next_request += int(trace.request_T[-1]) + 1
    return replace(joined(parts), name=facts.name_of(paths), provenance=facts.provenance(paths))


def _shape(trace: RoutingTrace) -> dict[str, object]:
    return {
        "layers": trace.layers,
        "num_experts": trace.num_experts,
        "experts per token": trace.top_k,
        "whether there are weights": trace.weights_TLK is not None,
        "whether there are token ids": trace.token_id_T is not None,
        "whether there are router scores": trace.scores_TLE is not None,
        "predictions": [ids_TLW.shape[2] for ids_TLW in trace.predicted_HTLW],
        "origin": trace.origin,
    }
