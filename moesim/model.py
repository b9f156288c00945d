"""A model as the simulator sees it: which weights exist, which of them a token uses, what it leaves cached.

A `ModelSpec` is a tuple of layers; a layer is one *mixer* (attention of some kind, or a state-space block)
and one *feed-forward part* (dense, routed, or none). Everything here is counting: parameters and bytes. FLOP
and seconds are `moesim.costs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from moesim.mixers import Attention, Mixer

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
    "ternary_words": 0.807 / 8,  # words of 16 bits for up to 28 ternary weights (QMoE, arXiv 2310.16795, c2048)
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
class Dense:
    """One feed-forward network for every token. A gated one (SwiGLU) has three matrices, else two."""

    width: int
    gated: bool = True
    bias: bool = False

    def num_params(self, hidden_size: int) -> int:
        """Its matrices and biases."""
        matrices = 3 if self.gated else 2
        return matrices * hidden_size * self.width + self.bias * ((matrices - 1) * self.width + hidden_size)

    def matmuls(self, hidden_size: int, cut: int = 1) -> tuple[tuple[int, int], ...]:
        """Its products (n, k), gate and up as one, with the width cut in `cut`."""
        width = self.width // cut
        return ((1 + self.gated) * width, hidden_size), (hidden_size, width)


@dataclass(frozen=True)
class Experts:
    """A routed feed-forward part: `top_k` of the experts for each token, and shared ones for all of them.

    expert_widths: intermediate width of each routed expert, in order; they may differ (HMoE). A width of 0 is
        a zero-computation expert (MoE++): it can be chosen and costs nothing.
    shared_width: total intermediate width of the experts that see every token, 0 for none.
    residual_width: width of a dense network that runs beside the routed part (Arctic, PR-MoE), 0 for none.
    num_groups, top_groups: groups that the experts are in, and of how many of them a token chooses (DeepSeek-V3).
    """

    expert_widths: tuple[int, ...]
    top_k: int
    shared_width: int = 0
    gated: bool = True
    bias: bool = False
    router_bias: bool = False  # a bias, or a score correction, per expert
    shared_gate: bool = False  # one sigmoid gate over the shared expert (Qwen-MoE)
    residual_width: int = 0
    num_groups: int = 1
    top_groups: int = 1

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

    def shared_matmuls(self, hidden_size: int, cut: int = 1) -> tuple[tuple[int, int], ...]:
        """Products (n, k) of the shared experts and of a residual network, with their widths cut in `cut`."""
        widths = [width for width in (self.shared_width, self.residual_width) if width]
        return tuple(shape for width in widths for shape in Dense(width, self.gated).matmuls(hidden_size, cut))

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
