"""Prices of serving iterations: against the program of a forward iteration, hand-made examples, and laws."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import small_cluster

from moesim.costs.operators import Operators
from moesim.layout import AttentionGrid, ExpertGrid, Layout
from moesim.mixers import Attention, LatentAttention
from moesim.model import Dense, Experts, Layer, ModelSpec
from moesim.policies.placement import Contiguous
from moesim.program.batch import Batch, Members
from moesim.program.exchange import Exchange
from moesim.program.forward import Forward
from moesim.program.walk import account, walk
from moesim.routing.counting import Counter
from moesim.routing.synthetic import zipf_trace
from moesim.service import EngineConfig
from moesim.serving.pricing import build_prices
from moesim.serving.scratch import empty_scratch
from moesim.serving.step import price_step
from moesim.serving.work import PARTS, empty_work

GQA = Attention(8, 4, 16)
WINDOWED = Attention(8, 4, 16, window=24)
MLA = LatentAttention(8, 48, 32, 16, 8, 16)
PART_OF = {"reduce_scatter": "allreduce", "all_gather": "allreduce"}


def tiny_model(mixers=(GQA,), shared=64, layers=4, dense_first=True) -> ModelSpec:
    routed = Experts((64,) * 16, 3, shared_width=shared)
    stack = tuple(
        Layer(mixers[i % len(mixers)], Dense(256) if dense_first and i == 0 else routed) for i in range(layers)
    )
    return ModelSpec("tiny", 128, 1000, stack)


def trace_of(model, tokens=400, seed=0):
    ffn = model.experts
    return zipf_trace(
        len(model.moe_layers), ffn.num_experts, ffn.top_k, num_requests=8, prompt_tokens=tokens // 16,
        output_tokens=tokens // 16, seed=seed,
    )  # fmt: skip


class Tiny:
    """An instance on a small machine, priced both ways."""

    def __init__(
        self, model, dp=1, tp=1, ep=True, backend="allgather_reducescatter", nodes=1, per_node=4, pp=1, drafts=0,
        slowdown_R=None, operators=None, seed=0, **engine,
    ):  # fmt: skip
        self.model, self.cluster = model, small_cluster(nodes, per_node)
        experts = ExpertGrid(ep=dp * tp) if ep else ExpertGrid(edp=dp, etp=tp)
        self.layout = Layout(AttentionGrid(dp, tp), experts, pp=pp)
        self.engine = EngineConfig(
            tp, pp, dp, ep, backend, num_speculative_tokens=drafts, max_num_batched_tokens=2048, max_model_len=4096,
            **engine,
        )  # fmt: skip
        self.trace, self.drafts, self.slowdown_R = trace_of(model, seed=seed), drafts, slowdown_R
        self.operators = operators or Operators(self.cluster.device)
        self.prices = build_prices(
            model, self.cluster, self.layout, self.engine, self.trace, self.operators, slowdown_R=slowdown_R
        )
        self.scratch = empty_scratch(self.prices, dp, 4096)

    def work(self):
        slots = self.prices.slots_per_rank * self.layout.experts.ep
        return empty_work(
            self.layout.attention.dp, len(self.prices.window_V), 256, 4096, len(self.model.moe_layers), slots
        )

    def decode(self, contexts_D):
        """A batch of decoding requests with such contexts in each group: seconds, and the work."""
        work, queries, rows, groups = self.work(), 1 + self.drafts, [], []
        for group, contexts in enumerate(contexts_D):
            fill_decodes(self.prices, work, group, np.array(contexts), queries)
            rows.append((np.arange(len(contexts) * queries) * 7 + 31 * group) % self.trace.num_tokens)
            groups += [group] * len(rows[-1])
        set_rows(work, np.concatenate(rows), groups)
        return price_step(self.prices, work, self.scratch), work

    def prefill(self, prompts_D, before=0):
        work, rows, groups, chunk = self.work(), [], [], 0
        for group, prompts in enumerate(prompts_D):
            work.tokens_D[group], work.heads_D[group] = sum(prompts), len(prompts)
            for prompt in prompts:
                work.chunk_tokens_C[chunk], work.chunk_group_C[chunk] = prompt, group
                work.chunk_context_C[chunk] = before
                chunk += 1
            rows.append((np.arange(sum(prompts)) * 5 + 17 * group) % self.trace.num_tokens)
            groups += [group] * sum(prompts)
        work.num[0] = chunk
        set_rows(work, np.concatenate(rows), groups)
        return price_step(self.prices, work, self.scratch), work

    def batch(self, phase, lengths_D, work):
        lengths = np.concatenate([np.array(lengths, np.int64) for lengths in lengths_D])
        group_Q = np.repeat(np.arange(len(lengths_D)), [len(lengths) for lengths in lengths_D])
        num = work.num[1]
        members = Members(
            np.arange(len(lengths)), lengths, group_Q, work.group_B[:num].astype(np.int64), len(lengths_D)
        )
        return Batch(phase, members, work.rows_B[:num], 1 + self.drafts if phase == "decode" else 1)

    def forward(self, phase, lengths_D, work, algorithm="flat", message="rank"):
        """The same batch by the program: seconds, seconds of the parts, and its counts."""
        layout, is_spread = self.layout, self.layout.experts.ep > 1
        batch = self.batch(phase, lengths_D, work)
        num_ranks, ffn = layout.attention.num_ranks if is_spread else layout.attention.dp, self.model.experts
        placement = Contiguous().place(
            ffn.num_experts, layout.experts.ep, 4, np.zeros((len(self.model.moe_layers), ffn.num_experts))
        )
        node_R = (np.arange(num_ranks) // self.cluster.devices_per_node).astype(np.int32)
        counter = Counter(placement, ffn.num_experts, num_ranks, node_R, message)
        source_B = batch.members.group_B.astype(np.int32)
        dealt = layout.attention.tp if is_spread else 1
        source_B = (source_B * dealt + np.arange(source_B.size) % dealt).astype(np.int32)
        counts = counter.count(self.trace.expert_ids_TLK, batch.rows_B, source_B)
        params = ffn.expert_params(self.model.hidden_size, 64) / layout.experts.etp
        program = Forward(
            self.model, self.cluster, layout, np.full(counts.load_LRS.shape, params),
            operators=lambda bound: self.operators, exchange=Exchange(self.cluster, algorithm),
            num_drafts=self.drafts, slowdown_R=self.slowdown_R,
        )  # fmt: skip
        played = walk(program.program, program.price([(batch, counts)]))
        exposed_XR, idle_R = account(played)
        parts = dict.fromkeys(PARTS, 0.0)
        for name, exposed_R in zip(played.parts, exposed_XR, strict=True):
            parts[PART_OF.get(name, name)] += exposed_R.mean()
        parts["imbalance"] += idle_R.mean()
        return played.seconds, np.array(list(parts.values())), counts


def fill_decodes(prices, work, group, contexts, queries):
    work.tokens_D[group] += len(contexts) * queries
    work.heads_D[group] += len(contexts) * queries
    work.decodes_D[group] += len(contexts)
    for mixer, window in enumerate(prices.window_V):
        work.kept_VD[mixer, group] += np.minimum(contexts, window).sum()


def set_rows(work, rows, groups):
    work.num[1] = len(rows)
    work.rows_B[: len(rows)], work.group_B[: len(rows)] = rows, groups


LAYOUTS = {
    "one device": ({}, {}),
    "dp + ep, by rank": (
        {"dp": 4, "backend": "deepep_high_throughput"}, {"algorithm": "rails", "message": "rank"},
    ),
    "dp + ep, by choice, two nodes": (
        {"dp": 4, "backend": "deepep_low_latency", "nodes": 2, "per_node": 2},
        {"algorithm": "low_latency", "message": "choice"},
    ),
    "dp + ep, by node": (
        {"dp": 4, "backend": "deepep_high_throughput", "nodes": 2, "per_node": 2},
        {"algorithm": "rails", "message": "node"},
    ),
    "dp without ep": ({"dp": 2, "ep": False}, {}),
    "tp": ({"tp": 4, "ep": False}, {}),
    "dp + tp": ({"dp": 2, "tp": 2, "ep": False}, {}),
    "dp + tp + ep": (
        {"dp": 2, "tp": 2, "backend": "deepep_low_latency"}, {"algorithm": "low_latency", "message": "choice"},
    ),
    "tp + ep": ({"tp": 4, "backend": "deepep_high_throughput"}, {"algorithm": "rails", "message": "rank"}),
    "a slow rank": (
        {"dp": 4, "backend": "deepep_low_latency", "slowdown_R": np.array([1.0, 1.0, 3.0, 1.0])},
        {"algorithm": "low_latency", "message": "choice"},
    ),
    "drafts": (
        {"dp": 4, "backend": "deepep_low_latency", "drafts": 2}, {"algorithm": "low_latency", "message": "choice"},
    ),
}  # fmt: skip
MODELS = {
    "gqa": tiny_model(), "mla": tiny_model((MLA,)), "windows": tiny_model((GQA, WINDOWED), shared=0),
    "no dense": tiny_model(dense_first=False),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_the_forward_program_walked(layout, model):
    given, exchange = LAYOUTS[layout]
    tiny = Tiny(MODELS[model], **given)
    groups = tiny.layout.attention.dp
    contexts_D = [np.full(20 - 3 * g, 40.0).astype(int) for g in range(groups)]
    prompts_D = [[40 + 7 * g] for g in range(groups)]
    for phase, lengths_D, (seconds, work) in (
        ("decode", contexts_D, tiny.decode(contexts_D)),
        ("prefill", prompts_D, tiny.prefill(prompts_D)),
    ):
        expected_s, expected_P, counts = tiny.forward(phase, lengths_D, work, **exchange)
        assert seconds == pytest.approx(expected_s, rel=1e-9)
        np.testing.assert_allclose(work.parts_P, expected_P, rtol=1e-9, atol=1e-15)
        assert work.parts_P.sum() == pytest.approx(seconds, rel=1e-12)
        load_LP = counts.load_LRS.reshape(len(counts.load_LRS), -1, work.load_LP.shape[1]).sum(axis=1)
        np.testing.assert_array_equal(work.load_LP, load_LP)
