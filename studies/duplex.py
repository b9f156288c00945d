"""Duplex (arXiv 2409.01141): logic on the memory's logic die computes what reads much and computes little.

Question: what does a near-data unit in each H100's memory bring to serving MoE models, by which unit computes what?

Setting: Mixtral-47B on 4 devices, GLaM-143B on 8, Grok1-314B on two nodes of 8, 16 bits; requests in a closed loop,
so that a stage has b of them, and the prompts of those that begin as others end. Experts are chosen uniformly, as in
the paper. Every product and every attention is a roofline, of the H100 as its profile has it and of ideal near-data
units; collectives take their bytes over 450 GB/s (50 GB/s a device between nodes) and 2 us (assumed), a block its
eight launches. The paper's batches and lengths are not at hand: 32, 64 and 128; (256, 256), (1024, 1024) and (4096,
512).

Lever: GPU; twice as many; Bank-PIM and Duplex, whose units take MoE and attention of stages that decode only, and
attention of all; co-processing of experts (PE); experts cut over the devices of a node, not dealt to them (ET).

Expected before the first run: Duplex doubles Mixtral's rate at (256, 256) and b = 64, and Bank-PIM hardly helps
there, since an expert's 16 tokens are more FLOP for each byte than its units have. ET brings more than PE, which has
but two experts to share out without it. Energy is that of memory reads only, so savings come out larger than
published.

Cannot speak about: Poisson arrivals; migration of prompts between banks; dense models.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from moesim.files.hardware import load_device
from moesim.files.models import load_model
from moesim.hardware import Device
from moesim.policies.executor import look_up
from moesim.study import Claim

GPU = load_device("h100-sxm-80gb")
GPU_FLOPS = GPU.flops_per_s["bf16"] * GPU.efficiency["gemm"].value
GPU_BYTES = GPU.memory.bytes_per_s * GPU.efficiency["memory"].value
UNITS = {
    "Bank-PIM": load_device("duplex-bank-pim"), "BankGroup-PIM": load_device("duplex-bankgroup-pim"),
    "Duplex": load_device("duplex-logic-pim"),
}  # fmt: skip
NODE_BYTES_PER_S, NET_BYTES_PER_S, COLLECTIVE_S = 450e9, 50e9, 2e-6
LAYER_S = 8 * GPU.launch_s
"""Kernels of a block: four of attention, two of the router, two of experts."""
BATCHES, LENGTHS = (32, 64, 128), ((256, 256), (1024, 1024), (4096, 512))


@dataclass(frozen=True)
class Stack:
    """A model as a stack of blocks on devices of some nodes."""

    layers: int
    moe_layers: int
    hidden: int
    width: int
    query_width: int
    kv_width: int
    experts: int
    devices: int
    nodes: int
    matrices: int = 3
    k: int = 2

    @property
    def attention_params(self) -> float:
        """Projections of one block."""
        return 2.0 * self.hidden * (self.query_width + self.kv_width)

    @property
    def expert_params(self) -> float:
        """Of one."""
        return float(self.matrices * self.hidden * self.width)


def stacks() -> dict[str, Stack]:
    """As published; 143 billion parameters are two matrices to an expert of GLaM."""
    found = {}
    for name, devices, nodes in (("mixtral-8x7b", 4, 1), ("grok-1", 16, 2)):
        m = load_model(name)
        mixer = m.layers[0].mixer
        width, layers = m.experts.expert_widths[0], len(m.layers)
        query, kv = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
        found[name] = Stack(layers, layers, m.hidden_size, width, query, kv, 8, devices, nodes)
    found["glam-143b"] = Stack(32, 16, 4096, 16384, 4096, 4096, 64, 8, 1, matrices=2)
    return found


STACKS = stacks()


@dataclass(frozen=True)
class System:
    """unit: near-data unit of each device, "" for none. PE: experts are shared out; ET: experts are cut over a node."""

    unit: str = ""
    PE: bool = False
    ET: bool = False
    factor: int = 1


SYSTEMS = {
    "GPU": System(), "2x GPU": System(factor=2), "Bank-PIM": System("Bank-PIM"),
    "BankGroup-PIM": System("BankGroup-PIM"), "Duplex": System("Duplex"), "Duplex+PE": System("Duplex", True),
    "Duplex+PE+ET": System("Duplex", True, True),
}  # fmt: skip


def gpu_s(flops: NDArray[np.float64] | float, num_bytes: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Two lines."""
    return np.maximum(np.asarray(flops) / GPU_FLOPS, np.asarray(num_bytes) / GPU_BYTES)


def near_s(
    unit: Device, flops: NDArray[np.float64] | float, num_bytes: NDArray[np.float64] | float
) -> NDArray[np.float64]:
    """Two lines."""
    return np.maximum(np.asarray(flops) / unit.flops_per_s["bf16"], np.asarray(num_bytes) / unit.memory.bytes_per_s)


def moe_s(system: System, m: Stack, tokens: int, is_mixed: bool, rng: np.random.Generator) -> tuple[float, float]:
    """Experts of the slowest device of one block; joules of reading them on all devices."""
    devices = m.devices * system.factor
    per_node = devices // m.nodes
    chosen = rng.random((tokens, m.experts)).argpartition(m.k, axis=1)[:, : m.k]
    load_E = np.bincount(chosen.ravel(), minlength=m.experts)
    if system.ET:
        groups = np.arange(m.experts) * m.nodes // m.experts
        share, num_groups = 1.0 / per_node, m.nodes
    else:
        num_groups = min(devices, m.experts)
        groups = np.arange(m.experts) * num_groups // m.experts
        share = num_groups / devices
    slowest, joules = 0.0, 0.0
    for group in range(num_groups):
        load = np.sort(load_E[(groups == group) & (load_E > 0)])[::-1].astype(float)
        params = m.expert_params * share
        flops, num_bytes = 2 * params * load, np.full(len(load), 2 * params)
        on_gpu = gpu_s(flops, num_bytes)
        is_near = np.zeros(len(load), np.bool_)
        seconds = float(on_gpu.sum())
        if system.unit:
            unit = UNITS[system.unit]
            there = near_s(unit, flops, num_bytes)
            is_near = look_up(on_gpu, there) if system.PE else np.full(len(load), not is_mixed)
            seconds = max(float(on_gpu[~is_near].sum()), float(there[is_near].sum()))
            joules += 2 * m.expert_params * int(is_near.sum()) * unit.energy_j["byte"]
        joules += 2 * m.expert_params * int((~is_near).sum()) * GPU.energy_j["byte"]
        slowest = max(slowest, seconds)
    return slowest, joules


def stage(
    system: System, m: Stack, batch: int, prompt: int, answer: int, num_prompts: int, seed: int
) -> tuple[float, float]:
    """Seconds of one stage, and joules of its memory reads on all devices."""
    rng = np.random.default_rng(seed)
    devices = m.devices * system.factor
    tokens = batch + num_prompts * prompt
    unit = UNITS.get(system.unit)
    projections = float(gpu_s(2 * m.attention_params * tokens / devices, 2 * m.attention_params / devices))
    cached = batch * (prompt + answer / 2) * 2 * m.kv_width * 2 / devices
    scores = batch * (prompt + answer / 2) * 4 * m.query_width / devices
    decoding = float(near_s(unit, scores, cached) if unit else gpu_s(scores, cached))
    prefill = float(gpu_s(num_prompts * 2 * prompt**2 * m.query_width / devices, 0.0))
    attention = max(decoding, prefill) if system.PE else decoding + prefill
    moe, moe_j = moe_s(system, m, tokens, num_prompts > 0, rng)
    dense = float(gpu_s(2 * m.expert_params * tokens / devices, 2 * m.expert_params / devices))
    reduced = 2 * tokens * m.hidden * 2
    collective = (
        reduced / NODE_BYTES_PER_S + COLLECTIVE_S + (m.nodes - 1) * (reduced / 8 / NET_BYTES_PER_S + COLLECTIVE_S)
    )
    seconds = m.layers * (projections + attention + 2 * collective + LAYER_S)
    seconds += m.moe_layers * moe + (m.layers - m.moe_layers) * dense
    near_byte = unit.energy_j["byte"] if unit else GPU.energy_j["byte"]
    joules = m.layers * (2 * m.attention_params * GPU.energy_j["byte"] + cached * devices * near_byte)
    joules += m.moe_layers * moe_j + (m.layers - m.moe_layers) * 2 * m.expert_params * GPU.energy_j["byte"]
    return seconds, joules


@cache
def served(system: str, model: str, batch: int, prompt: int, answer: int) -> tuple[float, float]:
    """Generated tokens a second, and joules for each: stages of requests that begin as others end, at random."""
    rng = np.random.default_rng(0)
    begin = rng.binomial(batch, 1 / answer, 24)
    found = [stage(SYSTEMS[system], STACKS[model], batch, prompt, answer, int(n), seed) for seed, n in enumerate(begin)]
    seconds, joules = np.array(found).sum(axis=0)
    return batch * len(begin) / float(seconds), float(joules) / (batch * len(begin))


def gains(system: str, model: str | None = None, over: str = "GPU", part: int = 0) -> list[float]:
    """Of rates (part 0), or of joules (part 1), over another system, at all batches and lengths."""
    return [
        served(system, m, b, *lengths)[part] / served(over, m, b, *lengths)[part]
        for m in ([model] if model else STACKS)
        for b in BATCHES
        for lengths in LENGTHS
    ]


def saved(model: str) -> float:
    """Share of the joules that Duplex+PE+ET does not take, at best."""
    return 1 - min(gains("Duplex+PE+ET", model, part=1))


def utilisation(part: str) -> float:
    """Share of the GPU's peak in decoding Mixtral, b = 64, lengths of 256."""
    m = STACKS["mixtral-8x7b"]
    if part == "attention":
        flops, num_bytes = 4 * m.query_width, 2 * m.kv_width * 2
        return float(flops / GPU_FLOPS / gpu_s(flops, num_bytes))
    flops, num_bytes = 2 * m.expert_params * 16, 2 * m.expert_params
    return float(flops / GPU_FLOPS / gpu_s(flops, num_bytes))


def claims() -> list[Claim]:
    """Rates, energy, use of the GPU."""
    at = ("mixtral-8x7b", 64, 256, 256)
    mixtral = {system: served(system, *at)[0] / served("GPU", *at)[0] for system in SYSTEMS}
    whole = gains("Duplex+PE+ET")
    memory = "only memory reads are counted here; arithmetic, links and leakage, which stay, are in the published total"
    skewed = (
        "the slowest device's experts have a fifth more tokens than the mean, and units that compute at 16 tokens an "
    )
    skewed += (
        "expert take as much longer; dealt evenly it is 1.6, and a fifth of the stages have a prompt and gain nothing"
    )
    grid = "the batches and lengths that it is over are not at hand; ours is GLaM at its smallest batch, whose few "
    grid += "tokens an expert suit the units best"
    found = [
        Claim("Duplex over GPU, Mixtral (256, 256), b = 64", "figure 11", 2.05, mixtral["Duplex"], "ratio", 0.2,
              because=skewed),
        Claim("Bank-PIM over GPU, Mixtral (256, 256), b = 64", "figure 11", 1.18, mixtral["Bank-PIM"], "ratio", 0.2),
        Claim("Duplex over GPU, maximum", "figure 11", 2.51, max(gains("Duplex")), "ratio", 0.2, because=grid),
        Claim("Duplex+PE over Duplex, mean", "figure 11", 1.04, float(np.mean(gains("Duplex+PE", over="Duplex"))),
              "ratio", 0.2),
        Claim("Duplex+PE+ET over Duplex, maximum", "figure 11", 1.36, max(gains("Duplex+PE+ET", over="Duplex")),
              "ratio",
              0.2, because=grid),
        Claim("Duplex+PE+ET over GPU, maximum", "figure 11", 2.67, max(whole), "ratio", 0.2, because=grid),
        Claim("Duplex+PE+ET over GPU, mean", "abstract", 2.07, float(np.mean(whole)), "ratio", 0.2, because=grid),
        Claim("use of the GPU by attention in decoding", "figure 4", 0.0206, utilisation("attention"), "fraction", 0.2),
        Claim("use of the GPU by MoE in decoding", "figure 4", "< 0.11", utilisation("MoE"), "fraction"),
    ]  # fmt: skip
    for model, paper in (("mixtral-8x7b", 0.3328), ("glam-143b", 0.4203), ("grok-1", 0.3459)):
        found.append(
            Claim(
                f"energy saved, {model}",
                "figure 14",
                paper,
                saved(model),
                "fraction",
                0.2,
                because="" if model == "glam-143b" else memory,
            )
        )
    mean = float(np.mean([1 - x for x in gains("Duplex+PE+ET", part=1)]))
    found.append(Claim("energy saved, mean", "abstract", 0.2819, mean, "fraction", 0.2, because=memory))
    found += [
        Claim(f"{system} over GPU, Mixtral (256, 256), b = 64", "figure 11", None, mixtral[system], "ratio")
        for system in ("2x GPU", "BankGroup-PIM", "Duplex+PE", "Duplex+PE+ET")
    ]
    return found
