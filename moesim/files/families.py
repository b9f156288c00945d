"""What each model family means by the keys of its `config.json`: one row of a table per `model_type`.

A row says where the family keeps its widths, which layers are sparse, which tensors its layers have beyond
the usual ones (biases, norms, gates), and which default it falls back on. `moesim.files.layers` reads a
configuration by its row. Source: the modelling code of transformers 5.23 unless a row says otherwise.

The family `generic` is this package's own, for models that have no Hugging Face code and for made-up ones. It
has the options of the others: MLA where there is a `kv_lora_rank`, per-layer `layer_types`, experts of
different widths (`moe_intermediate_sizes`), zero-computation experts (`num_zero_experts`), a dense network
beside the experts (`residual_intermediate_size`), ungated ones (`gated_experts`, `gated_dense`), a storage
format for each part (`dtypes`). A key that has no meaning for such a model is a mistake, so slips are found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moesim.files.keys import Keys, Names

HEADS = ("num_attention_heads", "num_heads")
HIDDEN = ("hidden_size", "d_model")
LAYERS = ("num_hidden_layers", "num_layers")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
TOP_K = ("num_experts_per_tok", "moe_topk", "num_selected_experts")
ZERO_EXPERTS = ("num_zero_experts", "zero_expert_num")
MOE_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size")
DENSE_WIDTH = ("intermediate_size", "ffn_hidden_size", "d_ff")
Pattern = Callable[[Keys, int], Sequence[bool]]


def _never(keys: Keys, num_layers: int) -> list[bool]:
    return [False] * num_layers


def _always(keys: Keys, num_layers: int) -> list[bool]:
    return [True] * num_layers


def _after_first(keys: Keys, num_layers: int) -> list[bool]:
    """DeepSeek, GLM: dense layers first, then every `moe_layer_freq`-th layer is sparse."""
    first, every = keys.count("first_k_dense_replace", 0, minimum=0), keys.count("moe_layer_freq", 1)
    return [i >= first and i % every == 0 for i in range(num_layers)]


def _every_step(keys: Keys, num_layers: int) -> list[bool]:
    """Qwen: every `decoder_sparse_step`-th layer, but for those listed in `mlp_only_layers`."""
    below = num_layers if keys.sound(LAYERS) else None
    step, dense = keys.count("decoder_sparse_step", 1), keys.counts("mlp_only_layers", 0, below) or []
    if keys.values.get(keys.name_of(EXPERTS)) == 0:
        return [False] * num_layers
    return [i not in dense and (i + 1) % step == 0 for i in range(num_layers)]


def _llama4(keys: Keys, num_layers: int) -> list[bool]:
    below = num_layers if keys.sound(LAYERS) else None
    step, listed = keys.count("interleave_moe_layer_step", 1), keys.counts("moe_layers", 0, below)
    return [i in listed if listed is not None else (i + 1) % step == 0 for i in range(num_layers)]


def _period(kind: str) -> Pattern:
    """Jamba: layers at `offset` of every `period`."""

    def pattern(keys: Keys, num_layers: int) -> list[bool]:
        period, offset = f"{kind}_layer_period", f"{kind}_layer_offset"
        every, at = keys.count(period), keys.count(offset, minimum=0)
        keys.require(at < every, [offset, period], f"must be less than {period} ({every}), not {at}")
        return [i % every == at for i in range(num_layers)]

    return pattern


def _jamba_sparse(keys: Keys, num_layers: int) -> list[bool]:
    return list(_period("expert")(keys, num_layers)) if keys.count(EXPERTS) > 1 else [False] * num_layers


def _generic_sparse(keys: Keys, num_layers: int) -> list[bool]:
    if not (keys.has(EXPERTS) or keys.has("moe_intermediate_sizes")):
        return [False] * num_layers
    first, step = _after_first(keys, num_layers), _every_step(keys, num_layers)
    return [a and b for a, b in zip(first, step, strict=True)]


def _sliding_from(keys: Keys, num_layers: int) -> list[bool]:
    """Qwen2, Qwen3: with `use_sliding_window`, the layers from `max_window_layers` on."""
    start = keys.count("max_window_layers", 28, minimum=0)
    return [keys.flag("use_sliding_window", False) and i >= start for i in range(num_layers)]


def _sliding_qwen2_moe(keys: Keys, num_layers: int) -> list[bool]:
    stop = keys.count("max_window_layers", 28, minimum=0)
    return [keys.flag("use_sliding_window", False) and i % 2 == 0 and i < stop for i in range(num_layers)]


def _sliding_if_used(keys: Keys, num_layers: int) -> list[bool]:
    return [keys.flag("use_sliding_window", False)] * num_layers


def _even(keys: Keys, num_layers: int) -> list[bool]:
    return [i % 2 == 0 for i in range(num_layers)]


def _chunked(keys: Keys, num_layers: int) -> list[bool]:
    """Llama 4: layers with rotary embedding look back within a chunk, the others see everything."""
    rope, every = keys.counts("no_rope_layers", 0, 2), keys.count("no_rope_layer_interval", 4)
    rope = rope or [int((i + 1) % every != 0) for i in range(num_layers)]
    rule = f"must have one entry for each of the {num_layers} layers, but it has {len(rope)}"
    keys.require(len(rope) >= num_layers, ["no_rope_layers", LAYERS], rule)
    return [bool(x) for x in rope[:num_layers]] + [False] * (num_layers - len(rope))


@dataclass(frozen=True)
class Family:
    """How one `model_type` is read.

    Attributes:
        sparse: which layers have routed experts.
        expert_width, dense_width: keys of the intermediate widths.
        shared: how shared experts are told: "none", "count" (`n_shared_experts`, each as wide as a routed
            one), "width" (`shared_expert_intermediate_size`), "one" (as wide as a routed one).
        windowed: which layers look back `window_key` tokens only, where `layer_types` does not say.
        other: what stands in the layers that `attention` leaves out ("mamba" or "linear").
        bias: key of the attention bias, its default, and whether the output projection has one too.
        head_dim: width of a head where the file does not say, None for hidden size over heads.
        qk_norm_flag: key that turns `qk_norm` on, "" where it is always on.
        norms: norms per layer, each with `norm_size` vectors of the hidden size (2 with a bias).
        tied: whether input and output embedding are one where the file does not say.
        mtp: whether `num_nextn_predict_layers` modules of the last layer's shape follow.
    """

    sparse: Pattern = _always
    expert_width: Names = DENSE_WIDTH
    dense_width: Names = DENSE_WIDTH
    shared: str = "none"
    windowed: Pattern = _always
    window_key: str = "sliding_window"
    attention: Pattern = _always
    other: str = "linear"
    latent: bool = False
    bias: tuple[str, bool, bool] = ("attention_bias", False, True)
    head_dim: int | None = None
    qk_norm: str = "none"
    qk_norm_flag: str = ""
    sinks: bool = False
    expert_bias: bool = False
    router_bias: bool = False
    shared_gate: bool = False
    norms: int = 2
    norm_size: int = 1
    tied: bool = False
    mtp: bool = False


_QWEN_MOE = Family(
    sparse=_every_step,
    expert_width=MOE_WIDTH,
    shared="width",
    shared_gate=True,
    windowed=_sliding_qwen2_moe,
    bias=("qkv_bias", True, False),
)
_DEEPSEEK_V3 = Family(_after_first, MOE_WIDTH, shared="count", latent=True, router_bias=True, mtp=True)
_LLAMA4 = Family(
    _llama4,
    dense_width="intermediate_size_mlp",
    shared="one",
    windowed=_chunked,
    window_key="attention_chunk_size",
    head_dim=128,
)

FAMILIES: Mapping[str, Family] = {
    "deepseek_v2": Family(_after_first, MOE_WIDTH, shared="count", latent=True),
    "deepseek_v3": _DEEPSEEK_V3,
    "generic": Family(_generic_sparse, (*MOE_WIDTH, *DENSE_WIDTH), shared="width"),
    "glm4_moe": Family(
        _after_first,
        MOE_WIDTH,
        shared="count",
        bias=("attention_bias", False, False),
        qk_norm="head",
        qk_norm_flag="use_qk_norm",
        router_bias=True,
        mtp=True,
    ),
    "gpt_oss": Family(
        windowed=_even,
        bias=("attention_bias", True, True),
        head_dim=64,
        sinks=True,
        expert_bias=True,
        router_bias=True,
    ),
    "grok-1": Family(norms=4, tied=True),  # xai-org/grok-1 model.py: norms before and after both parts
    "jamba": Family(_jamba_sparse, attention=_period("attn"), other="mamba"),
    "kimi_k2": _DEEPSEEK_V3,
    "llama": Family(_never),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "longcat_flash": Family(expert_width=MOE_WIDTH, latent=True, router_bias=True),
    "minimax": Family(attention=_even),
    "mistral": Family(_never),
    "mixtral": Family(),
    "olmoe": Family(qk_norm="full"),
    "phimoe": Family(norm_size=2),
    "qwen2": Family(_never, windowed=_sliding_from, bias=("qkv_bias", True, False)),
    "qwen2_moe": _QWEN_MOE,
    "qwen3": Family(_never, windowed=_sliding_from, head_dim=128, qk_norm="head"),
    "qwen3_moe": Family(_every_step, MOE_WIDTH, windowed=_sliding_if_used, qk_norm="head"),
    "switch_transformers": Family(tied=True),
}
"""`model_type` -> how its configuration is read."""
