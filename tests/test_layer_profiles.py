"""LLMServingSim's profiles of vLLM's layers: read, refused, made into prices; and what the real ones mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from vllm_cases import CONTEXTS, DENSE_US, MIXED_US, NUMS, TOKEN_US, attention_us, write_profile

from moesim.costs.operators import Operators
from moesim.files.hardware import load_cluster
from moesim.files.models import load_model
from moesim.files.profiles.llmservingsim import CALLS, ONCE, read_layer_profile
from moesim.layout import AttentionGrid, Layout
from moesim.service import EngineConfig
from moesim.serving.measured_prices import measured_prices, on_line
from moesim.serving.pricing import build_prices
from moesim.serving.work import PARTS

REAL = Path(__file__).parents[2] / "shared" / "data" / "serving_llmservingsim" / "profiler" / "perf"


def prices_of(profile, model="llama-3.1-8b", tp=1, host_s=0.0):
    spec, cluster = load_model(model), load_cluster("workstation-4090")
    layout = Layout(AttentionGrid(1, tp))
    engine = EngineConfig(max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=8192)
    made = build_prices(spec, cluster, layout, engine, None, Operators(cluster.device))
    return made, measured_prices(made, profile, spec, host_s)


def test_a_profile_is_read_in_seconds_and_by_size(tmp_path):
    write_profile(tmp_path / "v")
    profile = read_layer_profile(tmp_path / "v")
    assert set(profile.dense) == {*ONCE, *CALLS} and (profile.device, profile.tp) == ("made up", 1)
    assert profile.engine == "vLLM 0.19.0, CUDA 12.8"
    sizes, seconds = profile.dense["o_proj"]
    assert sizes.tolist() == [1, 64, 2048]
    np.testing.assert_allclose(seconds, 1e-6 * (DENSE_US + TOKEN_US * sizes))
    assert len(profile.attention_NX) == 45 and len(profile.moe_NX) == 0


def test_prices_are_the_layers_of_the_profile(tmp_path):
    write_profile(tmp_path / "v")
    made, prices = prices_of(read_layer_profile(tmp_path / "v"), host_s=2e-3)
    n = int(np.searchsorted(prices.grid_N, 500))
    layer_us = DENSE_US + TOKEN_US * prices.grid_N[n]
    assert prices.host_s == 2e-3 and made.host_s == 0
    assert prices.token_s_ON[1, n] == pytest.approx(1e-6 * 4 * layer_us)  # norm, gate and up, activation, down
    assert prices.token_s_ON[0, n] == pytest.approx(1e-6 * (5 + 2 / 32) * layer_us, rel=0.2)  # two floors of weights
    assert prices.head_s_N[0] == 0 and prices.head_s_N[64] == pytest.approx(1e-6 * 2 * (50 + 64))
    np.testing.assert_array_equal(prices.token_s_ON[2:], made.token_s_ON[2:])  # collectives are not in it
    decoded = [[1e-6 * attention_us(0, 0, num, context) for context in CONTEXTS] for num in NUMS]
    np.testing.assert_allclose(prices.decode_s_VAC[0], decoded)
    np.testing.assert_allclose(prices.mixed_s_VXAC, 1e-6 * MIXED_US)
    assert prices.shares_PX[PARTS.index("attention")].tolist() == [1, 0, 0, 0]


def test_weights_are_read_from_memory_however_fast_the_profile_found_them_in_the_cache(tmp_path):
    write_profile(tmp_path / "v")
    profile = read_layer_profile(tmp_path / "v")
    quick = replace(profile, dense=profile.dense | {"qkv_proj": (np.array([1.0, 2048.0]), np.array([1e-9, 1e-9]))})
    _, prices = prices_of(quick)
    bytes_per_s = 128256 * 4096 * 2 / 51e-6  # at which the head is read
    others_us = (4 + 2 / 32) * (DENSE_US + TOKEN_US)
    floor_us = 1e6 * 6144 * 4096 * 2 / bytes_per_s
    assert prices.token_s_ON[0, 1] >= 1e-6 * (others_us + floor_us) * 0.999


@pytest.mark.parametrize(
    ("sizes", "seconds"), [([0.5], [1.0]), ([1, 2, 3], [1.0, 1.5, 2.0]), ([4, 5], [2.5, 3.0])],
    ids=["below", "between", "beyond"],
)  # fmt: skip
def test_a_line_is_flat_below_and_goes_on_beyond(sizes, seconds):
    line = np.array([1.0, 3.0]), np.array([1.0, 2.0])
    assert on_line(line, np.array(sizes)).tolist() == seconds


MISTAKES = {
    "a file lacks": ("dense.csv", None, "tp1/dense.csv lacks"),
    "a column lacks": ("dense.csv", "layer,tokens\nqkv_proj,1\n", "column time_us lacks"),
    "no rows": ("dense.csv", "layer,tokens,time_us\n", "no rows"),
    "a layer is unknown": ("per_sequence.csv", "layer,sequences,time_us\nlmhead,1,2\nlmhead,2,3\n", "'lmhead' is not"),
    "a time is 0": ("per_sequence.csv", "layer,sequences,time_us\nlm_head,1,0\nlm_head,2,3\n", "row 1: .*positive"),
    "a size is no whole number": ("per_sequence.csv", "layer,sequences,time_us\nlm_head,1.5,2\n", "whole numbers"),
    "a point comes twice": ("per_sequence.csv", "layer,sequences,time_us\nlm_head,1,2\nlm_head,1,3\n", "1 rows repeat"),
    "words for numbers": ("per_sequence.csv", "layer,sequences,time_us\nlm_head,few,2\n", "must be numbers"),
    "one size": ("per_sequence.csv", "layer,sequences,time_us\nlm_head,1,2\nsampler,1,2\nsampler,2,2\n", "one size"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_what_is_wrong_with_a_profile_is_said(tmp_path, kind):
    name, text, said = MISTAKES[kind]
    write_profile(tmp_path / "v")
    path = tmp_path / "v" / "tp1" / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_layer_profile(tmp_path / "v")


def test_a_profile_of_something_else_is_refused(tmp_path):
    write_profile(tmp_path / "v")
    write_profile(
        tmp_path / "moe", [name for name in (*ONCE, *CALLS) if name not in ("gate_up_proj", "down_proj")], True
    )
    profile = read_layer_profile(tmp_path / "v")
    with pytest.raises(ValueError, match="taken for tp 2"):
        prices_of(replace(profile, tp=2))
    with pytest.raises(ValueError, match="it is of experts"):
        prices_of(read_layer_profile(tmp_path / "moe"))


@pytest.fixture(scope="module")
def qwen():
    if not REAL.exists():
        pytest.skip("LLMServingSim's profiles are not on this machine")
    return read_layer_profile(REAL / "RTXPRO6000" / "Qwen" / "Qwen3-30B-A3B-Instruct-2507" / "bf16")


def test_the_real_profile_is_of_one_call_of_one_layer(qwen):
    """As the module says: by what the device can do, no other reading of the columns would be possible."""
    model, device = load_model("qwen3-30b-a3b"), load_cluster("rtx-pro-6000-x2").device
    (n, k), _ = model.layers[0].mixer.matmuls(model.hidden_size, 1)
    sizes, seconds = qwen.dense["qkv_proj"]
    reached = 2 * 2048 * n * k / seconds[sizes == 2048][0] / device.flops_per_s["bf16"]
    head = model.vocab_size * model.hidden_size * 2 / qwen.per_sequence["lm_head"][1][0] / device.memory.bytes_per_s
    read = 128 * model.experts.expert_params(model.hidden_size, 768) * 2 / device.memory.bytes_per_s
    experts = read / qwen.moe_s_N[qwen.moe_NX[:, 1] == 128].min()
    assert reached == pytest.approx(0.64, abs=0.01) and head == pytest.approx(0.826, abs=0.01)
    assert experts / head == pytest.approx(1.0, abs=0.01)
