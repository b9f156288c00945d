"""Routing variants with a varying number of experts per token: MoE++, AdaMoE, top-p, ReMoE, HMoE, Grove, DeepSeekMoE.

Question: how much expert work is left when a router may choose fewer experts, free ones, or smaller ones?

Setting: each variant's rule from `moesim.routing.variants`, on random scores where a paper's router is balanced, and
on the gate weights of the packaged trace (olmoe-shape-16x64, 16 layers of 64 experts, top-8) where it says how tokens
differ. Parameters and FLOP are counted on model specifications.

Lever: free experts and their tau (MoE++ arXiv 2410.07348, AdaMoE arXiv 2406.13233), p (Dynamic MoE arXiv 2403.07652),
one threshold (ReMoE arXiv 2412.14711), widths (HMoE arXiv 2408.10681), groups (Grove arXiv 2508.07785).

Expected before the first run: arithmetic agrees (AdaMoE, Grove, DeepSeekMoE). MoE++'s expert time is a part for each
expert and a part for the tokens that they compute, so that a line fitted to two cells of its 16 + 4 row gives the
other rows within a tenth. AdaMoE's load is that of a router that takes null and true experts alike. Tokens of early
layers need more experts for the same p, and rare tokens pass a common threshold more often.

Cannot speak about: quality. What a router trained for one of these rules would choose is not known from a router that
was trained for top-8; the trace was made by a tiny model of our own.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from moesim.files.models import load_model
from moesim.files.scenarios import load_trace
from moesim.mixers import Attention
from moesim.model import Dense, Experts, Layer, ModelSpec
from moesim.routing.capacity import moe_plus_plus_share
from moesim.routing.scores import gate_weights_TE
from moesim.routing.trace import RoutingTrace
from moesim.routing.variants import adjugate, relu_gate, top_k, top_p
from moesim.study import Claim

Floats = NDArray[np.float64]
TAUS = (0.1, 0.25, 0.5, 0.75, 1.0)
EXPERT_MS = {
    (8, 4): (202.4, 277.8, 387.3, 427.6, 449.6, 535.3),
    (16, 4): (289.3, 384.9, 469.7, 500.3, 530.2, 610.9),
    (32, 8): (417.9, 473.7, 532.7, 561.0, 590.5, 683.4),
}
"""MoE++: FFN and free experts -> milliseconds at each of `TAUS`, then of as many FFN experts alone."""
ADAMOE_LOADS = {1.66: 14.99, 1.68: 14.10, 1.59: 18.07, 1.63: 16.31, 1.70: 13.22, 1.67: 14.55}
"""AdaMoE on Mixtral: true experts per token -> percent of the FLOP saved, one for each data set."""
NULL_LOADS = {(16, 4): 1.66, (32, 4): 0.77, (32, 5): 1.05, (32, 6): 1.54, (40, 6): 1.01, (40, 7): 1.49, (40, 8): 1.64,
              (48, 8): 1.48}  # fmt: skip
"""AdaMoE on SIQA: null experts and k -> true experts per token, beside 8 true ones."""


@cache
def packaged() -> RoutingTrace:
    """The trace that comes with moesim."""
    return load_trace("olmoe-shape-16x64")


# MoE++


def expert_ms(num_ffn: int, share: float) -> float:
    """Milliseconds: a part for each FFN expert, a part for the share of the tokens that they compute."""
    (low, high), (first, *_rest, last, _alone) = (moe_plus_plus_share(t, 16, 4) for t in (0.1, 1.0)), EXPERT_MS[16, 4]
    rate = (last - first) / (high - low)
    return (first - rate * low) * num_ffn / 16 + rate * share


def moe_plus_plus() -> list[Claim]:
    """Two cells fitted, the others predicted."""
    fitted = "with its pair: milliseconds for each expert, and for the share of tokens"
    grown = "without free ones, 16 experts take 76 ms more than 8, and 32 take 73 ms more than 16: what a further "
    grown += "expert costs is not the same for each, as this model has it"
    differs = {(8, tau) for tau in TAUS} | {(32, tau) for tau in (*TAUS[1:], None)}
    found = []
    for (ffn, free), row in EXPERT_MS.items():
        for tau, paper in zip((*TAUS, None), row, strict=True):
            share = 1.0 if tau is None else moe_plus_plus_share(tau, ffn, free)
            words = f"MoE++ ms of {ffn} experts" + ("" if tau is None else f" and {free} free ones at tau {tau}")
            found.append(
                Claim(words, "expert forward time", paper, expert_ms(ffn, share), "", 0.1,
                      fitted=fitted if (ffn, tau) in ((16, 0.1), (16, 1.0)) else "",
                      because=grown if (ffn, tau) in differs else "")
            )  # fmt: skip
    ratio = expert_ms(16, moe_plus_plus_share(0.75, 16, 4)) / expert_ms(16, 1.0)
    found.append(Claim("MoE++ 7B, 16 + 4 at tau 0.75: time over plain experts", "expert forward time",
                       1455 / 1859, ratio, "ratio", 0.1))  # fmt: skip
    return found


# AdaMoE


def null_load(num_null: int, k: int, seed: int = 0) -> float:
    """True experts per token of a router that takes 8 true and the null experts alike."""
    scores_TE = np.random.default_rng(seed).normal(size=(20000, 8 + num_null))
    return top_k(scores_TE, k, num_free=num_null).mean_experts


def adamoe() -> list[Claim]:
    """FLOP saved on Mixtral, and the load that k and the number of null experts give."""
    mixtral = load_model("mixtral-8x7b")
    routed = sum(layer.ffn.active_routed_params(mixtral.hidden_size) for layer in mixtral.layers
                 if isinstance(layer.ffn, Experts))  # fmt: skip
    share = routed / (mixtral.num_active_params - mixtral.embedding_params / 2)
    found = [
        Claim(f"AdaMoE on Mixtral, {load} of 2 experts: FLOP saved", "Mixtral results", paper / 100,
              share * (1 - load / 2), "fraction", 0.02)
        for load, paper in ADAMOE_LOADS.items()
    ]  # fmt: skip
    liked = "the trained router takes true experts more often than null ones, which its balancing loss only pulls at"
    differs = (16, 4), (32, 6), (40, 7), (40, 8), (48, 8)
    return found + [
        Claim(f"AdaMoE on SIQA, {num_null} null experts, top-{k}: load", "choice of m and k", paper,
              null_load(num_null, k), "", 0.1, because=liked if (num_null, k) in differs else "")
        for (num_null, k), paper in NULL_LOADS.items()
    ]  # fmt: skip


# Top-p, XMoE, ReMoE, HMoE, Union-of-Experts


def top_p_means(p: float = 0.1) -> Floats:
    """Experts per token in each layer of the packaged trace; at this p every token's recorded 8 weights suffice."""
    trace = packaged()
    return np.array([top_p(gate_weights_TE(trace, layer), p).mean_experts for layer in range(trace.num_layers)])


def rarity_correlation() -> float:
    """Correlation of a token's log frequency with its number of experts under one threshold, mean over layers."""
    trace = packaged()
    _ids, index_T, count = np.unique(trace.token_id_T, return_inverse=True, return_counts=True)
    log_T = np.log(count[index_T])
    gates = (relu_gate(gate_weights_TE(trace, layer), 2.0) for layer in range(trace.num_layers))
    return float(np.mean([np.corrcoef(log_T, gate.chosen_TE.sum(axis=1))[0, 1] for gate in gates]))


def varying() -> list[Claim]:
    """What the packaged trace can say of them."""
    mean_L = top_p_means()
    trained = "it is what a router trained with that rule came to"
    # 0.4B parameters of which 163M are active with 2 of 8 equal experts: active = rest + experts x width used.
    experts = (400e6 - 163e6) / (1 - 2 / 8)
    return [
        Claim("top-p takes more experts in the lower half of the layers", "readme", "> 1",
              float(mean_L[:8].mean() / mean_L[8:].mean()), "ratio"),
        Claim("top-p: experts per token", "readme", 1.76, None, "", 0.1, because=trained),
        Claim("XMoE: MoE compute against top-k", "abstract", "< 0.5", None, "ratio", because=trained),
        Claim("ReMoE: rare tokens have more experts (correlation with log frequency)", "analysis", "< 0",
              rarity_correlation(), because="this router was trained with softmax and top-8, where no penalty makes "
              "frequent tokens give up experts: its weights tell nothing of what an L1 penalty would do"),
        Claim("HMoE 0.4B, top-2: active parameters if tokens took all widths alike", "active parameters", 153e6,
              400e6 - experts + experts * 2 / 8, "", 0.03, because="its penalty on wide experts makes tokens choose "
              "narrow ones: 28 of 128 units of width in the mean, where even choice uses 32"),
        Claim("Union-of-Experts: FLOP of the best MoE, language modelling", "readme", 0.76, None, "ratio", 0.1,
              because="it is one model's cost at equal quality; its equal split makes every expert's load the same"),
    ]  # fmt: skip


# Grove


def grove() -> list[Claim]:
    """Qwen3-30B-A3B with an adjugate expert of width 128 for each of 64 pairs of experts."""
    base = load_model("qwen3-30b-a3b")
    adjugate_params = len(base.moe_layers) * base.experts.expert_params(base.hidden_size, 128)
    outside = base.num_active_params - base.embedding_params / 2
    scores_TE = np.random.default_rng(0).random((50000, 128))
    touched = float(adjugate(top_k(scores_TE, 8), 64).sum(axis=1).mean())
    return [
        Claim("Grove: parameters of one adjugate expert, all layers", "3.28B - 3.14B over 4", 35e6, adjugate_params, "",
              0.1),
        Claim("Grove: least active parameters, 4 groups", "abstract", 3.14e9, outside + 4 * adjugate_params, "", 0.02),
        Claim("Grove: most active parameters, 8 groups", "abstract", 3.28e9, outside + 8 * adjugate_params, "", 0.02),
        Claim(f"Grove: active parameters under random routing, {touched:.2f} groups", "abstract",
              "3140000000 to 3280000000", outside + touched * adjugate_params, "", 0.02),
    ]  # fmt: skip


# DeepSeekMoE


def decoder(name: str, hidden: int, heads: int, ffns: list[Dense | Experts], vocab: int) -> ModelSpec:
    """Multi-head attention and these feed-forward parts."""
    mixer = Attention(heads, heads, hidden // heads)
    return ModelSpec(name, hidden, vocab, tuple(Layer(mixer, ffn, 2 * hidden) for ffn in ffns))


def tflop_per_4k(model: ModelSpec) -> float:
    """TFLOP of training on 4096 tokens: 6 for each active parameter but the input embedding, 12 L h s for attention."""
    active, tokens = model.num_active_params - model.embedding_params / 2, 4096
    return (6 * active + 12 * len(model.layers) * model.hidden_size * tokens) * tokens / 1e12


def deepseek_moe() -> list[Claim]:
    """DeepSeekMoE 16B beside dense models of 7B."""
    moe: list[Dense | Experts] = [Experts((1408,) * 64, 6, shared_width=2 * 1408)]
    sparse = decoder("deepseek-moe-16b", 2048, 16, [Dense(10944), *moe * 27], 102400)
    dense7, llama7 = (decoder(name, 4096, 32, [Dense(11008)] * layers, vocab) for name, layers, vocab in
                      (("deepseek-7b", 30, 102400), ("llama-2-7b", 32, 32000)))  # fmt: skip
    ours = [tflop_per_4k(model) for model in (sparse, dense7, llama7)]
    names = "DeepSeekMoE 16B", "DeepSeek 7B", "LLaMA2 7B"
    more = "1.5 TFLOP more, about the feed-forward part of one layer; which parts the paper counts is not at hand"
    why = more, "", ""
    found = [Claim(f"{name}: TFLOP per 4096 tokens", "16B against 7B", paper, value, "", 0.02, because=because)
             for name, paper, value, because in zip(names, (74.4, 183.5, 187.9), ours, why, strict=True)]  # fmt: skip
    return [
        *found,
        Claim("DeepSeekMoE 16B: FLOP of LLaMA2 7B", "16B against 7B", 0.396, ours[0] / ours[2], "ratio", 0.02),
        Claim("DeepSeekMoE 16B: GB of weights in 16 bits, on one GPU of 40 GB", "abstract", "< 40",
              2 * sparse.num_params / 1e9),
        Claim("DeepSeekMoE 16B: speed of a dense 7B where arithmetic bounds it", "deployment of 16B", 2.5,
              ours[1] / ours[0], "ratio", 0.1),
        Claim("DeepSeekMoE 145B: FLOP of DeepSeek 67B", "145B against 67B", 0.285, None, "ratio", 0.02,
              because="the sizes of the 145B model are not at hand"),
    ]  # fmt: skip


def claims() -> list[Claim]:
    """By variant."""
    return [*moe_plus_plus(), *adamoe(), *varying(), *grove(), *deepseek_moe()]
