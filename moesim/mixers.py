"""Mixers: what moves information between the tokens of a layer, and what each keeps for the tokens to come.

`matmuls` are the products of rows with a weight, as (n, k), n columns made of k, that each of `tp` ranks does.

Attention of several kinds keeps keys and values for every token; state-space and linear mixers keep one state for each
request.
"""

from __future__ import annotations

from dataclasses import dataclass


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

    def matmuls(self, hidden_size: int, tp: int = 1) -> tuple[tuple[int, int], ...]:
        """q, k and v as one product, and o: (n, k) on each rank; there is at least one KV head on each."""
        q, kv = self.num_heads * self.head_dim // tp, max(self.num_kv_heads // tp, 1) * self.head_dim
        return (q + 2 * kv, hidden_size), (hidden_size, q)

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

    def matmuls(self, hidden_size: int, tp: int = 1) -> tuple[tuple[int, int], ...]:
        """The two down-projections as one, which every rank does whole; up-projections; o: (n, k) on each rank."""
        heads, latent = self.num_heads // tp, self.kv_lora_rank + self.qk_rope_head_dim
        up = (heads * (self.qk_nope_head_dim + self.v_head_dim), self.kv_lora_rank)
        out = (hidden_size, heads * self.v_head_dim)
        if self.q_lora_rank is None:
            return (heads * self.head_dim + latent, hidden_size), up, out
        down = (self.q_lora_rank + latent, hidden_size)
        return down, (heads * self.head_dim, self.q_lora_rank), up, out

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

    def matmuls(self, hidden_size: int, tp: int = 1) -> tuple[tuple[int, int], ...]:
        """Input, x, dt and output projections: (n, k) on each rank."""
        inner = self.expand * hidden_size // tp
        made = (2 * inner, hidden_size), (self.dt_rank + 2 * self.state_size, inner), (inner, self.dt_rank)
        return *made, (hidden_size, inner)

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

    def matmuls(self, hidden_size: int, tp: int = 1) -> tuple[tuple[int, int], ...]:
        """q, k, v and the gate as one product, and o: (n, k) on each rank."""
        heads = self.num_heads // tp
        made = 2 * heads * (self.key_head_dim + self.value_head_dim)
        return (made, hidden_size), (hidden_size, heads * self.value_head_dim)

    def kv_values_per_token(self) -> int:
        """Nothing grows with the length."""
        return 0

    def state_values(self, hidden_size: int) -> int:
        """One key-by-value matrix per head."""
        return self.num_heads * self.key_head_dim * self.value_head_dim


Mixer = Attention | LatentAttention | Mamba | LinearAttention
