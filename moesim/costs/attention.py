"""Scores and weighted sum of a mixer over its cache: what they compute and read, and how long it takes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.costs.operators import Operators, Timed
from moesim.mixers import Attention, LatentAttention, Mamba, Mixer
from moesim.model import BYTES_PER_PARAM, ModelSpec

Floats = NDArray[np.float64]


def attention_core(
    ops: Operators, model: ModelSpec, mixer: Mixer, tp: int, phase: str, requests: Floats, tokens: Floats,
    kept: Floats, pairs: Floats, like: Floats | None = None,
) -> Timed:  # fmt: skip
    """Attention of one layer without its projections, on each of `tp` ranks alike, for batches of requests.

    Args:
        phase: "prefill", or "decode", in which latent attention works on the latents themselves.
        requests, tokens: of each batch; tokens are the new ones.
        kept: cached tokens that they read.
        pairs: of queries and keys.
        like: cached tokens of the batches whose kernels are looked up in a measured table; those kept if None.

    Source: for the absorbed form of latent attention, arXiv 2405.04434, section 2.1.
    """
    kv_bytes, h = BYTES_PER_PARAM[model.dtypes.kv], model.hidden_size
    cache_bytes = kept * mixer.kv_values_per_token() * kv_bytes
    if isinstance(mixer, Attention):
        flops = 4.0 * mixer.num_heads * mixer.head_dim * pairs / tp
        cache_bytes = cache_bytes / min(tp, mixer.num_kv_heads)
    elif isinstance(mixer, LatentAttention):
        absorbed = 2 * mixer.kv_lora_rank + mixer.qk_rope_head_dim
        width = absorbed if phase == "decode" else mixer.head_dim + mixer.v_head_dim
        flops = 2.0 * mixer.num_heads * width * pairs / tp
    else:
        inner = mixer.expand * h if isinstance(mixer, Mamba) else mixer.num_heads * mixer.value_head_dim
        depth = mixer.state_size if isinstance(mixer, Mamba) else mixer.key_head_dim
        flops = 6.0 * inner * depth * tokens / tp
        cache_bytes = 2.0 * requests * mixer.state_values(h) * kv_bytes / tp
    looked_up = kept if like is None else like
    return ops.attention_core(mixer, phase, requests, looked_up, flops, cache_bytes, tp, model.dtypes.kv)
