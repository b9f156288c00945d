"""Small made-up traces, and real ones, that the tests of routing share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.routing.trace import RoutingTrace

REAL = Path(__file__).parents[1].parent / "shared" / "data"


def trace_of(ids_TLK, experts, requests=None, decode=None, predicted=None, tokens=None):
    ids = np.asarray(ids_TLK, dtype=np.uint8)
    request = np.asarray(requests if requests is not None else [0] * len(ids), dtype=np.int32)
    position = np.arange(len(ids)) - np.searchsorted(request, request)
    return RoutingTrace(
        name="t",
        model="t",
        origin="synthetic",
        num_experts=experts,
        expert_ids_TLK=ids,
        request_T=request,
        position_T=position.astype(np.int32),
        is_decode_T=np.asarray(decode if decode is not None else [False] * len(ids)),
        token_id_T=np.asarray(tokens if tokens is not None else [0] * len(ids), dtype=np.int32),
        layers=tuple(range(ids.shape[1])),
        predicted_HTLW=() if predicted is None else (np.asarray(predicted, dtype=np.uint8),),
    )


def random_trace(seed, tokens=60, layers=3, experts=8, top_k=2, requests=4, predicted=True):
    scores = np.random.default_rng(seed).random((2, tokens, layers, experts)).argsort(axis=3)[..., :top_k]
    owner = np.sort(np.random.default_rng(seed + 1).integers(0, requests, tokens))
    return trace_of(scores[0], experts, owner, predicted=scores[1][:, 1:] if predicted else None)


def real_trace(name, files, decode):
    """A trace from arrays of a public capture (see the PROVENANCE.md beside them), where they are at hand."""
    paths = [REAL / file for file in files]
    if not all(path.exists() for path in paths):
        pytest.skip(f"the public captures are not beside the repository: {REAL}")
    parts = [dict(np.load(path)) for path in paths]
    samples = [np.unique(part["sample"], return_inverse=True)[1] for part in parts]
    firsts = np.cumsum([0, *(sample.max() + 1 for sample in samples)])
    ids = np.concatenate([part["expert_ids"] for part in parts])
    return RoutingTrace(
        name=name, model=name, origin="trained", num_experts=int(parts[0]["num_experts"]), expert_ids_TLK=ids,
        request_T=np.concatenate([s + first for s, first in zip(samples, firsts, strict=False)]).astype(np.int32),
        position_T=np.concatenate([part["position"] for part in parts]), is_decode_T=np.full(len(ids), decode),
        token_id_T=None, layers=tuple(range(ids.shape[1])),
    )  # fmt: skip


def gpt_oss():
    return real_trace("gpt-oss-20b", ["routing_gpt_oss_20b/routes.npz"], decode=True)


def esft():
    tasks = ("intent", "summary", "translation")
    return real_trace("esft", [f"routing_esft_deepseek_v2_lite/{task}.npz" for task in tasks], decode=False)
