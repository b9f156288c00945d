"""Prices of an instance from a model, a machine, a layout and what is measured of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.costs.operators import Operators, Timed
from moesim.hardware import SOURCES, Cluster
from moesim.layout import Layout, Placement
from moesim.mixers import Mixer
from moesim.model import Dense, Experts, Layer, ModelSpec
from moesim.policies.placement import Contiguous, Eplb
from moesim.program.forward import drafting_layer
from moesim.routing.counting import Counter
from moesim.routing.load import expert_load_LE
from moesim.routing.trace import RoutingTrace
from moesim.service import EngineConfig
from moesim.serving.exchanges import exchange_of, exchange_prices
from moesim.serving.grids import OneRank, points
from moesim.serving.prices import ADDED, DRAFT_HEAD, HEAD, NO_EXCHANGE, NO_HEAD, Prices, no_memo
from moesim.serving.slots import experts_prices, experts_timed
from moesim.serving.work import PARTS

Floats = NDArray[np.float64]


def build_prices(
    model: ModelSpec,
    cluster: Cluster,
    layout: Layout,
    engine: EngineConfig,
    trace: RoutingTrace | None,
    operators: Operators,
    placement: Placement | None = None,
    slowdown_R: Floats | None = None,
) -> Prices:
    """Price all that tokens and contexts alone decide, and lay out what compiled counting needs.

    Args:
        cluster: of which an instance gets the first devices of its own nodes.
        layout: of one instance, without context parallelism; experts over all ranks of a stage, or over none.
        trace: whose tokens are routed; may lack for a dense model.
        operators: of the device, with a bound.
        placement: of experts; as the engine begins, if None.
        slowdown_R: factor on the computation of each rank of a stage.

    Raises:
        ValueError: the layout is one of those that no instance has, or the backend does not fit it.
    """
    D, tp, ep = layout.attention.dp, layout.attention.tp, layout.experts.ep
    if layout.attention.cp > 1 or layout.num_shared_expert_ranks or ep not in (1, D * tp):
        raise ValueError(
            f"an instance has no context parallelism and no ranks of shared experts, and its experts lie over all "
            f"{D * tp} ranks or over none; given {layout}"
        )
    exchange, algorithm = exchange_of(engine.all2all_backend, layout, cluster)
    is_spread = exchange not in (NO_EXCHANGE, ADDED)
    layers = (*model.layers, *(drafting_layer(model),) * engine.num_speculative_tokens)
    rank = OneRank(model, cluster, operators, tp, is_spread, D * tp)
    most_tokens = max(engine.max_num_batched_tokens, engine.max_num_seqs * (1 + engine.num_speculative_tokens))
    by_tokens, token_parts = _by_tokens(rank, model, layers, layout.pp, most_tokens)
    by_context, attention = _by_context(rank, model, layers, engine, most_tokens)
    host = operators.host_overhead()
    prices = Prices(
        tp=tp,
        has_shared=bool(model.moe_layers and (model.experts.shared_width or model.experts.residual_width)),
        num_drafts=engine.num_speculative_tokens,
        host_s=float(host.seconds),
        slowdown_R=np.ones(D * tp) if slowdown_R is None else np.ascontiguousarray(slowdown_R, np.float64),
        exchange=exchange,
        exchange_s=exchange_prices(model, cluster, layout, exchange, algorithm, operators),
        shares_PX=np.zeros((len(PARTS), len(SOURCES))),
        memo=no_memo(),
        **_order(model, layers, layout.pp),
        **by_tokens,
        **by_context,
        **_routing(model, cluster, layout, exchange, trace),
        **experts_prices(model, operators, layout, most_tokens * D),
    )
    moved = operators.collective(1.0 if is_spread else 0.0)
    parts = {
        **token_parts, "attention": [*token_parts["attention"], *attention], "dispatch": [moved], "combine": [moved],
        "experts": [experts_timed(model, operators, layout)], "host": [host],
    }  # fmt: skip
    for part in set(parts) & set(PARTS):
        shares_X = np.sum([timed.shares_X for timed in parts[part]], axis=0)
        prices.shares_PX[PARTS.index(part)] = shares_X / (shares_X.sum() or 1.0)
    if not model.moe_layers:
        return prices
    return replaced(prices, placement or first_placement(model, cluster, engine, trace), model, layout)


def _kinds(layers: Sequence[Layer]) -> tuple[tuple[Mixer, ...], tuple[Dense, ...]]:
    """Mixers and dense networks, each once."""
    mixers = tuple(dict.fromkeys(layer.mixer for layer in layers if layer.mixer))
    return mixers, tuple(dict.fromkeys(layer.ffn for layer in layers if isinstance(layer.ffn, Dense)))


def _order(model: ModelSpec, layers: Sequence[Layer], pp: int) -> dict[str, Any]:
    """What each layer is; drafting layers stand behind the model's own, and route as its last MoE layer."""
    mixers, denses = _kinds(layers)
    num_own, is_moe = len(model.layers), np.array([isinstance(layer.ffn, Experts) for layer in layers])
    edges = [s * num_own // pp for s in range(pp + 1)]
    stage_L = [stage for stage, (first, last) in enumerate(pairwise(edges)) for _ in range(first, last)]
    moe_L = np.minimum(np.cumsum(is_moe) - 1, len(model.moe_layers) - 1)
    return {
        "mixer_L": _ids([mixers.index(layer.mixer) if layer.mixer else -1 for layer in layers]),
        "dense_L": _ids([denses.index(layer.ffn) if isinstance(layer.ffn, Dense) else -1 for layer in layers]),
        "moe_L": np.where(is_moe, moe_L, -1).astype(np.int64),
        "head_L": _ids([NO_HEAD] * (num_own - 1) + [HEAD] + [DRAFT_HEAD] * (len(layers) - num_own)),
        "stage_L": _ids(stage_L + [pp - 1] * (len(layers) - num_own)),
        "window_V": np.array([np.inf if mixer.window is None else mixer.window for mixer in mixers]),
    }


Parts = dict[str, list[Timed]]


def _by_tokens(
    rank: OneRank, model: ModelSpec, layers: Sequence[Layer], pp: int, most_tokens: int
) -> tuple[dict[str, Any], Parts]:
    """Tables by a group's tokens, and what the parts rest on; rows in the order that `Prices` says."""
    mixers, denses = _kinds(layers)
    grid_N = points(0, 512, max(most_tokens, 1024), 1.05)
    nothing = Timed.of(np.zeros_like(grid_N), 0)
    by_op: Parts = {
        "attention": [rank.projections(mixer, grid_N) for mixer in mixers],
        "dense": [rank.dense(ffn, grid_N) for ffn in denses],
        "allreduce": [rank.reduced(grid_N, 2)],
        "half": [rank.reduced(grid_N, 1)],
        "router": [rank.router(grid_N) if model.moe_layers else nothing],
        "shared_experts": [rank.shared_experts(grid_N) if model.moe_layers else nothing],
        "send": [rank.sent(grid_N) if pp > 1 else nothing],
        "joined": [rank.joined(grid_N)],
    }
    head = rank.head(grid_N)
    tables = {
        "grid_N": grid_N,
        "unit_points": int(np.argmax(np.diff(grid_N, append=np.inf) > 1)) + 1,
        "token_s_ON": np.stack([timed.seconds for some in by_op.values() for timed in some]),
        "head_s_N": head.seconds,
    }
    return tables, by_op | {"head": [head]}


def _by_context(
    rank: OneRank, model: ModelSpec, layers: Sequence[Layer], engine: EngineConfig, most_tokens: int
) -> tuple[dict[str, Any], list[Timed]]:
    """Tables of attention by requests and contexts."""
    mixers, _ = _kinds(layers)
    longest = float(engine.max_model_len or max(model.max_position or 0, 131072))
    requests_A, context_C = points(1, 32, max(engine.max_num_seqs, 2), 1.15), points(1, 16, longest, 1.2)
    chunk_X, before_Y = points(1, 64, max(most_tokens, 128), 1.05), points(0, 16, longest, 1.2)
    decoded = rank.decoded(mixers, 1 + engine.num_speculative_tokens, requests_A, context_C)
    prefilled = rank.prefilled(mixers, chunk_X, before_Y)
    tables = {
        "requests_A": requests_A, "context_C": context_C, "decode_s_VAC": decoded.seconds,
        "chunk_X": chunk_X, "before_Y": before_Y, "prefill_s_VXY": prefilled.seconds,
    }  # fmt: skip
    return tables, [decoded, prefilled]


def _ids(values: Sequence[int]) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def first_placement(model: ModelSpec, cluster: Cluster, engine: EngineConfig, trace: RoutingTrace | None) -> Placement:
    """Where an instance's experts lie before any of them moves."""
    layout = engine.layout
    ep, num_slots = layout.experts.ep, model.experts.num_experts + layout.num_redundant_experts
    per_node = min(cluster.devices_per_node, ep)
    if engine.init_expert_location == "trivial" or ep == 1 or trace is None:
        shape = (len(model.moe_layers), model.experts.num_experts)
        return Contiguous().place(num_slots, ep, per_node, np.zeros(shape))
    return Eplb().place(num_slots, ep, per_node, expert_load_LE(trace).astype(np.float64))


def _routing(
    model: ModelSpec, cluster: Cluster, layout: Layout, exchange: int, trace: RoutingTrace | None
) -> dict[str, Any]:
    """All of compiled counting but what the placement decides."""
    num_ranks = layout.attention.dp * (layout.attention.tp if exchange != NO_EXCHANGE else 1)
    ids_TLK = np.zeros((1, 0, 1), np.uint8) if trace is None or not model.moe_layers else trace.expert_ids_TLK
    return {
        "ids_TLK": np.require(ids_TLK, requirements=["C", "W"]),
        "place_LXE": np.zeros((0, 1, 1), np.uint64),
        "base_R": np.zeros(num_ranks, np.int32),
        "slots_per_rank": 1,
        "node_R": (np.arange(num_ranks) // cluster.devices_per_node).astype(np.int32),
        "params_LRS": np.zeros((0, num_ranks, 1)),
    }


def replaced(prices: Prices, placement: Placement, model: ModelSpec, layout: Layout) -> Prices:
    """The same prices with experts placed anew, counted token by token: what was memoised is no longer so."""
    num_ranks, ffn = len(prices.base_R), model.experts
    counter = Counter(placement, ffn.num_experts, num_ranks, prices.node_R)
    params_E = np.array([ffn.expert_params(model.hidden_size, width) for width in ffn.expert_widths])
    num_layers, num_slots = placement.slot_expert_LP.shape
    params_LRS = (params_E[placement.slot_expert_LP] / layout.experts.etp).reshape(num_layers, placement.ep, -1)
    return prices._replace(
        place_LXE=counter.place_LXE,
        base_R=counter.base_R,
        slots_per_rank=num_slots // placement.ep,
        params_LRS=np.tile(params_LRS, (1, num_ranks // placement.ep, 1)),
        memo=no_memo(),
    )
