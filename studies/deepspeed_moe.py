"""DeepSpeed-MoE inference: all-to-alls, model sizes, scaling (arXiv 2201.05596).

Question: how much do a hierarchical and a coordinated all-to-all save on 128 GPUs, and why does throughput per GPU rise
when more GPUs share the experts?

Setting: `dgx-a100` nodes, which have the A100-80GB and a 200 Gb/s NIC for each as Azure's ND A100 v4 has. Models of 128
experts, top-1, on every second layer, two matrices each of four times the hidden size; uniform random routing; one
request per GPU for latency and eight for throughput, 128 tokens before them (the paper's batches are not at hand).
Attention is data-parallel, and tensor-parallel by 8 for the model above 1T. A message costs as much as 64 kB more
(2.6 us of a port), which is assumed, not fitted: only signs and the limit of no bytes rest on it. PR-MoE has more
experts in its last two MoE layers (recalled) and a dense part beside them; MoS has an eighth of the layers less.

Lever: `flat`, `two_level` (hierarchical) and `coordinated` all-to-alls; 8 to 64 GPUs.

Expected before the first run: the counts of peers come out exactly; hierarchical wins for few bytes and loses for many;
throughput per GPU rises, since each GPU reads fewer experts for more tokens each.

Cannot speak about: the baseline (PyTorch with einsum gates), whose cost is most of the paper's 7.3 times; expert
slicing (slices of spread experts are not lowered yet, so the model above 1T runs on 128 GPUs here and on 256 there).
"""

from __future__ import annotations

from functools import cache

import numpy as np

from moesim.estimate import estimate
from moesim.files.hardware import load_cluster
from moesim.layout import AttentionGrid, ExpertGrid, Layout
from moesim.mixers import Attention
from moesim.model import Dense, Experts, Layer, ModelSpec
from moesim.network.routes import Fabric
from moesim.network.sends import Schedule, seconds
from moesim.policies.collective import Coordinated, Flat, Ranks, TokenTraffic, TwoLevel
from moesim.routing.synthetic import zipf_trace
from moesim.scenario import Scenario
from moesim.study import Claim
from moesim.workload import Workload

NUM_RANKS, TP, PER_NODE, NUM_EXPERTS = 128, 8, 8, 128
HALF_SIZE_BYTES = 64e3
TOKEN_BYTES = 2.0 * 2048
MODELS = {
    "1.3B": (24, 2048, 52.0), "2.4B": (16, 3584, 107.7), "8B": (30, 4096, 349.0), "24B": (40, 8192, 1064.9),
    "47B": (58, 8192, 2024.0),
}  # fmt: skip
"""Base model -> layers, hidden size, billions of parameters with 128 experts."""


PYRAMIDS = {
    "350M+128e": (24, 1024, 128, 128, 13.0), "350M+PR-MoE-32/64": (24, 1024, 32, 64, 4.0),
    "350M+PR-MoE-32/64+MoS": (21, 1024, 32, 64, 3.5), "1.3B+PR-MoE-64/128": (24, 2048, 64, 128, 31.0),
    "1.3B+PR-MoE-64/128+MoS": (21, 2048, 64, 128, 27.0),
}  # fmt: skip
"""Model -> layers, hidden size, experts of the early and of the last two MoE layers, billions of parameters."""


def model(num_layers: int, hidden_size: int, early: int = NUM_EXPERTS, late: int = NUM_EXPERTS) -> ModelSpec:
    """A GPT with experts in place of every second feed-forward part; beside a dense one where their numbers differ."""
    mixer, width = Attention(hidden_size // 128, hidden_size // 128, 128), 4 * hidden_size
    residual_width = width if early != late else 0
    few, many = (Experts((width,) * n, 1, gated=False, residual_width=residual_width) for n in (early, late))
    ffns = [few if place % 2 else Dense(width, gated=False) for place in range(num_layers)]
    for place in [place for place, ffn in enumerate(ffns) if ffn is few][-2:]:
        ffns[place] = many
    layers = tuple(Layer(mixer, ffn) for ffn in ffns)
    return ModelSpec(f"gpt-{num_layers}x{hidden_size}-{late}e", hidden_size, 51_200, layers, tie_embeddings=True)


@cache
def fabric() -> Fabric:
    """128 GPUs."""
    return Fabric(load_cluster(f"{NUM_RANKS // PER_NODE} x dgx-a100"))


def schedules(rank_bytes: float) -> dict[str, Schedule]:
    """Each way's dispatch; coordinated, the ranks of a tensor-parallel group share what one of them has."""
    ranks = Ranks(NUM_RANKS, PER_NODE)
    whole, shared = TokenTraffic.even(ranks, rank_bytes), TokenTraffic.even(ranks, rank_bytes / TP)
    return {
        "flat": Flat().dispatch(whole),
        "two_level": TwoLevel().dispatch(whole),
        "coordinated": Coordinated(TP).dispatch(shared),
    }


def gain(way: str, rank_bytes: float, half_size_bytes: float) -> float:
    """How many times as fast as flat."""
    times = {
        name: sum(seconds(schedule, fabric(), half_size_bytes=half_size_bytes))
        for name, schedule in schedules(rank_bytes).items()
    }
    return times["flat"] / times[way]


def peers(schedule: Schedule) -> float:
    """Messages of a rank over all rounds; as the paper counts, one to itself in each."""
    return float(sum((sends.source_F == 0).sum() + 1 for sends in schedule))


def decode(num_layers: int, hidden_size: int, num_nodes: int, tp: int, requests_per_rank: int) -> dict[str, float]:
    """Metrics of decoding."""
    spec, num_ranks = model(num_layers, hidden_size), num_nodes * PER_NODE
    trace = zipf_trace(
        len(spec.moe_layers), NUM_EXPERTS, 1, num_requests=64, prompt_tokens=16, output_tokens=16, exponent=0.0
    )
    scenario = Scenario(
        spec.name, spec, load_cluster(f"{num_nodes} x dgx-a100" if num_nodes > 1 else "dgx-a100"),
        Layout(AttentionGrid(num_ranks // tp, tp), ExpertGrid(1, num_ranks)),
        Workload(requests_per_rank * num_ranks, 16, 128), trace,
    )  # fmt: skip
    if mistakes := scenario.mistakes():
        raise ValueError("; ".join(mistakes))
    return dict(estimate(scenario).metrics)


def size_claims() -> list[Claim]:
    """Parameters, from layers and hidden size."""
    because = {}
    for name, fits in (("8B", 40), ("24B", 30)):
        num_layers, hidden_size, _ = MODELS[name]
        other, base = model(fits, hidden_size).num_params / 1e9, 12 * num_layers * hidden_size**2 / 1e9
        because[name] = (
            f"the table's {num_layers} layers make a base model of {base:.0f}B; {fits} layers give {other:.0f}B: "
            "the layers of the 8B and the 24B model seem to be exchanged"
        )
    found = [
        Claim(
            f"billions of parameters, {name}+128e: {num_layers} layers of {hidden_size}", "table of models", paper,
            model(num_layers, hidden_size).num_params / 1e9, "", 0.02, because=because.get(name, ""),
        )
        for name, (num_layers, hidden_size, paper) in MODELS.items()
    ]  # fmt: skip
    return found + [
        Claim(
            f"billions of parameters, {name}",
            "table of PR-MoE and MoS",
            paper,
            model(*shape).num_params / 1e9,
            "",
            0.05,
        )
        for name, (*shape, paper) in PYRAMIDS.items()
    ]


def exchange_claims() -> list[Claim]:
    """Peers, bytes and times of the all-to-alls."""
    ways = schedules(TOKEN_BYTES)
    sent = {name: float(np.sum([s.bytes_F.sum() for s in schedule])) for name, schedule in ways.items()}
    hierarchical, coordinated = "section on hierarchical all-to-all", "section on coordinated all-to-all"
    return [
        Claim("messages of a rank, flat: p", coordinated, 128.0, peers(ways["flat"]), "", 1e-9),
        Claim("messages of a rank, coordinated: p / L", coordinated, 16.0, peers(ways["coordinated"]), "", 1e-9),
        Claim("messages of a rank, hierarchical: G + p / G", hierarchical, 24.0, peers(ways["two_level"]), "", 1e-9),
        Claim(
            "bytes, hierarchical over flat: twice (ours leaves out what a rank keeps)", hierarchical, 2.0,
            sent["two_level"] / sent["flat"], "ratio", 0.10,
        ),
        Claim(
            "coordinated against flat where latency is all: 128 C1 over 16 C1", coordinated, 8.0,
            gain("coordinated", 1.0, HALF_SIZE_BYTES), "ratio", 0.10,
        ),
        Claim(
            "hierarchical against flat, one token per GPU", hierarchical, "> 1",
            gain("two_level", TOKEN_BYTES, HALF_SIZE_BYTES), "ratio",
        ),
        Claim(
            "hierarchical against flat where bytes are all", hierarchical, "< 1",
            gain("two_level", 1e9, 0.0), "ratio",
        ),
    ]  # fmt: skip


def step_claims() -> list[Claim]:
    """Decoding."""
    layers, hidden_size, _ = MODELS["1.3B"]
    rate = {
        nodes: decode(layers, hidden_size, nodes, 1, 8)["output_tokens_per_s"] / (nodes * PER_NODE)
        for nodes in (1, 2, 4, 8)
    }
    huge_s = decode(*MODELS["24B"][:2], NUM_RANKS // PER_NODE, TP, 1)["tpot_s"]
    figure = "figure of the 52B model, 8 to 64 GPUs"
    return [
        Claim("52B: tokens/s per GPU, 16 over 8 GPUs", figure, "> 1", rate[2] / rate[1], "ratio"),
        Claim("52B: tokens/s per GPU, 32 over 16 GPUs", figure, "> 1", rate[4] / rate[2], "ratio"),
        Claim("52B: tokens/s per GPU, 64 over 32 GPUs", figure, "> 1", rate[8] / rate[4], "ratio"),
        Claim("a token of a model above 1T (24B+128e)", "abstract", "< 25e-3", huge_s, "s"),
        Claim(
            "faster than PyTorch: up to", "abstract", 7.3, None, "ratio", 0.25,
            because="the baseline's einsum gates and its launches are not modelled",
        ),
    ]  # fmt: skip


def claims() -> list[Claim]:
    """Sizes, all-to-alls, steps."""
    return [*size_claims(), *exchange_claims(), *step_claims()]
