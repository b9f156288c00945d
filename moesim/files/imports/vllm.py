"""Expert choices that vLLM returns with its answers (`enable_return_routed_experts`, vLLM pull request 28284)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.files.imports.facts import Facts
from moesim.files.imports.text import raise_first, read_json, read_text
from moesim.files.imports.tokens import concatenated, routing_trace
from moesim.routing.trace import RoutingTrace


def read_vllm(paths: Sequence[Path], facts: Facts) -> RoutingTrace:
    """Routed experts of vLLM requests, .json (a list of requests) or .jsonl (a request a line).

    Each request has prompt_token_ids, token_ids and routed_experts [token, layer, K], or, as a RequestOutput has them,
    prompt_token_ids and outputs, a list of objects with token_ids and routed_experts. vLLM returns a row for each
    prompt and generated token but the last, which no forward pass saw. Layers in which all experts are 0 (its stand-in
    for dense layers) are left out, where K is more than 1.
    """
    return concatenated(paths, [_read(path, facts) for path in paths], facts)


def _read(path: Path, facts: Facts) -> RoutingTrace:
    mistakes: list[str] = []
    ids: list[NDArray[Any]] = []
    tokens: list[list[int]] = []
    prompts: list[int] = []
    for where, prompt, answer, routed in _answers(path, mistakes):
        try:
            ids_TLK = np.asarray(routed)
        except ValueError:
            ids_TLK = np.empty(0, object)
        if not _is_whole(prompt) or not _is_whole(answer):
            mistakes.append(f"{where}: prompt_token_ids and token_ids must be lists of whole numbers")
        elif ids_TLK.ndim != 3 or ids_TLK.dtype.kind not in "iu":
            mistakes.append(f"{where}: routed_experts must be whole numbers [token, layer, K], rows of one length")
        elif ids and ids_TLK.shape[1:] != ids[0].shape[1:]:
            shape = list(ids[0].shape[1:])
            mistakes.append(f"{where}: routed_experts must be {shape} for each token; given {list(ids_TLK.shape[1:])}")
        elif len(ids_TLK) not in (wanted := len(prompt) + len(answer), wanted - 1):
            mistakes.append(
                f"{where}: {len(prompt)} prompt and {len(answer)} generated tokens need {wanted - 1} rows of "
                f"routed_experts (the last token is not routed); given {len(ids_TLK)}"
            )
        elif len(ids_TLK):
            ids.append(ids_TLK)
            tokens.append((prompt + answer)[: len(ids_TLK)])
            prompts.append(len(prompt))
    raise_first(path, mistakes)
    if not ids:
        raise ValueError(f"{path}: has no request with routed experts; set enable_return_routed_experts=True in vLLM")
    lengths = np.array([len(part) for part in ids])
    position_T = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    ids_TLK = np.concatenate(ids)
    layers = np.arange(ids_TLK.shape[1])
    if ids_TLK.shape[2] > 1:
        layers = np.flatnonzero(ids_TLK.any(axis=(0, 2)))
    return routing_trace(
        path,
        facts,
        ids_TLK=ids_TLK[:, layers],
        request_T=np.repeat(np.arange(len(lengths)), lengths),
        position_T=position_T,
        is_decode_T=position_T >= np.repeat(prompts, lengths),
        token_id_T=np.concatenate([np.array(part, dtype=np.int64) for part in tokens]),
        num_experts=None,
        layers=layers.tolist(),
    )


def _is_whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and abs(v) < 2**63 for v in values)


def _answers(path: Path, mistakes: list[str]) -> Iterator[tuple[str, Any, Any, Any]]:
    """Where it stands, prompt tokens, generated tokens and routed experts of each answer."""
    for where, request in _requests(path, mistakes):
        if not isinstance(request, dict):
            mistakes.append(f"{where}: must be an object of one request; given {type(request).__name__}")
            continue
        outputs = request.get("outputs", [request])
        if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
            mistakes.append(f"{where}: outputs must be a list of objects")
            continue
        for number, output in enumerate(outputs):
            here = f"{where}, output {number}" if "outputs" in request else where
            lacking = [name for name in ("token_ids", "routed_experts") if output.get(name) is None]
            lacking += ["prompt_token_ids"] * (request.get("prompt_token_ids") is None)
            if lacking:
                mistakes.append(f"{here}: needs {', '.join(lacking)}; it has {', '.join(output) or 'nothing'}")
            else:
                yield here, request["prompt_token_ids"], output["token_ids"], output["routed_experts"]


def _requests(path: Path, mistakes: list[str]) -> Iterator[tuple[str, Any]]:
    if path.suffix.lower() == ".jsonl":
        for line, part in enumerate(read_text(path).split("\n"), start=1):
            try:
                if part.strip():
                    yield f"line {line}", json.loads(part)
            except (ValueError, RecursionError) as error:
                mistakes.append(f"line {line}: not JSON ({error})")
        return
    whole = read_json(path)
    for number, request in enumerate(whole if isinstance(whole, list) else [whole]):
        yield f"request {number}", request
