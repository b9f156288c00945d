"""A made-up trace: Zipf popularity per layer, tokens independent. For speed and for tests; not for conclusions."""

from __future__ import annotations

import numpy as np

from moesim.routing.trace import RoutingTrace


def zipf_trace(
    num_layers: int,
    num_experts: int,
    top_k: int,
    *,
    num_requests: int,
    prompt_tokens: int,
    output_tokens: int,
    exponent: float = 0.5,
    seed: int = 0,
) -> RoutingTrace:
    """A trace labelled synthetic; expert i of a layer's own random order has popularity 1 / (i + 1)^exponent.

    K distinct experts are drawn without replacement by the Gumbel top-k trick (Vieira, 2014; arXiv 1903.06059).
    Predictions are the true experts of the next layer; with probability 1/4 those of some other token.
    """
    rng = np.random.default_rng(seed)
    per_request = prompt_tokens + output_tokens
    num_tokens = num_requests * per_request
    dtype = np.uint8 if num_experts <= 256 else np.uint16
    ids_TLK = np.empty((num_tokens, num_layers, top_k), dtype)
    for layer in range(num_layers):
        score_E = -exponent * np.log(rng.permutation(num_experts) + 1.0)
        for start in range(0, num_tokens, 8192):
            rows = min(8192, num_tokens - start)
            noisy = score_E.astype(np.float32) + rng.gumbel(size=(rows, num_experts)).astype(np.float32)
            ids_TLK[start : start + rows, layer] = np.argpartition(-noisy, top_k - 1)[:, :top_k]
    predicted = ids_TLK[:, 1:].copy()
    tokens, layers = np.nonzero(rng.random(predicted.shape[:2]) < 0.25)
    predicted[tokens, layers] = predicted[rng.integers(0, num_tokens, len(tokens)), layers]
    position_T = np.tile(np.arange(per_request, dtype=np.int32), num_requests)
    return RoutingTrace(
        name=f"zipf-{num_layers}x{num_experts}",
        model=f"none: Zipf exponent {exponent}",
        origin="synthetic",
        num_experts=num_experts,
        expert_ids_TLK=ids_TLK,
        request_T=np.repeat(np.arange(num_requests, dtype=np.int32), per_request),
        position_T=position_T,
        is_decode_T=position_T >= prompt_tokens,
        token_id_T=None,
        layers=tuple(range(num_layers)),
        predicted_HTLW=(predicted,),
        provenance={"source": f"numpy default_rng, seed {seed}"},
    )
