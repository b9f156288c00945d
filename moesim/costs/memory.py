"""Bytes that a layout needs on its fullest device: weights, KV cache, activations."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

from moesim.layout import Layout
from moesim.mixers import Attention, Mixer
from moesim.model import BYTES_PER_PARAM, Dense, Experts, ModelSpec


def device_bytes(
    model: ModelSpec,
    layout: Layout,
    *,
    requests_per_group: int,
    tokens_per_request: int,
    batched_tokens: int,
    device_expert_fraction: float = 1.0,
) -> dict[str, float]:
    """Bytes by part on the fullest device.

    Weights outside the experts are cut by tp; shared experts are cut by tp where experts are (ep = 1) and copied to
    every rank otherwise. KV heads are cut by tp as far as there are heads; a latent cache (MLA) is copied.
    Activations are counted as the residual stream, one layer's queries, keys, values and feed-forward rows.

    Source: for the KV cache of MLA, arXiv 2405.04434, section 2.1.
    """
    h, tp, size = model.hidden_size, layout.attention.tp, BYTES_PER_PARAM
    shared_cut = tp if layout.experts.ep == 1 else 1
    other, experts, kv, widest = model.embedding_params * size[model.dtypes.embedding] / tp, 0.0, 0.0, 0
    other += model.extra_params * size[model.dtypes.embedding]
    for layer in model.layers:
        other += layer.norm_params * size[model.dtypes.dense]
        if layer.mixer:
            other += layer.mixer.num_params(h) * size[model.dtypes.attention] / tp
            kept = tokens_per_request if layer.mixer.window is None else min(tokens_per_request, layer.mixer.window)
            per_token, state = _layer_cache_bytes(layer.mixer, model, layout)
            kv += requests_per_group * (kept * per_token + state)
        if isinstance(layer.ffn, Dense):
            other += layer.ffn.num_params(h) * size[model.dtypes.dense] / tp
            widest = max(widest, layer.ffn.width // tp)
        elif isinstance(layer.ffn, Experts):
            other += layer.ffn.router_params(h) * size[model.dtypes.dense]
            if not layout.num_shared_expert_ranks:
                other += layer.ffn.shared_params(h) * size[model.dtypes.dense] / shared_cut
            largest = layer.ffn.expert_params(h, max(layer.ffn.expert_widths)) * size[model.dtypes.experts]
            slots = (layer.ffn.num_experts + layout.num_redundant_experts) / (
                layout.experts.ep - layout.num_shared_expert_ranks
            )
            experts += math.ceil(slots * device_expert_fraction) * largest / layout.experts.etp
            widest = max(widest, layer.ffn.top_k * max(layer.ffn.expert_widths) // layout.experts.etp)
    activations = batched_tokens / layout.attention.cp * (4 * h + 2 * widest) * size[model.dtypes.activation]
    return {"experts": experts, "other_weights": other, "kv_cache": kv, "activations": activations}


def cache_bytes(model: ModelSpec, layout: Layout) -> tuple[float, float]:
    """Bytes of one device's cache that a further token of a request takes, and that each request takes at any length.

    Layers with a window are in the second, with a full window, as are states.
    """
    per_token, per_request = 0.0, 0.0
    for mixer in (layer.mixer for layer in model.layers if layer.mixer):
        token_bytes, state_bytes = _layer_cache_bytes(mixer, model, layout)
        per_token += token_bytes if mixer.window is None else 0.0
        per_request += state_bytes + token_bytes * (mixer.window or 0)
    return per_token, per_request


def stages(model: ModelSpec, pp: int) -> list[ModelSpec]:
    """The layers of each pipeline stage; embeddings are counted in every one."""
    edges = [stage * len(model.layers) // pp for stage in range(pp + 1)]
    return [replace(model, layers=model.layers[first:last]) for first, last in pairwise(edges)]


def _layer_cache_bytes(mixer: Mixer, model: ModelSpec, layout: Layout) -> tuple[float, float]:
    """Bytes of one device for each token kept in a layer, and for each request."""
    tp, size = layout.attention.tp, BYTES_PER_PARAM[model.dtypes.kv] / layout.attention.cp
    cut = min(tp, mixer.num_kv_heads) if isinstance(mixer, Attention) else 1
    return mixer.kv_values_per_token() / cut * size, mixer.state_values(model.hidden_size) / tp * size
