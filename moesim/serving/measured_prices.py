"""Prices of iterations from vLLM's own layers, timed one by one on the device.

Layers come from the profile, collectives from `Operators`. Attention is the profile's joint table taken apart: decoding
alone, a chunk alone, and what both take longer together. That is no small term: a kernel that gets a chunk runs the
decoding requests as if they were chunks of one token, without sharing the reads of grouped queries, so that they take
1.5 to 3 times as long (128 requests of 1,024 tokens on an RTX PRO 6000: 405 us alone, 664 us beside a chunk).

That requests are unevenly long is left out: at 128 requests it adds at most 5 % to attention in LLMServingSim's
skew.csv, below 2 % of an iteration.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from moesim.files.profiles.llmservingsim import CALLS, ONCE, LayerProfile, Line
from moesim.hardware import SOURCES
from moesim.mixers import Attention
from moesim.model import BYTES_PER_PARAM, Dense, ModelSpec
from moesim.serving.prices import ROUTER, Prices
from moesim.serving.work import PARTS

Floats = NDArray[np.float64]

_MIXER = ("layernorm", "qkv_proj", "qk_norm", "rotary_emb", "o_proj")
_DENSE = ("layernorm", "gate_up_proj", "act_fn", "down_proj")
MEASURED_PARTS = ("attention", "dense", "router", "experts", "head")


def measured_prices(prices: Prices, profile: LayerProfile, model: ModelSpec, host_s: float = 0.0) -> Prices:
    """The prices with every layer that the profile has in place of what operators say.

    Weights are read from memory: a product that the profile, which repeats one layer, found in the cache is held to the
    rate at which the profile reads the head. Norm and router of a MoE layer are in the profile's time of it, and in the
    row of the router.

    Args:
        prices: from `build_prices`, of the same model, machine and layout.
        host_s: of an iteration, that no kernel hides.

    Raises:
        ValueError: the model has layers of several kinds or shared experts, which a profile does not tell apart, or the
            profile was taken for other cuts or without the model's layers.
    """
    _check(prices, profile, model)
    grid_N, value_bytes = prices.grid_N, BYTES_PER_PARAM[model.dtypes.attention]
    head_s = profile.per_sequence["lm_head"][1][0]
    floor_s = head_s / (-(-model.vocab_size // profile.tp) * model.hidden_size * value_bytes)  # for a byte of weights
    once_N = sum(on_line(profile.dense[name], grid_N) for name in ONCE if name in profile.dense)
    token_s_ON = prices.token_s_ON.copy()
    mixer = model.layers[0].mixer
    assert isinstance(mixer, Attention)
    (qkv, o) = (n * k * value_bytes * floor_s for n, k in mixer.matmuls(model.hidden_size, profile.tp))
    token_s_ON[0] = once_N / len(model.layers) + _summed(profile, _MIXER, grid_N, {"qkv_proj": qkv, "o_proj": o})
    if not model.moe_layers:
        token_s_ON[1] = _summed(profile, _DENSE, grid_N, {})
    else:
        token_s_ON[len(prices.window_V) + ROUTER] = on_line(profile.dense["layernorm"], grid_N)
        slot_s = prices.params_LRS[0, 0, 0] * BYTES_PER_PARAM[model.dtypes.experts] * floor_s
        prices = _with_experts(prices, profile, model, slot_s)
    head_s_N = sum(on_line(line, grid_N) for line in profile.per_sequence.values())
    shares_PX = prices.shares_PX.copy()
    for part in MEASURED_PARTS:
        shares_PX[PARTS.index(part)] = np.arange(len(SOURCES)) == SOURCES.index("measured")
    shares_PX[PARTS.index("host")] = np.arange(len(SOURCES)) == SOURCES.index("fitted")
    return _with_attention(prices, profile)._replace(
        token_s_ON=token_s_ON,
        head_s_N=np.where(grid_N > 0, head_s_N, 0.0),
        host_s=host_s,
        shares_PX=shares_PX,
    )


def _check(prices: Prices, profile: LayerProfile, model: ModelSpec) -> None:
    kinds = {(layer.mixer, layer.ffn) for layer in model.layers}
    has_shared = bool(model.moe_layers) and (model.experts.shared_width or model.experts.residual_width)
    if len(kinds) > 1 or has_shared or not isinstance(model.layers[0].mixer, Attention):
        raise ValueError(f"profile: {model.name} has layers of several kinds, or shared experts; one kind would do")
    if profile.tp != prices.tp:
        raise ValueError(f"profile: taken for tp {profile.tp}, but the instance has tp {prices.tp}; read that one")
    is_dense = isinstance(model.layers[0].ffn, Dense)
    if is_dense != ("gate_up_proj" in profile.dense):
        given = "a dense network" if "gate_up_proj" in profile.dense else "experts"
        raise ValueError(f"profile: it is of {given}, {model.name} is not; give the profile of the same model")


def on_line(line: Line, sizes_N: Floats) -> Floats:
    """Seconds at sizes: linear between the measured ones, the first below them, the last slope beyond."""
    sizes, seconds = line
    slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
    return np.asarray(np.interp(sizes_N, sizes, seconds) + np.maximum(sizes_N - sizes[-1], 0.0) * slope)


def _summed(profile: LayerProfile, names: tuple[str, ...], grid_N: Floats, least_s: Mapping[str, float]) -> Floats:
    """One call of each layer by tokens, none shorter than it takes to read its weights."""
    assert all(CALLS[name] == 1 or name == "layernorm" for name in names)  # one layernorm is in each half of a layer
    lines = [np.maximum(on_line(profile.dense[n], grid_N), least_s.get(n, 0.0)) for n in names if n in profile.dense]
    return np.asarray(np.sum(lines, axis=0))


def _with_attention(prices: Prices, profile: LayerProfile) -> Prices:
    """The joint table taken apart, on its own points."""
    at = profile.attention_NX.astype(np.int64).tolist()
    points = {tuple(point): seconds for point, seconds in zip(at, profile.attention_s_N.tolist(), strict=True)}
    chunks, befores, requests, contexts = (np.unique(profile.attention_NX[:, i]) for i in range(4))
    chunk_X, requests_A, context_C = (axis[axis > 0] for axis in (chunks, requests, contexts))
    before_Y = np.union1d(befores, [0.0])
    decode_AC = np.array([_curve(points, context_C, 3, (0, 0, num, 0)) for num in requests_A])
    prefill_XY = np.array([_curve(points, before_Y, 1, (chunk, 0, 0, 0)) for chunk in chunk_X])
    mixed_XAC = np.zeros((len(chunk_X), *decode_AC.shape))
    for x, chunk in enumerate(chunk_X):
        for a, num in enumerate(requests_A):
            joint_C = _curve(points, context_C, 3, (chunk, 0, num, 0))
            if joint_C is None:  # as much as fewer requests take longer
                mixed_XAC[x, a] = mixed_XAC[x, a - 1] * (decode_AC[a] / decode_AC[a - 1]) if a else 0.0
            else:
                mixed_XAC[x, a] = joint_C - prefill_XY[x, 0] - decode_AC[a]
    return prices._replace(
        requests_A=requests_A, context_C=context_C, decode_s_VAC=decode_AC[None], chunk_X=chunk_X, before_Y=before_Y,
        prefill_s_VXY=prefill_XY[None], mixed_s_VXAC=mixed_XAC[None],
    )  # fmt: skip


def _curve(points: Mapping[tuple[int, ...], float], sizes_N: Floats, axis: int, at: tuple[float, ...]) -> Floats | None:
    """Seconds at all sizes of one axis, the others as in `at`, from those measured; None for fewer than 2."""
    keys = [(size, (*map(int, at[:axis]), int(size), *map(int, at[axis + 1 :]))) for size in sizes_N]
    known = [(size, points[key]) for size, key in keys if key in points]
    if len(known) < 2:
        return None
    return on_line((np.array([size for size, _ in known]), np.array([s for _, s in known])), sizes_N)


def _with_experts(prices: Prices, profile: LayerProfile, model: ModelSpec, slot_s: float) -> Prices:
    """Experts by the rows of a rank and its slots that have any.

    A few experts stay in the cache while the profile repeats a layer: they are held to `slot_s`, the reading of one.
    Below the fewest that were measured, each is as long as there.
    """
    top_k = model.experts.top_k
    rows_I, active_J = np.unique(profile.moe_NX[:, 0] * top_k), np.unique(profile.moe_NX[:, 1])
    seconds_IJ = np.zeros((len(rows_I), len(active_J)))
    for j, active in enumerate(active_J):
        here = profile.moe_NX[:, 1] == active
        order = np.argsort(profile.moe_NX[here, 0])
        line = profile.moe_NX[here, 0][order] * top_k, profile.moe_s_N[here][order]
        seconds_IJ[:, j] = np.maximum(on_line(line, rows_I), active * slot_s)
    seconds_IJ = np.concatenate([seconds_IJ[:, :1] / active_J[0], seconds_IJ], axis=1)
    return prices._replace(
        has_experts_table=True, rows_I=rows_I, active_J=np.append(1.0, active_J), experts_s_IJ=seconds_IJ
    )
