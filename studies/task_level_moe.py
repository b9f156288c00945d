"""Task-level routing (Beyond Distillation, arXiv 2110.03742).

Question: what does decoding gain when all tokens of a task use the same K experts, so that these are taken out of the
model and nothing is sent?

Setting: the paper's Transformer-Base, whose every second layer has 32 experts in place of the dense network, counted;
its decoder's vocabulary is taken from the published size of the dense model. For time, one MoE layer of OLMoE-1B-7B on
`hgx-h100` under the packaged trace, where eight requests of the same GPU are a task, and one of Transformer-Base's size
on 32 and 128 H100 under even routing.

Lever: token-level routing over all GPUs against task-level routing with each task's experts on the GPU of its requests;
number of tasks on a GPU; number of experts.

Expected before the first run: the counts agree. Communication alone (26.9 % of a step) gives 1.37, not the paper's
1.87. A core that has one of 32 experts reads no more weights than a dense one, so the rest is not weight reads. With
one task on a GPU the layer is faster without its exchange; with a task for each request, more experts are read than is
saved.

Cannot speak about: quality, TPU v3, which no profile is at hand for, and tasks themselves: the trace has requests only,
and a router trained for tasks would choose other sets.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.costs.moe_layer import LayerEffects, layer_effects
from moesim.costs.operators import Operators
from moesim.files.hardware import load_cluster
from moesim.files.models import load_model
from moesim.files.scenarios import load_trace
from moesim.hardware import Cluster
from moesim.mixers import Attention
from moesim.model import Dense, Experts, Layer, ModelSpec
from moesim.routing.variants import softmax, task_level, top_k
from moesim.study import Claim

Floats = NDArray[np.float64]
HIDDEN, WIDTH, LAYERS = 512, 2048, 6
DENSE_PARAMS, TASK_K, NUM_EXPERTS = 142e6, 2, 32
PEAK_TOKENS_PER_S = {"dense": 2.3e5, "task": 2.3e5, "token": 1.3e5}
COMMUNICATION_FRACTION = 0.269
TABLE = "table, WMT14 English-German, 32 TPU v3 cores"


def transformer_base(num_experts: int, top_experts: int, vocab_size: int, has_encoder: bool = True) -> ModelSpec:
    """Transformer-Base with that many experts in every second layer; 0 for a dense one."""
    attention = Attention(8, 8, HIDDEN // 8)
    dense, experts = Dense(WIDTH, gated=False), Experts((WIDTH,) * num_experts, top_experts, gated=False)
    ffns = [experts if num_experts and layer % 2 else dense for layer in range(LAYERS)]
    encoder = tuple(Layer(attention, ffn) for ffn in ffns) if has_encoder else ()
    decoder = tuple(Layer(attention, ffn, cross=attention) for ffn in ffns)
    return ModelSpec("transformer-base", HIDDEN, vocab_size, encoder + decoder, tie_embeddings=not has_encoder)


def vocabulary() -> int:
    """Rows of each of three embeddings (two inputs, one output) that make the dense model as large as published."""
    blocks = transformer_base(0, 0, 0).num_params
    return round((DENSE_PARAMS - blocks) / (3 * HIDDEN))


def whole_params(num_experts: int) -> int:
    """Encoder, decoder and three embeddings; `ModelSpec` has two of them."""
    return transformer_base(num_experts, TASK_K, vocabulary()).num_params + vocabulary() * HIDDEN


def counted() -> list[Claim]:
    """Parameters, and what communication alone gives."""
    whole, part = (transformer_base(e, TASK_K, vocabulary(), has_encoder=False) for e in (NUM_EXPERTS, TASK_K))
    bodies = [model.num_params - model.embedding_params for model in (whole, part)]
    needed = (bodies[0] - 3.75 * bodies[1]) / 2.75 / HIDDEN
    per_step = {name: 1 / rate for name, rate in PEAK_TOKENS_PER_S.items()}
    rest = 1 - PEAK_TOKENS_PER_S["token"] / PEAK_TOKENS_PER_S["dense"] - COMMUNICATION_FRACTION
    return [
        Claim("parameters with 32 experts in every second layer", TABLE, 533e6, float(whole_params(32)), "", 0.02),
        Claim(
            "decoder's parameters over those that a task needs", "text", 3.75,
            whole.num_params / part.num_params, "ratio", 0.05,
            because=f"with one embedding of {vocabulary():,} rows, taken from the dense model's size; with "
            f"{needed:,.0f} rows it would be 3.75, so something beside blocks and one embedding is counted",
        ),
        Claim(
            "the peak rates give the stated gain", TABLE, 1.87, per_step["token"] / per_step["task"], "ratio", 0.06,
        ),
        Claim(
            "gain of task-level over token-level decoding, from communication alone", TABLE, 1.87,
            1 / (1 - COMMUNICATION_FRACTION), "ratio", 0.1,
            because=f"{rest:.0%} of the token-level step is neither communication nor in the dense model; a core with "
            "one of 32 experts reads as many weights as a dense one, which leaves the gate and its masks, not modelled",
        ),
    ]  # fmt: skip


# One layer on real routing


def experts_alone_s(loads_RE: NDArray[np.int64], ffn: Experts, hidden_size: int, cluster: Cluster) -> float:
    """Seconds of the slowest GPU when each computes its own tokens with experts that it has itself."""
    params = float(ffn.expert_params(hidden_size, ffn.expert_widths[0]))
    load_LRS = loads_RE[None].astype(np.int32)
    operators = Operators(cluster.device)
    return float(operators.experts(load_LRS, np.full(load_LRS.shape, params), ffn, hidden_size, "bf16").seconds.max())


class Decoding:
    """A decode step of the packaged trace, mean of its layers: 64 requests, eight on each of eight GPUs."""

    gpus = 8

    def __init__(self) -> None:
        trace = load_trace("olmoe-shape-16x64")
        assert trace.weights_TLK is not None
        self.model, self.cluster = load_model("olmoe-1b-7b"), load_cluster("hgx-h100")
        starts = np.flatnonzero(np.diff(trace.request_T, prepend=-1))
        first_T = np.array([start + np.flatnonzero(trace.is_decode_T[start:])[0] for start in starts])
        # Requests in the order of their texts: neighbours are likely to be alike.
        shape = len(first_T), trace.num_layers, trace.num_experts
        self.probability_TLE = np.zeros(shape)
        ids_TLK = trace.expert_ids_TLK[first_T].astype(np.int64)
        np.put_along_axis(self.probability_TLE, ids_TLK, trace.weights_TLK[first_T].astype(np.float64), axis=2)

    def token_level(self) -> list[LayerEffects]:
        """Every token its own experts, over all GPUs."""
        ffn, hidden = self.model.experts, self.model.hidden_size
        return [
            layer_effects(top_k(p_TE, ffn.top_k), ffn, hidden, self.cluster, self.gpus)
            for p_TE in self.probability_TLE.swapaxes(0, 1)
        ]

    def task_level(self, tasks_per_gpu: int) -> tuple[float, float]:
        """Seconds of a layer, and the share of the gate weight that the tasks' experts keep."""
        ffn, T = self.model.experts, len(self.probability_TLE)
        seconds, kept = [], []
        task_T = np.arange(T) * self.gpus * tasks_per_gpu // T
        for p_TE in self.probability_TLE.swapaxes(0, 1):
            chosen_TE = task_level(p_TE, task_T, ffn.top_k).chosen_TE
            loads_RE = chosen_TE.reshape(self.gpus, -1, ffn.num_experts).sum(axis=1)
            seconds.append(experts_alone_s(loads_RE, ffn, self.model.hidden_size, self.cluster))
            kept.append((p_TE * chosen_TE).sum() / p_TE.sum())
        return float(np.mean(seconds)), float(np.mean(kept))


def real_routing() -> list[Claim]:
    """Gains on `hgx-h100`."""
    decoding = Decoding()
    effects = decoding.token_level()
    token_s = float(np.mean([e.seconds for e in effects]))
    exchange_s = float(np.mean([e.dispatch_s + e.combine_s for e in effects]))
    (one_s, one_kept), (each_s, each_kept) = decoding.task_level(1), decoding.task_level(8)
    return [
        Claim("faster than token-level, one task on each GPU", TABLE, "> 1", token_s / one_s, "ratio"),
        Claim(
            "its gain over that of communication alone", TABLE, 1.87 * (1 - COMMUNICATION_FRACTION),
            token_s / one_s * (1 - exchange_s / token_s), "ratio", 0.1,
            because="eight experts are read on a GPU either way, and gate and masks cost nothing here",
        ),
        Claim(
            "communication's share of the token-level layer", TABLE, None, exchange_s / token_s, "fraction",
            because="the paper's 26.9 % is of a whole step on TPU v3",
        ),
        Claim(
            "against token-level, a task for each request", "not in the paper", None, token_s / each_s, "ratio",
            because="eight sets of experts are read where one was",
        ),
        Claim(
            "share of the gate weight that stays, one task on each GPU", "not in the paper", None, one_kept, "fraction",
            because=f"of a router that was not trained for tasks; {each_kept:.0%} with a task for each request, whose "
            "one token chooses all of its set",
        ),
    ]  # fmt: skip


def even_gain(num_experts: int, tokens_per_gpu: int = 64) -> float:
    """Token-level over task-level seconds of a layer of Transformer-Base's size, a GPU for each expert."""
    cluster, ffn = load_cluster(f"{num_experts // 8} x hgx-h100"), Experts((WIDTH,) * num_experts, TASK_K, gated=False)
    scores_TE = np.random.default_rng(0).normal(size=(tokens_per_gpu * num_experts, num_experts))
    token_s = layer_effects(top_k(softmax(scores_TE), TASK_K), ffn, HIDDEN, cluster, num_experts).seconds
    loads_RE = np.full((1, TASK_K), tokens_per_gpu)
    return token_s / experts_alone_s(loads_RE, ffn, HIDDEN, cluster)


def claims() -> list[Claim]:
    """Counts, real routing, then the number of experts."""
    gains = {num_experts: even_gain(num_experts) for num_experts in (32, 128)}
    return [
        *counted(), *real_routing(),
        Claim("the gain grows from 32 to 128 experts", "200 languages: 2.6", "> 1", gains[128] / gains[32], "ratio"),
    ]  # fmt: skip
