"""Made-up traces: Zipf popularity with independent tokens, or every expert as busy. Not for conclusions."""

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


def topic_trace(
    num_layers: int,
    num_experts: int,
    top_k: int,
    *,
    num_topics: int,
    concentration: float,
    skew: float = 0.5,
    faithfulness: float = 0.9,
    num_requests: int,
    tokens: int,
    seed: int = 0,
    requests_seed: int = 0,
) -> RoutingTrace:
    """A trace of requests with a topic each; a topic has its own experts in every layer, so that layers go together.

    A topic's popularity of an expert is a gamma variate of shape `concentration` (the smaller, the fewer experts a
    topic has) times the expert's own, lognormal with `skew`; both come from `seed`. A token is of its request's topic
    with probability `faithfulness`, else of any; `requests_seed` draws requests and tokens, so that two traces may be
    of the same topics. All tokens are generated ones.
    """
    rng, drawn = np.random.default_rng(seed), np.random.default_rng([seed, requests_seed])
    popularity_LE = np.exp(rng.normal(0, skew, (num_layers, num_experts)))
    weight_CLE = rng.gamma(concentration, size=(num_topics, num_layers, num_experts)) * popularity_LE
    weight_CLE = np.maximum(weight_CLE / weight_CLE.sum(axis=2, keepdims=True), 1e-9).astype(np.float32)
    num_tokens = num_requests * tokens
    own_T = np.repeat(drawn.integers(0, num_topics, num_requests), tokens)
    topic_T = np.where(drawn.random(num_tokens) < faithfulness, own_T, drawn.integers(0, num_topics, num_tokens))
    ids_TLK = np.empty((num_tokens, num_layers, top_k), np.uint8 if num_experts <= 256 else np.uint16)
    for layer in range(num_layers):
        for start in range(0, num_tokens, 8192):  # the K first of a race of exponentials: draws without replacement
            topic_B = topic_T[start : start + 8192]
            race = drawn.standard_exponential((len(topic_B), num_experts), dtype=np.float32)
            race /= weight_CLE[topic_B, layer]
            ids_TLK[start : start + 8192, layer] = np.argpartition(race, top_k - 1)[:, :top_k]
    position_T = np.tile(np.arange(tokens, dtype=np.int32), num_requests)
    return RoutingTrace(
        name=f"topics-{num_layers}x{num_experts}",
        model=f"none: {num_topics} topics of concentration {concentration:g}",
        origin="synthetic",
        num_experts=num_experts,
        expert_ids_TLK=ids_TLK,
        request_T=np.repeat(np.arange(num_requests, dtype=np.int32), tokens),
        position_T=position_T,
        is_decode_T=np.ones(num_tokens, np.bool_),
        token_id_T=None,
        layers=tuple(range(num_layers)),
        provenance={"source": f"numpy default_rng, seeds {seed} and {requests_seed}"},
    )


def even_trace(
    num_layers: int, num_experts: int, top_k: int, num_groups: int = 1, top_groups: int = 1, *, seed: int = 0
) -> RoutingTrace:
    """A trace in which every step, and every run of tokens of one request, uses all experts alike.

    A layer deals its experts out to D = E / K tokens, each once, from `top_groups` groups for each token; token p
    of request q gets hand (p + q) mod D. There are D requests of D prompt and D generated tokens.

    Raises:
        ValueError: K does not divide E, or the groups do not divide evenly.
    """
    hands = num_experts // top_k
    if num_experts % top_k or num_groups % top_groups or top_k % top_groups or num_experts % num_groups:
        raise ValueError(
            f"even routing deals {num_experts} experts in {num_groups} groups to tokens that take {top_k} from "
            f"{top_groups} groups: each of these must divide the ones above it"
        )
    rng = np.random.default_rng(seed)
    num_requests, per_request = hands, 2 * hands
    dtype = np.uint8 if num_experts <= 256 else np.uint16
    hand_LDK = np.empty((num_layers, hands, top_k), dtype)
    size, taken = num_experts // num_groups, top_k // top_groups
    for layer in range(num_layers):
        decks = rng.permuted(np.arange(num_experts).reshape(num_groups, size), axis=1)
        left = [list(deck) for deck in decks]
        for hand in range(0, hands, num_groups // top_groups):
            order = rng.permutation(num_groups).reshape(-1, top_groups)  # these hands use each group once
            for i, groups in enumerate(order):
                hand_LDK[layer, hand + i] = [left[group].pop() for group in groups for _ in range(taken)]
    position_T = np.tile(np.arange(per_request, dtype=np.int32), num_requests)
    request_T = np.repeat(np.arange(num_requests, dtype=np.int32), per_request)
    return RoutingTrace(
        name=f"even-{num_layers}x{num_experts}",
        model="none: every expert as busy",
        origin="synthetic",
        num_experts=num_experts,
        expert_ids_TLK=np.ascontiguousarray(hand_LDK[:, (position_T + request_T) % hands].swapaxes(0, 1)),
        request_T=request_T,
        position_T=position_T,
        is_decode_T=position_T >= hands,
        token_id_T=None,
        layers=tuple(range(num_layers)),
        predicted_HTLW=(),
        provenance={"source": f"numpy default_rng, seed {seed}"},
    )


GUESSED = 0.87
"""How often the router of a layer, one layer early, names an expert that is chosen: mean of AdapMoE's measurements of
Mixtral-8x7B (arXiv 2408.10284)."""


def sticky_trace(
    num_layers: int, num_experts: int, top_k: int, *, stickiness: float, num_tokens: int, seed: int = 0
) -> RoutingTrace:
    """One answer in which each of a token's experts is, with probability `stickiness`, one that the token before it
    chose, and else any other expert, all alike: a first-order Markov chain in each layer.

    Predictions one layer ahead name each expert rightly with probability `GUESSED`, and else any expert.

    Raises:
        ValueError: `stickiness` is not in 0..1.
    """
    if not 0 <= stickiness <= 1:
        raise ValueError(f"stickiness must be in 0..1, given {stickiness}")
    rng = np.random.default_rng(seed)
    shape = num_tokens, num_layers, top_k
    ids_TLK = np.empty(shape, np.uint8 if num_experts <= 256 else np.uint16)
    ids_TLK[0] = rng.random((num_layers, num_experts)).argpartition(top_k - 1, axis=1)[:, :top_k]
    for token in range(1, num_tokens):
        keeps_LK = rng.random((num_layers, top_k)) < stickiness
        chance_LE = rng.random((num_layers, num_experts))
        before_LK = ids_TLK[token - 1].astype(np.int64)
        kept_LK = np.where(keeps_LK, -1.0, np.take_along_axis(chance_LE, before_LK, axis=1))
        np.put_along_axis(chance_LE, before_LK, kept_LK, axis=1)  # what is kept comes first, the rest by chance
        ids_TLK[token] = chance_LE.argpartition(top_k - 1, axis=1)[:, :top_k]
    predicted = ids_TLK[:, 1:].copy()
    wrong = rng.random(predicted.shape) >= GUESSED
    predicted[wrong] = rng.integers(0, num_experts, int(wrong.sum()))
    return RoutingTrace(
        name=f"sticky-{num_layers}x{num_experts}",
        model=f"none: stickiness {stickiness:g}",
        origin="synthetic",
        num_experts=num_experts,
        expert_ids_TLK=ids_TLK,
        request_T=np.zeros(num_tokens, np.int32),
        position_T=np.arange(num_tokens, dtype=np.int32),
        is_decode_T=np.ones(num_tokens, np.bool_),
        token_id_T=None,
        layers=tuple(range(num_layers)),
        predicted_HTLW=(predicted,),
        provenance={"source": f"numpy default_rng, seed {seed}"},
    )
