"""Prices of serving iterations: against the program of a forward iteration, hand-made examples, and laws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import small_cluster
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.costs.measured import MeasuredTable, MeasuredTables
from moesim.costs.operators import Operators
from moesim.costs.work import work as work_of
from moesim.hardware import SOURCES
from moesim.layout import AttentionGrid, ExpertGrid, Layout
from moesim.mixers import Attention, LatentAttention
from moesim.model import Dense, Experts, Layer, ModelSpec
from moesim.policies.placement import Contiguous, Eplb
from moesim.program.batch import Batch, Members
from moesim.program.exchange import Exchange
from moesim.program.forward import Forward
from moesim.program.pipeline import Pipeline
from moesim.program.walk import account, walk
from moesim.routing.counting import Counter
from moesim.routing.synthetic import zipf_trace
from moesim.service import EngineConfig
from moesim.serving.grids import _causal
from moesim.serving.memo import memoised
from moesim.serving.pricing import build_prices, replaced
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


def test_stages_of_a_pipeline_add_up_and_send():
    one, two = Tiny(MODELS["gqa"], dp=2, tp=2, ep=False), Tiny(MODELS["gqa"], dp=2, tp=2, ep=False, pp=2)
    contexts_D = [[40] * 8, [40] * 8]
    (one_s, _), (two_s, work) = one.decode(contexts_D), two.decode(contexts_D)
    sent = work.parts_P[PARTS.index("send")]
    assert sent == pytest.approx(two.prices.token_s_ON[-2, 8]) and sent > 0
    assert two.scratch.stage_s_S.sum() == pytest.approx(two_s, rel=1e-12)
    assert two_s - sent >= one_s * (1 - 1e-12)  # ranks meet once more
    assert (two.scratch.stage_s_S > 0.2 * two_s).all()


def test_equal_stages_take_turns_as_on_the_belt():
    model = tiny_model(dense_first=False)
    tiny = Tiny(model, dp=2, tp=2, ep=False, pp=2)
    lengths_D = [[40] * 8, [40] * 8]
    _, work = tiny.decode(lengths_D)
    batch = tiny.batch("decode", lengths_D, work)
    shape = (4, 2, 16)
    params = model.experts.expert_params(128, 64) / 2
    stage = Forward(model, tiny.cluster, tiny.layout, np.full(shape, params))
    belt, load_LRS = Pipeline(stage, 2), work.load_LP.reshape(4, 1, 16)
    assert load_LRS.sum() == 4 * 3 * 16
    both = Counter(Contiguous().place(16, 1, 4, np.zeros((4, 16))), 16, 2, np.zeros(2, np.int32)).count(
        tiny.trace.expert_ids_TLK, batch.rows_B, batch.members.group_B.astype(np.int32)
    )
    played = walk(belt.program, belt.price([(batch, both), (batch, both)]))
    first, last = tiny.scratch.stage_s_S
    send = work.parts_P[PARTS.index("send")]
    assert max(first, last + send) <= played.seconds / 2 * (1 + 1e-12)
    assert played.seconds <= 2 * (max(first, last) + send) * (1 + 1e-9)


def test_gathered_tokens_go_to_all_and_their_results_come_back():
    tiny = Tiny(MODELS["gqa"], dp=4, nodes=2, per_node=2)
    seconds, work = tiny.decode([[40] * 6, [40] * 2, [40] * 3, [40] * 5])
    # Of 16 tokens a rank lacks all but its own; half of the other node's come to each of a node's two ranks.
    near_R, far_R = np.array([10, 14, 13, 11]), np.array([4, 4, 4, 4])
    start_s = tiny.operators.collective_start(4, tiny.cluster).seconds
    for part, width in (("dispatch", 128 + 16), ("combine", 128)):
        moved_s = 2.0 * width * np.maximum(near_R / (1e10 * 0.5), far_R / (1e9 * 0.5))
        assert work.parts_P[PARTS.index(part)] == pytest.approx(3 * (start_s + moved_s.mean()), rel=1e-12)
    _, parts, _ = tiny.forward("decode", [[40] * n for n in (6, 2, 3, 5)], work)
    for part in ("experts", "attention", "router", "dense", "head"):
        assert work.parts_P[PARTS.index(part)] == pytest.approx(parts[PARTS.index(part)], rel=1e-9)
    assert work.parts_P.sum() == pytest.approx(seconds, rel=1e-12)


def test_added_results_cost_two_all_reduces_a_layer_and_every_rank_has_all_tokens():
    tiny = Tiny(MODELS["gqa"], tp=4)
    seconds, work = tiny.decode([[40] * 8])
    ops, ids, parts = tiny.operators, tiny.trace.expert_ids_TLK, dict(zip(PARTS, work.parts_P, strict=True))
    assert parts["dispatch"] == parts["combine"] == 0
    one = ops.collective(2 * 8 * 128 * 2 * 3 / 4 / (1e10 * 0.5)) + ops.collective_start(4, tiny.cluster, 2)
    assert parts["allreduce"] == pytest.approx(4 * 2 * float(one.seconds), rel=1e-12)
    load_LE = np.stack([np.bincount(ids[work.rows_B[:8], layer].ravel(), minlength=16) for layer in range(3)])
    np.testing.assert_array_equal(work.load_LP, load_LE)
    ffn = tiny.model.experts
    experts_s_LR = ops.experts(
        load_LE.reshape(3, 4, 4).astype(np.int32), np.full((3, 4, 4), ffn.expert_params(128, 64)), ffn, 128, "bf16"
    ).seconds
    assert parts["experts"] == pytest.approx(experts_s_LR.mean(axis=1).sum(), rel=1e-12)
    assert parts["imbalance"] == pytest.approx((experts_s_LR.max(axis=1) - experts_s_LR.mean(axis=1)).sum(), rel=1e-9)
    router = ops.matmuls(((16, 128),), np.array(8.0), "bf16", 2.0) + ops.launches(2.0)
    assert parts["router"] == pytest.approx(3 * float(router.seconds), rel=1e-12)
    assert sum(parts.values()) == pytest.approx(seconds, rel=1e-12)
    assert work.imbalance[0] == pytest.approx(
        np.mean([sums.max() / sums.mean() for sums in load_LE.reshape(3, 4, 4).sum(axis=2)])
    )


def test_a_group_without_tokens_keeps_pace_with_a_dummy():
    tiny = Tiny(MODELS["gqa"], dp=2, backend="deepep_low_latency")
    nothing, work = tiny.decode([[], []])
    assert nothing == 0 and not work.parts_P.any()
    alone, work = tiny.decode([[40] * 8, []])
    both, _ = tiny.decode([[40] * 8, [40]])
    assert work.load_LP.sum() == 8 * 3 * 3  # the dummy is not routed
    assert 0 < alone <= both
    mean_s = tiny.prices.token_s_ON[0, [8, 1]].mean() * 4  # projections of four layers, one of the two groups' for one
    core_s = work.parts_P[PARTS.index("attention")] - mean_s
    assert core_s == pytest.approx(float(tiny.prices.decode_s_VAC[0, 7, 0] * 40 * 4 / 2), rel=1e-9)


def test_few_rows_stand_for_many_tokens():
    tiny = Tiny(MODELS["gqa"], dp=2, backend="deepep_low_latency")
    work, few = tiny.work(), tiny.work()
    for some, times in ((work, 4), (few, 1)):
        some.tokens_D[:], some.heads_D[:] = 64, 1
        some.num[0], some.chunk_tokens_C[:2], some.chunk_group_C[:2] = 2, 64, [0, 1]
        set_rows(some, np.tile(np.arange(32), times), np.tile(np.repeat([0, 1], 16), times))
    many_s, few_s = (price_step(tiny.prices, some, tiny.scratch) for some in (work, few))
    assert few_s == pytest.approx(many_s, rel=1e-12)
    np.testing.assert_array_equal(few.load_LP, work.load_LP)
    np.testing.assert_allclose(few.parts_P, work.parts_P, rtol=1e-12)


@pytest.fixture(scope="module")
def pair():
    """An instance, and one of the same with a slow rank."""
    kinds = {"dp": 2, "tp": 2, "backend": "deepep_low_latency"}
    return Tiny(MODELS["windows"], **kinds), Tiny(MODELS["windows"], **kinds, slowdown_R=np.array([1.0, 1.5, 1.0, 1.0]))


contexts = st.lists(st.integers(1, 3000), min_size=0, max_size=40)


@settings(max_examples=40, deadline=None)
@given(contexts, contexts, st.lists(st.integers(1, 500), min_size=0, max_size=3), st.integers(0, 3000))
def test_more_never_costs_less(pair, first, second, prompts, before):
    tiny, slower = pair
    mixed, decodes, chunks = tiny.work(), tiny.work(), tiny.work()
    rows = {id(work): ([], []) for work in (mixed, decodes, chunks)}
    second = second + [1] * ((len(first) + len(second)) % 2)  # the tokens of prompts stay on their ranks
    for group, some in enumerate((first, second)):
        for work in (mixed, decodes):
            fill_decodes(tiny.prices, work, group, np.array(some, np.int64), 1)
            rows[id(work)][0].extend(range(group, group + len(some)))
            rows[id(work)][1].extend([group] * len(some))
    for work in (mixed, chunks):
        for prompt in prompts:
            work.chunk_tokens_C[work.num[0]], work.chunk_context_C[work.num[0]] = prompt, before
            work.num[0] += 1
            work.tokens_D[0] += prompt
            work.heads_D[0] += 1
            rows[id(work)][0].extend(np.arange(prompt) % tiny.trace.num_tokens)
            rows[id(work)][1].extend([0] * prompt)
    for work in (mixed, decodes, chunks):
        set_rows(work, *rows[id(work)])
    mixed_s, decodes_s, chunks_s = (price_step(tiny.prices, work, tiny.scratch) for work in (mixed, decodes, chunks))
    assert mixed.parts_P.sum() == pytest.approx(mixed_s, rel=1e-9, abs=1e-15)
    assert (mixed.parts_P >= -1e-15).all()
    assert mixed_s >= max(decodes_s, chunks_s) * (1 - 1e-12)
    assert price_step(slower.prices, mixed, slower.scratch) >= mixed_s * (1 - 1e-12)


def measured(tables_seed=0) -> Operators:
    """A device whose kernels were measured on a grid that is coarser than the prices'."""
    rng = np.random.default_rng(tables_seed)

    def table(op, **sides):
        grid = np.stack(np.meshgrid(*sides.values(), indexing="ij"), axis=-1).reshape(-1, len(sides)).astype(float)
        flops, num_bytes = work_of(op, "bf16", dict(zip(sides, grid.T, strict=True)))
        seconds = (1e-6 + np.maximum(flops / 5e12, num_bytes / 5e10)) * rng.normal(1, 0.02, len(grid))
        return MeasuredTable(op, "bf16", "gpu", tuple(sides), grid, seconds)

    powers, heads = (
        2.0 ** np.arange(13),
        {"num_heads": (2.0, 8.0), "num_kv_heads": (1.0, 4.0), "head_dim": (16.0, 32.0)},
    )
    tables = [
        table("gemm", m=powers, n=2.0 ** np.arange(4, 12), k=2.0 ** np.arange(4, 12)),
        table("grouped_gemm", num_experts=(1.0, 4.0, 16.0), m=powers, n=(32.0, 64.0, 128.0), k=(32.0, 64.0, 128.0)),
        table("generation_attention", batch_size=powers[:9], kv_len=powers, **heads),
        table("context_attention", batch_size=powers[:5], seq_len=powers, **heads),
    ]
    return Operators(small_cluster().device, "value", MeasuredTables(tables))


@pytest.mark.parametrize("layout", ["dp + ep, by rank", "dp + tp", "tp + ep"])
def test_between_the_points_of_a_grid_prices_are_those_of_measured_tables(layout):
    given_, exchange = LAYOUTS[layout]
    tiny = Tiny(MODELS["gqa"], **given_, operators=measured())
    groups, rng = tiny.layout.attention.dp, np.random.default_rng(1)
    for _ in range(5):
        contexts_D = [rng.integers(1, 2000, rng.integers(1, 200)) for _ in range(groups)]
        prompts_D = [[int(rng.integers(1, 1000))] for _ in range(groups)]
        for phase, lengths_D, (seconds, work) in (
            ("decode", contexts_D, tiny.decode(contexts_D)),
            ("prefill", prompts_D, tiny.prefill(prompts_D)),
        ):
            expected_s, expected_P, _ = tiny.forward(phase, lengths_D, work, **exchange)
            assert seconds == pytest.approx(expected_s, rel=0.01)
            np.testing.assert_allclose(work.parts_P[:-1], expected_P[:-1], rtol=0.02, atol=1e-3 * expected_s)
    shares = dict(zip(PARTS, tiny.prices.shares_PX, strict=True))
    assert shares["experts"][SOURCES.index("measured")] > 0.5
    assert shares["attention"][SOURCES.index("datasheet")] + shares["attention"][SOURCES.index("assumed")] > 0
    for part, share_X in shares.items():
        is_there = work.parts_P[PARTS.index(part)] > 0 and part != "imbalance"
        assert share_X.sum() == pytest.approx(1) or (not is_there and not share_X.any()), part


@pytest.mark.parametrize("before", [0, 1, 7, 100, 999])
def test_a_prompt_in_chunks_has_as_many_pairs_as_whole(before):
    whole = _causal(np.array(1000.0), np.inf) - 0
    rest = _causal(np.array(1000.0), np.inf) - _causal(np.array(float(before)), np.inf)
    assert rest + sum(range(before + 1)) == whole
    seen = sum(min(i, 24) for i in range(before + 1, 1001))
    assert _causal(np.array(1000.0), 24.0) - _causal(np.array(float(before)), 24.0) == seen


def test_the_same_experts_placed_anew():
    tiny = Tiny(MODELS["gqa"], dp=4, backend="deepep_low_latency")
    load_LE = np.random.default_rng(0).zipf(1.5, (3, 16)).astype(float)
    placement = Eplb().place(20, 4, 4, load_LE)
    layout = replace(tiny.layout, num_redundant_experts=4)
    moved = replaced(tiny.prices, placement, tiny.model, layout)
    built = build_prices(tiny.model, tiny.cluster, layout, tiny.engine, tiny.trace, tiny.operators, placement=placement)
    for name, new, other in zip(moved._fields, moved, built, strict=True):
        if name != "memo":
            np.testing.assert_array_equal(new, other, err_msg=name)


@pytest.mark.parametrize(
    "kinds",
    [
        {"dp": 4, "backend": "deepep_low_latency"}, {"dp": 4, "nodes": 2, "per_node": 2}, {"tp": 4},
        {"dp": 2, "tp": 2, "ep": False}, {"dp": 2, "tp": 2, "ep": False, "pp": 2},
        {"dp": 4, "backend": "deepep_low_latency", "drafts": 1},
        {"dp": 4, "backend": "deepep_low_latency", "slowdown_R": np.array([1.0, 2.0, 1.0, 1.0])},
    ],
)  # fmt: skip
def test_routing_that_is_looked_up_costs_what_counted_routing_costs(kinds):
    tiny = Tiny(MODELS["gqa"], **kinds)
    memo = memoised(tiny.prices, np.random.default_rng(0), 4096, samples=8)
    scratch, rng, groups = (
        empty_scratch(memo, tiny.layout.attention.dp, 4096),
        np.random.default_rng(1),
        tiny.layout.attention.dp,
    )
    counted_s, looked_up_s, counted_P, looked_up_P = 0.0, 0.0, 0.0, 0.0
    for _ in range(40):
        contexts_D = [rng.integers(1, 2000, 40) for _ in range(groups)]
        _, work = tiny.decode(contexts_D)
        work.rows_B[: work.num[1]] = rng.integers(0, tiny.trace.num_tokens, work.num[1])
        work.parts_P[:] = 0
        counted_s += price_step(tiny.prices, work, tiny.scratch)
        counted_P = counted_P + work.parts_P
        work.parts_P[:] = 0
        looked_up_s += price_step(memo, work, scratch)
        looked_up_P = looked_up_P + work.parts_P
        assert scratch.stage_s_S.sum() == pytest.approx(work.parts_P.sum(), rel=1e-12)
    assert looked_up_s == pytest.approx(counted_s, rel=0.03)
    np.testing.assert_allclose(looked_up_P, counted_P, rtol=0.05, atol=0.02 * counted_s)


def test_what_is_looked_up_adds_its_load_now_and_then():
    tiny = Tiny(MODELS["gqa"], dp=4, backend="deepep_low_latency")
    memo = memoised(tiny.prices, np.random.default_rng(0), 4096)
    scratch, work = empty_scratch(memo, 4, 4096), tiny.work()
    for group in range(4):
        fill_decodes(memo, work, group, np.full(40, 100), 1)
    for _ in range(32):
        price_step(memo, work, scratch)
    np.testing.assert_allclose(work.load_LP.sum(axis=1), 32 * 160 * 3, rtol=0.01)
    assert work.imbalance[1] == 32 and work.imbalance[0] >= 32


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({"dp": 2, "tp": 2, "backend": "none"}, "data_parallel_size = 2"),
        ({"dp": 2, "backend": "deepep"}, "unknown 'deepep'"),
    ],
)
def test_a_backend_that_cannot_be_says_so(given_, says):
    with pytest.raises(ValueError, match=says):
        Tiny(MODELS["gqa"], **given_)
