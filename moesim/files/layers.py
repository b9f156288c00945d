"""From the keys of a configuration to layers: the mixer and the feed-forward part of each.

Every family is read by the same functions, by its row in `moesim.files.families`; two stack their layers in a
way of their own and have a reader each (`read_switch_layers`, `read_longcat_layers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from moesim.files.families import EXPERTS, HEADS, HIDDEN, LAYERS, TOP_K, ZERO_EXPERTS, Family
from moesim.files.keys import Keys
from moesim.mixers import Attention, LatentAttention, LinearAttention, Mamba, Mixer
from moesim.model import Dense, Experts, Ffn, Layer

MOST_LAYERS, MOST_EXPERTS = 10_000, 2**20  # a slip of the keyboard must not fill the memory

LAYER_TYPES: Mapping[str, str] = {
    "attention": "full",
    "chunked_attention": "window",
    "full_attention": "full",
    "linear_attention": "",
    "mamba": "mamba",
    "sliding_attention": "window",
}
"""Entries of `layer_types` -> our kind of mixer, "" for what the family has in place of attention."""


def read_attention(keys: Keys, family: Family, window: int | None = None) -> Attention | LatentAttention:
    """The attention of one layer; MLA where the family, or a `kv_lora_rank` in a generic model, says so."""
    heads = keys.count(HEADS)
    name, default, out = family.bias
    bias = keys.flag(name, default)
    if family.latent or keys.has("kv_lora_rank"):
        return LatentAttention(
            num_heads=heads,
            q_lora_rank=keys.count_or_none("q_lora_rank"),
            kv_lora_rank=keys.count("kv_lora_rank"),
            qk_nope_head_dim=keys.count("qk_nope_head_dim"),
            qk_rope_head_dim=keys.count("qk_rope_head_dim"),
            v_head_dim=keys.count("v_head_dim"),
            window=window,
            bias=bias,
        )
    groups = keys.count("num_key_value_heads", heads)
    rule = f"must divide {keys.name_of(HEADS)} ({heads}), but it is {groups}"
    keys.require(heads % groups == 0, ["num_key_value_heads", HEADS], rule)
    qk_norm = keys.text("qk_norm", family.qk_norm)
    keys.require(qk_norm in ("none", "head", "full"), ["qk_norm"], f"must be none, head or full, not {qk_norm!r}")
    if family.qk_norm_flag and not keys.flag(family.qk_norm_flag, False):
        qk_norm = "none"
    return Attention(
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=read_head_dim(keys, family),
        window=window,
        bias=bias,
        out_bias=bias and out,
        qk_norm=qk_norm if qk_norm in ("head", "full") else "none",
        sinks=family.sinks,
    )


def read_head_dim(keys: Keys, family: Family) -> int:
    """Width of one head: as given, else the hidden size over the heads."""
    if keys.has(("head_dim", "d_kv")) or family.head_dim:
        return keys.count(("head_dim", "d_kv"), family.head_dim)
    hidden, heads = keys.count(HIDDEN), keys.count(HEADS)
    rule = f"({hidden}) must be a multiple of {keys.name_of(HEADS)} ({heads}) where there is no head_dim"
    keys.require(hidden % heads == 0, [HIDDEN, HEADS], rule)
    return max(hidden // heads, 1)


def read_mixers(keys: Keys, family: Family, num_layers: int) -> list[Mixer]:
    """The mixer of each layer."""
    window = keys.count(family.window_key, 0, minimum=0) or None
    attends, slides = family.attention(keys, num_layers), family.windowed(keys, num_layers)
    types = keys.words("layer_types", num_layers, LAYER_TYPES, per=LAYERS)
    if types is not None:
        kinds = [LAYER_TYPES[name] or family.other for name in types]
    else:
        full = ["window" if window is not None and slide else "full" for slide in slides]
        kinds = [kind if attend else family.other for kind, attend in zip(full, attends, strict=True)]
    if "window" in kinds and window is None:
        keys.blame(family.window_key, "is missing, but layer_types has layers with a window; give tokens")
    longest = keys.count("max_position_embeddings", 0, minimum=0)
    binds = window if window is not None and not 0 < longest <= window else None
    builders: Mapping[str, Callable[[], Mixer]] = {
        "full": lambda: read_attention(keys, family),
        "window": lambda: read_attention(keys, family, binds),
        "mamba": lambda: read_mamba(keys),
        "linear": lambda: read_linear(keys, family),
    }
    made = {kind: builders[kind]() for kind in dict.fromkeys(kinds)}
    return [made[kind] for kind in kinds]


def read_mamba(keys: Keys) -> Mamba:
    """Jamba's selective state-space mixer."""
    rank = math.ceil(keys.count(HIDDEN) / 16)
    if keys.values.get(keys.name_of("mamba_dt_rank")) != "auto":
        rank = keys.count("mamba_dt_rank", rank)
    return Mamba(
        state_size=keys.count("mamba_d_state", 16),
        conv_kernel=keys.count("mamba_d_conv", 4),
        expand=keys.count("mamba_expand", 2),
        dt_rank=rank,
        inner_norms=True,
        conv_bias=keys.flag("mamba_conv_bias", True),
        proj_bias=keys.flag("mamba_proj_bias", False),
    )


def read_linear(keys: Keys, family: Family) -> LinearAttention:
    """MiniMax's lightning attention; a generic model may give the widths of its heads."""
    width = read_head_dim(keys, family)
    key, value = keys.count("linear_key_head_dim", width), keys.count("linear_value_head_dim", width)
    return LinearAttention(keys.count("linear_num_heads", keys.count(HEADS)), key, value, norm=True)


def read_experts(keys: Keys, family: Family) -> Experts:
    """The routed part of a sparse layer."""
    listed = keys.counts("moe_intermediate_sizes", minimum=0)
    if listed:
        widths = list(listed)
        given = keys.count(EXPERTS, len(widths))
        rule = f"is {given}, but moe_intermediate_sizes has {len(widths)} entries"
        keys.require(given == len(widths), [EXPERTS, "moe_intermediate_sizes"], rule)
    else:
        widths = [keys.count(family.expert_width)] * keys.count(EXPERTS, maximum=MOST_EXPERTS)
    widths += [0] * keys.count(ZERO_EXPERTS, 0, minimum=0, maximum=MOST_EXPERTS)
    top_k = keys.count(TOP_K)
    rule = f"must be at most the number of experts ({len(widths)}), not {top_k}"
    keys.require(top_k <= len(widths), [TOP_K, EXPERTS, ZERO_EXPERTS], rule)
    shared = 0
    if family.shared == "width" and keys.has("shared_expert_intermediate_size"):
        shared = keys.count("shared_expert_intermediate_size", minimum=0)
    elif family.shared in ("count", "width"):
        number = keys.count(("n_shared_experts", "num_shared_experts"), 0, minimum=0)
        shared = number * keys.count(family.expert_width) if number else 0
    elif family.shared == "one":
        shared = keys.count(family.expert_width)
    return Experts(
        expert_widths=tuple(widths),
        top_k=top_k,
        shared_width=shared,
        gated=keys.flag("gated_experts", True),
        bias=keys.flag("expert_bias", family.expert_bias),
        router_bias=keys.flag("router_bias", family.router_bias) or family.router_bias,
        shared_gate=family.shared_gate and shared > 0,
        residual_width=keys.count("residual_intermediate_size", 0, minimum=0),
        num_groups=keys.count("n_group", 1),
        top_groups=keys.count("topk_group", 1),
    )


def read_layers(keys: Keys, family: Family) -> tuple[Layer, ...]:
    """All layers of a decoder-only model, in order."""
    hidden, num_layers = keys.count(HIDDEN), keys.count(LAYERS, maximum=MOST_LAYERS)
    mixers, sparse = read_mixers(keys, family, num_layers), family.sparse(keys, num_layers)
    kinds = keys.words("mlp_layer_types", num_layers, ("dense", "sparse"), per=LAYERS)
    if kinds is not None:
        sparse = [kind == "sparse" for kind in kinds]
    experts = read_experts(keys, family) if any(sparse) else None
    dense: Ffn | None = None
    if not all(sparse):
        gated, bias = keys.flag("gated_dense", True), keys.flag("mlp_bias", False)
        dense = Dense(keys.count(family.dense_width), gated, bias)
    norms = family.norms * family.norm_size * hidden
    return tuple(
        Layer(mixer, experts if is_sparse else dense, norms) for mixer, is_sparse in zip(mixers, sparse, strict=True)
    )


def read_switch_layers(keys: Keys, family: Family) -> tuple[Layer, ...]:
    """Switch Transformer, a T5: encoder layers, then decoder layers that also attend to the encoder's output.

    Encoder layers keep nothing; a decoder layer keeps keys and values of one attention for each prompt token
    (cross) and for each generated token (self).
    """
    hidden, heads = keys.count(HIDDEN), keys.count(HEADS)
    num_encoder = keys.count(LAYERS, maximum=MOST_LAYERS)
    num_decoder = keys.count("num_decoder_layers", num_encoder, maximum=MOST_LAYERS)
    width = keys.count("d_ff")
    dense = Dense(width, gated=False)
    num_experts, top_k = keys.count(EXPERTS, maximum=MOST_EXPERTS), keys.count(TOP_K, 1)
    rule = f"must be at most the number of experts ({num_experts}), not {top_k}"
    keys.require(top_k <= num_experts, [TOP_K, EXPERTS], rule)
    experts = Experts((width,) * num_experts, top_k, gated=False, router_bias=keys.flag("router_bias", False))
    mixer = Attention(heads, heads, read_head_dim(keys, family))
    layers = []
    for part, number in (("encoder", num_encoder), ("decoder", num_decoder)):
        num_sparse = keys.count(f"num_sparse_{part}_layers", 3, minimum=0)
        step = number // num_sparse if num_sparse else 0  # switch-c-2048 asks for 15 of 12 and gets none
        for i in range(number):
            sparse = step == 1 or (step > 1 and i % step == 1)
            ffn = experts if sparse else dense
            if part == "encoder":
                layers.append(Layer(replace(mixer, cached=False), ffn, 2 * hidden))
            else:
                layers.append(Layer(mixer, ffn, 3 * hidden, cross=mixer))
    return tuple(layers)


def read_longcat_layers(keys: Keys, family: Family) -> tuple[Layer, ...]:
    """LongCat-Flash: each of its layers is two here: MLA and experts beside a dense part, MLA and dense.

    Source: arXiv:2509.01322, section 2 (shortcut-connected MoE).
    """
    hidden, num_layers = keys.count(HIDDEN), keys.count(LAYERS[::-1], maximum=MOST_LAYERS)
    mixer, experts = read_attention(keys, family), read_experts(keys, family)
    width = keys.count(family.dense_width)
    first = Layer(mixer, replace(experts, residual_width=width), 2 * hidden)
    return (first, Layer(mixer, Dense(width), 2 * hidden)) * num_layers
