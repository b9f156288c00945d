"""Bytes that a layout needs on its fullest device: weights, KV cache, activations."""

from __future__ import annotations

import math

from moesim.layout import Layout
from moesim.mixers import Attention
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
            cut = min(tp, layer.mixer.num_kv_heads) if isinstance(layer.mixer, Attention) else 1
            values = kept * layer.mixer.kv_values_per_token() / cut + layer.mixer.state_values(h) / tp
            kv += requests_per_group * values * size[model.dtypes.kv] / layout.attention.cp
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
