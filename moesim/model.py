"""A model as the simulator sees it: which weights exist, which of them a token uses, what it leaves cached.

A `ModelSpec` is a tuple of layers; a layer is one *mixer* (attention of some kind, or a state-space block)
and one *feed-forward part* (dense, routed, or none). Everything here is counting: parameters and bytes. FLOP
and seconds are `moesim.costs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

BYTES_PER_PARAM: Mapping[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0 + 4.0 / (128 * 128),  # one fp32 scale for each 128 x 128 block (DeepSeek-V3)
    "int8": 1.0,
    "int4": 0.5 + 2.0 / 128,  # one fp16 scale for each group of 128 weights (GPTQ, AWQ)
    "int4_g64": 0.5 + 2.0 / 64,
    "int4_g32": 0.5 + 2.0 / 32,  # Kimi-K2-Thinking
    "int4_channel": 0.5,  # one scale for a whole row: not counted, as for int8
    "mxfp4": 0.5 + 1.0 / 32,  # one 8-bit exponent for each block of 32 (OCP MX)
    "nvfp4": 0.5 + 1.0 / 16,  # one fp8 scale for each block of 16
    "ternary": 1.6 / 8,  # five ternary digits packed in one byte
}
"""Stored bytes for one weight, scales included."""


@dataclass(frozen=True)
class Dtypes:
    """Storage format of each part of a model: keys of `BYTES_PER_PARAM`."""

    attention: str = "bf16"
    experts: str = "bf16"
    dense: str = "bf16"  # dense feed-forward, shared experts, router
    embedding: str = "bf16"
    kv: str = "bf16"
    activation: str = "bf16"


@dataclass(frozen=True)
class Attention:
    """Softmax attention with a key/value head for each query head (MHA) or for a group of them (GQA, MQA).

    window: tokens a query can look back, None for all of them (sliding or chunked attention otherwise).
    cached: False in an encoder, where nothing is kept once the layer has run.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    bias: bool = False  # biases on the q, k and v projections
    out_bias: bool = False
    qk_norm: str = "none"  # "none", "head" (one gain per head_dim) or "full" (one per projected channel)
    sinks: bool = False  # one learned logit per head (gpt-oss)
    cached: bool = True

    @property
    def kind(self) -> str:
        """ "mha", "gqa" or "mqa", with "+window" where the look-back is limited."""
        name = {1: "mqa", self.num_heads: "mha"}.get(self.num_kv_heads, "gqa")
        return name if self.window is None else f"{name}+window"

    def num_params(self, hidden_size: int) -> int:
        """Projections q, k, v and o, with their biases and norms."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        params = hidden_size * (2 * q + 2 * kv)
        params += (q + 2 * kv) * self.bias + hidden_size * self.out_bias + self.num_heads * self.sinks
        return params + {"none": 0, "head": 2 * self.head_dim, "full": q + kv}[self.qk_norm]

    def kv_values_per_token(self) -> int:
        """Numbers kept in the KV cache for each token (within the window, where there is one)."""
        return 2 * self.num_kv_heads * self.head_dim * self.cached

    def state_values(self, hidden_size: int) -> int:
        """Numbers kept for each request whatever its length."""
        return 0


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (MLA, DeepSeek-V2): keys and values come from one small latent per token.

    q_lora_rank: None where queries come straight from the hidden state (DeepSeek-V2-Lite).
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    window: int | None = None
    bias: bool = False  # biases on the two down-projections and on the output

    @property
    def kind(self) -> str:
        """ "mla"."""
        return "mla"

    @property
    def head_dim(self) -> int:
        """Width of one query head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def num_params(self, hidden_size: int) -> int:
        """Down- and up-projections of queries and of the latent, their norms, and the output projection."""
        q_out = self.num_heads * self.head_dim
        if self.q_lora_rank is None:
            params = hidden_size * q_out
        else:
            params = hidden_size * self.q_lora_rank + self.q_lora_rank * q_out + self.q_lora_rank
        params += hidden_size * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
        params += self.kv_lora_rank * self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        biases = (self.q_lora_rank or 0) + self.kv_lora_rank + self.qk_rope_head_dim + hidden_size
        params += biases * self.bias
        return params + self.num_heads * self.v_head_dim * hidden_size

    def kv_values_per_token(self) -> int:
        """The latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def state_values(self, hidden_size: int) -> int:
        """Nothing is kept but the cache."""
        return 0


@dataclass(frozen=True)
class Mamba:
    """Selective state-space mixer (Mamba-1): a state per request, no KV cache."""

    state_size: int
    conv_kernel: int
    expand: int
    dt_rank: int
    inner_norms: bool = False  # RMS norms on dt, B and C (Jamba)
    conv_bias: bool = True
    proj_bias: bool = False
    window: int | None = None

    @property
    def kind(self) -> str:
        """ "mamba"."""
        return "mamba"

    def num_params(self, hidden_size: int) -> int:
        """Input, convolution, x, dt and output projections with A and D."""
        inner = self.expand * hidden_size
        params = hidden_size * 2 * inner + inner * (self.conv_kernel + self.conv_bias)
        params += (2 * inner + hidden_size) * self.proj_bias
        params += inner * (self.dt_rank + 2 * self.state_size) + self.dt_rank * inner + inner
        params += inner * self.state_size + inner + inner * hidden_size
        return params + (self.dt_rank + 2 * self.state_size) * self.inner_norms

    def kv_values_per_token(self) -> int:
        """Nothing grows with the length."""
        return 0

    def state_values(self, hidden_size: int) -> int:
        """The recurrent state and the convolution's window."""
        return self.expand * hidden_size * (self.state_size + self.conv_kernel)


@dataclass(frozen=True)
class LinearAttention:
    """Linear attention: a key-by-value matrix per head as state, no KV cache."""

    num_heads: int
    key_head_dim: int
    value_head_dim: int
    norm: bool = False  # one gain per value channel, before the output projection (MiniMax)
    window: int | None = None

    @property
    def kind(self) -> str:
        """ "linear"."""
        return "linear"

    def num_params(self, hidden_size: int) -> int:
        """Projections q, k, v, an output gate, and o."""
        params = hidden_size * self.num_heads * (2 * self.key_head_dim + 3 * self.value_head_dim)
        return params + self.num_heads * self.value_head_dim * self.norm

    def kv_values_per_token(self) -> int:
        """Nothing grows with the length."""
        return 0

    def state_values(self, hidden_size: int) -> int:
        """One key-by-value matrix per head."""
        return self.num_heads * self.key_head_dim * self.value_head_dim


Mixer = Attention | LatentAttention | Mamba | LinearAttention


@dataclass(frozen=True)
class Dense:
    """One feed-forward network for every token. A gated one (SwiGLU) has three matrices, else two."""

    width: int
    gated: bool = True
    bias: bool = False

    def num_params(self, hidden_size: int) -> int:
        """Its matrices and biases."""
        matrices = 3 if self.gated else 2
        return matrices * hidden_size * self.width + self.bias * ((matrices - 1) * self.width + hidden_size)


@dataclass(frozen=True)
class Experts:
    """A routed feed-forward part: `top_k` of the experts for each token, and shared ones for all of them.

    expert_widths: intermediate width of each routed expert, in order; they may differ (HMoE). A width of 0 is
        a zero-computation expert (MoE++): it can be chosen and costs nothing.
    shared_width: total intermediate width of the experts that see every token, 0 for none.
    residual_width: width of a dense network that runs beside the routed part (Arctic, PR-MoE), 0 for none.
    """

    expert_widths: tuple[int, ...]
    top_k: int
    shared_width: int = 0
    gated: bool = True
    bias: bool = False
    router_bias: bool = False  # a bias, or a score correction, per expert
    shared_gate: bool = False  # one sigmoid gate over the shared expert (Qwen-MoE)
    residual_width: int = 0

    @property
    def num_experts(self) -> int:
        """E, zero-computation experts included."""
        return len(self.expert_widths)

    def expert_params(self, hidden_size: int, width: int) -> int:
        """Parameters of one expert of that width."""
        return Dense(width, self.gated, self.bias).num_params(hidden_size) if width else 0

    def router_params(self, hidden_size: int) -> int:
        """The gate's matrix, with its bias."""
        return self.num_experts * (hidden_size + self.router_bias)

    def shared_params(self, hidden_size: int) -> int:
        """Shared experts, their gate, and a residual network."""
        params = self.expert_params(hidden_size, self.shared_width)
        params += self.expert_params(hidden_size, self.residual_width)
        return params + hidden_size * self.shared_gate

    def routed_params(self, hidden_size: int) -> int:
        """All routed experts together."""
        return sum(self.expert_params(hidden_size, width) for width in self.expert_widths)

    def active_routed_params(self, hidden_size: int) -> float:
        """Routed parameters that one token uses, when experts are chosen evenly."""
        return self.routed_params(hidden_size) * self.top_k / self.num_experts


Ffn = Dense | Experts


@dataclass(frozen=True)
class Layer:
    """One decoder (or encoder) layer: a mixer, a feed-forward part, or both; and its norms."""

    mixer: Mixer | None
    ffn: Ffn | None
    norm_params: int = 0
    cross: Attention | None = None  # attention over the encoder's output (Switch, NLLB)

    def num_params(self, hidden_size: int) -> int:
        """Everything in the layer."""
        params = self.norm_params + sum(m.num_params(hidden_size) for m in (self.mixer, self.cross) if m)
        if isinstance(self.ffn, Experts):
            experts = self.ffn
            params += experts.routed_params(hidden_size) + experts.shared_params(hidden_size)
            return params + experts.router_params(hidden_size)
        return params + (self.ffn.num_params(hidden_size) if self.ffn else 0)


@dataclass(frozen=True)
class ModelSpec:
    """A published (or made-up) transformer, read from a Hugging Face `config.json` or a preset.

    Attributes:
        name: lower-case with dashes, as its maker writes it.
        hidden_size: width of the residual stream.
        vocab_size: rows of the embedding.
        layers: in order, encoder first where there is one.
        tie_embeddings: whether the output head shares the input embedding.
        dtypes: storage format per part as published.
        extra_params: parameters outside layers and embeddings (final norm, relative position tables, ...).
        max_position: longest context the maker states, in tokens.
        mtp_layers: layers of the multi-token prediction modules (DeepSeek-V3, GLM-4.5), not part of `layers`.
        source: where the numbers come from.
        published_params, published_active_params: the maker's own counts, None where none was published.
    """

    name: str
    hidden_size: int
    vocab_size: int
    layers: tuple[Layer, ...]
    tie_embeddings: bool = False
    dtypes: Dtypes = field(default_factory=Dtypes)
    extra_params: int = 0
    max_position: int | None = None
    mtp_layers: tuple[Layer, ...] = ()
    source: str = ""
    published_params: float | None = None
    published_active_params: float | None = None

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts: L of them."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.ffn, Experts))

    @property
    def experts(self) -> Experts:
        """The routed part of the first MoE layer (in all published models they are alike).

        Raises:
            ValueError: the model is dense.
        """
        if not self.moe_layers:
            raise ValueError(f"model {self.name!r} is dense: it has no experts")
        ffn = self.layers[self.moe_layers[0]].ffn
        assert isinstance(ffn, Experts)
        return ffn

    @cached_property
    def embedding_params(self) -> int:
        """Input embedding and, where it is not tied, output head."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)

    @cached_property
    def num_params(self) -> int:
        """All parameters of the main model (multi-token prediction is counted apart, in `mtp_params`)."""
        h = self.hidden_size
        layers = sum(layer.num_params(h) for layer in self.layers)
        return self.embedding_params + self.extra_params + layers

    @cached_property
    def mtp_params(self) -> int:
        """Parameters of the multi-token prediction modules, less the embedding and head they share.

        Each has a layer, a projection from two hidden states to one, and three norms. Source: DeepSeek-V3,
        arXiv:2412.19437, section 2.2.
        """
        h = self.hidden_size
        return sum(layer.num_params(h) + 2 * h * h + 3 * h for layer in self.mtp_layers)

    @cached_property
    def num_active_params(self) -> float:
        """Parameters that one token uses (embeddings counted in full, as most makers do)."""
        idle = 0.0
        for layer in self.layers:
            if isinstance(layer.ffn, Experts):
                ffn = layer.ffn
                idle += ffn.routed_params(self.hidden_size) - ffn.active_routed_params(self.hidden_size)
        return self.num_params - idle

    @cached_property
    def kv_bytes_per_token(self) -> float:
        """Bytes that one more token adds to the KV cache of one request (inside every window)."""
        values = sum(layer.mixer.kv_values_per_token() for layer in self.layers if layer.mixer)
        return values * BYTES_PER_PARAM[self.dtypes.kv]

    def kv_bytes(self, context_tokens: int) -> float:
        """Bytes that one request of that length holds: windows cap their layers, states count once."""
        values = 0
        for layer in self.layers:
            if layer.mixer:
                window = layer.mixer.window
                kept = context_tokens if window is None else min(context_tokens, window)
                values += kept * layer.mixer.kv_values_per_token()
                values += layer.mixer.state_values(self.hidden_size)
        return values * BYTES_PER_PARAM[self.dtypes.kv]

    @cached_property
    def weight_bytes(self) -> float:
        """Stored bytes of all weights, each part in its own format."""
        h, size = self.hidden_size, {k: BYTES_PER_PARAM[v] for k, v in vars(self.dtypes).items()}
        total = (self.embedding_params + self.extra_params) * size["embedding"]
        for layer in self.layers:
            total += layer.norm_params * size["dense"]
            total += layer.mixer.num_params(h) * size["attention"] if layer.mixer else 0
            total += layer.cross.num_params(h) * size["attention"] if layer.cross else 0
            if isinstance(layer.ffn, Dense):
                total += layer.ffn.num_params(h) * size["dense"]
            elif layer.ffn:
                total += layer.ffn.routed_params(h) * size["experts"]
                total += (layer.ffn.shared_params(h) + layer.ffn.router_params(h)) * size["dense"]
        return total
