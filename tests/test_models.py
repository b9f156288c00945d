"""Models: every preset against its maker's own numbers, and every way a configuration can be wrong."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.files.models import build_model, load_model, preset_facts, preset_names, read_config
from moesim.mixers import Attention, LatentAttention, Mamba
from moesim.model import BYTES_PER_PARAM, Dense, Dtypes


def printed(words):
    """A published count ("46.7B") as (value, one unit of its last digit): (46.7e9, 0.1e9)."""
    scale = {"T": 1e12, "B": 1e9, "M": 1e6}[words[-1]]
    decimals = len(words[:-1].partition(".")[2])
    return float(words[:-1]) * scale, scale / 10**decimals


def agrees(ours, words, rounded=""):
    """The rule: within 1 % of what the maker prints, or within half a unit of the last digit it prints.

    A preset may say `rounded = "down"`: then the printed digits must be the first digits of our exact count.
    """
    value, unit = printed(words)
    if rounded == "down":
        return value <= ours < value + unit
    return abs(ours - value) <= max(0.01 * value, unit / 2)


def counted(spec, published, which):
    """Our exact count, taken the way the maker says it counts."""
    ours = {"total": spec.num_params, "active": spec.num_active_params}[which]
    left_out = {
        "": 0,
        "input embedding": spec.vocab_size * spec.hidden_size,
        "embeddings": spec.embedding_params,
    }
    added = {"": 0, "mtp": spec.mtp_params}
    return ours - left_out[published.get(f"{which}_excludes", "")] + added[published.get(f"{which}_includes", "")]


@pytest.mark.parametrize("name", preset_names())
def test_products_are_the_matrices_that_are_counted(name):
    """What is left of a part's parameters is vectors: biases, norms, and a state-space block's own arrays."""
    spec = load_model(name)
    h = spec.hidden_size
    for layer in spec.layers:
        parts = [(m.matmuls(h), m.num_params(h)) for m in (layer.mixer,) if m]
        if isinstance(layer.ffn, Dense):
            parts.append((layer.ffn.matmuls(h), layer.ffn.num_params(h)))
        elif layer.ffn and layer.ffn.shared_width:
            parts.append((layer.ffn.shared_matmuls(h), layer.ffn.shared_params(h)))
        for shapes, params in parts:
            assert 0.99 * params <= sum(n * k for n, k in shapes) <= params


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_products_are_cut_by_tensor_parallelism(tp):
    """Every rank has its share; what cannot be cut (few KV heads, MLA's down-projections) each has whole."""
    heads = Attention(32, 4, 128)
    assert heads.matmuls(4096, tp) == (((32 + 2 * max(4, tp)) * 128 // tp, 4096), (4096, 32 * 128 // tp))
    latent = LatentAttention(128, 1536, 512, 128, 64, 128)
    whole, cut = latent.matmuls(7168), latent.matmuls(7168, tp)
    assert cut[0] == whole[0] == (1536 + 512 + 64, 7168)
    assert [n for n, _ in cut[1:3]] == [n // tp for n, _ in whole[1:3]] and cut[3][1] == whole[3][1] // tp


def test_the_presets_are_those_checked_by_hand():
    assert set(KV_BYTES_PER_TOKEN) == set(preset_names())
    assert len(preset_names()) >= 23


@pytest.mark.parametrize("name", preset_names())
def test_total_and_active_parameters_are_those_the_maker_published(name):
    spec, published = load_model(name), preset_facts(name)["published"]
    for which in ("total", "active"):
        if f"{which}_params" in published:
            ours, words = counted(spec, published, which), published[f"{which}_params"]
            assert agrees(ours, words, published.get(f"{which}_rounded", "")), (which, ours, words)
    if "mtp_params" in published:
        assert agrees(spec.mtp_params, published["mtp_params"])
    if "total_params" in published:
        assert spec.published_params == pytest.approx(printed(published["total_params"])[0], rel=1e-12)
    known = {"mtp_params"} | {
        f"{which}_{key}" for which in ("total", "active") for key in ("params", "excludes", "includes", "rounded")
    }
    assert set(published) <= known


def test_only_explained_counts_leave_the_plain_rule():
    explained = {n for n in preset_names() if set(preset_facts(n)["published"]) - {"total_params", "active_params"}}
    for name in set(preset_names()) - explained:
        spec, published = load_model(name), preset_facts(name)["published"]
        assert agrees(spec.num_params, published["total_params"])
    assert explained == {
        "deepseek-r1",
        "deepseek-v2-lite",
        "deepseek-v3",
        "glm-4.5",
        "gpt-oss-120b",
        "gpt-oss-20b",
        "kimi-k2",
        "qwen3-30b-a3b",
    }


@pytest.mark.parametrize("name", preset_names())
def test_every_group_of_facts_names_its_source(name):
    facts = preset_facts(name)
    assert {"config", "published"} <= set(facts["sources"])
    for source in facts["sources"].values():
        assert source["tag"] in ("published", "assumed", "memory")
        assert source["url"].startswith("https://")
        assert source["date"][:2] == "20"
        assert source["tag"] != "memory" or "memory" in source["checked"]
    assert facts["sources"]["config"]["url"] in load_model(name).source


# Layers that cache x (keys and values) x heads x width x bytes; MLA: layers x (latent + rotary key) x bytes.
KV_BYTES_PER_TOKEN = {
    "deepseek-r1": 61 * (512 + 64) * 2,
    "deepseek-v2": 60 * (512 + 64) * 2,
    "deepseek-v2-lite": 27 * (512 + 64) * 2,
    "deepseek-v3": 61 * (512 + 64) * 2,
    "glam-64b-64e": 64 * 2 * 128 * 128 * 2,
    "glm-4.5": 92 * 2 * 8 * 128 * 2,
    "gpt-oss-120b": 36 * 2 * 8 * 64 * 2,
    "gpt-oss-20b": 24 * 2 * 8 * 64 * 2,
    "grok-1": 64 * 2 * 8 * 128 * 2,
    "jamba-v0.1": 4 * 2 * 8 * 128 * 2,  # 4 attention layers, 28 Mamba layers
    "kimi-k2": 61 * (512 + 64) * 2,
    "llama-3-70b": 80 * 2 * 8 * 128 * 2,
    "llama-3.1-8b": 32 * 2 * 8 * 128 * 2,
    "llama-4-maverick": 48 * 2 * 8 * 128 * 2,
    "mixtral-8x22b": 56 * 2 * 8 * 128 * 2,
    "mixtral-8x7b": 32 * 2 * 8 * 128 * 2,
    "olmoe-1b-7b": 16 * 2 * 16 * 128 * 2,
    "phi-3.5-moe": 32 * 2 * 8 * 128 * 2,
    "qwen1.5-moe-a2.7b": 24 * 2 * 16 * 128 * 2,
    "qwen2-57b-a14b": 28 * 2 * 4 * 128 * 2,
    "qwen3-235b-a22b": 94 * 2 * 4 * 128 * 2,
    "qwen3-30b-a3b": 48 * 2 * 4 * 128 * 2,
    "qwen3-32b": 64 * 2 * 8 * 128 * 2,
    "switch-base-128": 12 * 2 * 12 * 64 * 4,  # the decoder only, in fp32
    "switch-large-128": 24 * 2 * 16 * 64 * 4,
}


@pytest.mark.parametrize("name", preset_names())
def test_kv_bytes_per_token_by_hand(name):
    assert load_model(name).kv_bytes_per_token == KV_BYTES_PER_TOKEN[name]


def test_windows_and_states_by_hand():
    # gpt-oss-20b: 12 layers keep 128 tokens, 12 keep all; 2 x 8 x 64 values of 2 bytes each
    assert load_model("gpt-oss-20b").kv_bytes(10_000) == (12 * 128 + 12 * 10_000) * 2048
    # llama-4-maverick: 36 layers keep a chunk of 8192, 12 keep all
    assert load_model("llama-4-maverick").kv_bytes(20_000) == (36 * 8192 + 12 * 20_000) * 4096
    # jamba: 4 attention layers, and 28 states of (16 + 4) x 8192 values whatever the length
    assert load_model("jamba-v0.1").kv_bytes(1000) == (4 * 1000 * 2048 + 28 * 20 * 8192) * 2
    # phi's window is as long as its context
    assert load_model("phi-3.5-moe").kv_bytes(200_000) == 200_000 * 131_072


def test_weight_bytes_are_the_sizes_of_the_published_checkpoints():
    # gpt-oss model card, table 1: "checkpoint size" 60.8 GiB and 12.8 GiB (mxfp4 experts, the rest bf16)
    assert load_model("gpt-oss-120b").weight_bytes / 2**30 == pytest.approx(60.8, rel=0.01)
    assert load_model("gpt-oss-20b").weight_bytes / 2**30 == pytest.approx(12.8, rel=0.01)
    assert load_model("mixtral-8x7b").weight_bytes == 2 * load_model("mixtral-8x7b").num_params


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_survives_the_trip_through_config_json(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(preset_facts(name)["config"]))
    preset = load_model(name)
    kept = {k: getattr(preset, k) for k in ("source", "published_params", "published_active_params")}
    assert replace(read_config(folder), **kept) == preset
    assert read_config(folder / "config.json") == read_config(folder)
    assert load_model(str(folder)) == read_config(folder)


def test_a_toml_file_made_like_a_preset_is_a_model(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[config]\nmodel_type = "generic"\n' + "".join(f"{k} = {v}\n" for k, v in SMALL.items()))
    assert load_model(file) == build_model({"model_type": "generic"} | SMALL, str(file), "mine")
    file.write_text("[config")
    with pytest.raises(ValueError, match="not valid TOML"):
        load_model(file)


def test_layers_are_stacked_as_the_families_do():
    glam = load_model("glam-64b-64e")
    assert glam.moe_layers == tuple(range(1, 64, 2))
    assert not glam.experts.gated
    assert isinstance(glam.layers[0].ffn, Dense)
    assert glam.layers[0].ffn.gated
    assert load_model("deepseek-v3").moe_layers == tuple(range(3, 61))
    assert load_model("llama-4-maverick").moe_layers == tuple(range(1, 48, 2))
    jamba = load_model("jamba-v0.1")
    assert [i for i, layer in enumerate(jamba.layers) if isinstance(layer.mixer, Attention)] == [
        4,
        12,
        20,
        28,
    ]
    assert isinstance(jamba.layers[0].mixer, Mamba)
    switch = load_model("switch-base-128")
    assert len(switch.layers) == 24
    assert [layer.cross is not None for layer in switch.layers] == [False] * 12 + [True] * 12
    assert switch.moe_layers == tuple(range(1, 24, 2))
    kinds = {name: load_model(name).layers[0].mixer.kind for name in ("olmoe-1b-7b", "mixtral-8x7b", "gpt-oss-20b")}
    assert kinds == {"olmoe-1b-7b": "mha", "mixtral-8x7b": "gqa", "gpt-oss-20b": "gqa+window"}
    assert isinstance(load_model("kimi-k2").layers[0].mixer, LatentAttention)


def test_a_dense_model_has_no_experts():
    with pytest.raises(ValueError, match=r"llama-3-70b.*dense"):
        _ = load_model("llama-3-70b").experts


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def generic(**keys):
    return build_model({"model_type": "generic"} | SMALL | keys, "here", "small")


def test_made_up_models_have_every_option():
    mixed = generic(moe_intermediate_sizes=[16, 32, 48, 64, 16, 32, 48, 64], num_zero_experts=2)
    assert mixed.experts.expert_widths == (16, 32, 48, 64, 16, 32, 48, 64, 0, 0)
    assert mixed.experts.active_routed_params(64) == 3 * 64 * 320 * 2 / 10
    kinds = [
        layer.mixer.kind
        for layer in generic(
            layer_types=["full_attention", "sliding_attention", "linear_attention", "mamba"],
            sliding_window=16,
        ).layers
    ]
    assert kinds == ["mha", "mha+window", "linear", "mamba"]
    latent = generic(kv_lora_rank=8, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    assert latent.kv_bytes_per_token == 4 * (8 + 8) * 2
    shared = generic(num_shared_experts=2, residual_intermediate_size=24, first_k_dense_replace=1)
    assert (shared.experts.shared_width, shared.experts.residual_width) == (64, 24)
    assert shared.moe_layers == (1, 2, 3)
    own = {"attention": "bf16", "experts": "ternary", "kv": "fp8"}
    assert generic(dtypes=own).dtypes == Dtypes(experts="ternary", kv="fp8")


def test_longcat_has_zero_computation_experts():
    keys = {"model_type": "longcat_flash", "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4}
    keys |= {"vocab_size": 100, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "n_routed_experts": 4}
    keys |= {"zero_expert_num": 2, "moe_topk": 3, "q_lora_rank": 16, "kv_lora_rank": 8}
    keys |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    spec = build_model(keys, "here", "longcat")
    assert len(spec.layers) == 4
    assert spec.moe_layers == (0, 2)
    assert spec.experts.expert_widths == (32, 32, 32, 32, 0, 0)
    assert spec.experts.residual_width == 96


def test_a_model_that_also_sees_is_read_by_its_text_part():
    text = preset_facts("llama-4-maverick")["config"]
    both = {"model_type": "llama4", "text_config": text, "vision_config": {"hidden_size": 1408}}
    assert build_model(both, "here", "m").num_params == load_model("llama-4-maverick").num_params


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, ("int4", "int4", "int4", "bf16")),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, ("int4_g32", "int4_g32", "int4_g32", "bf16")),
        ({"quant_method": "gptq", "bits": 8}, ("int8", "int8", "int8", "bf16")),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("fp8_block",) * 3 + ("bf16",)),
        ({"quant_method": "fp8"}, ("fp8", "fp8", "fp8", "bf16")),
        ({"quant_method": "mxfp4"}, ("bf16", "mxfp4", "bf16", "bf16")),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, ("int8", "int8", "int8", "bf16")),
        (
            {
                "quant_method": "fp8",
                "modules_to_not_convert": ["model.layers.*.self_attn", "mlp.gate", "lm_head"],
            },
            ("bf16", "fp8", "fp8", "bf16"),
        ),
        (  # Kimi-K2-Thinking
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32, "type": "int"}}},
                "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
            },
            ("bf16", "int4_g32", "bf16", "bf16"),
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
                "kv_cache_scheme": {"num_bits": 8, "type": "float"},
            },
            ("fp8", "fp8", "fp8", "fp8"),
        ),
    ],
)
def test_quantization_config_sets_the_format_of_each_part(quantization, expected):
    dtypes = generic(quantization_config=quantization).dtypes
    assert (dtypes.attention, dtypes.experts, dtypes.dense, dtypes.kv) == expected
    assert dtypes.embedding == "bf16"


def test_torch_dtype_is_the_base_format():
    assert generic(torch_dtype="float32").dtypes == Dtypes(*["fp32"] * 6)
    assert generic(dtype="float16").dtypes == Dtypes(*["fp16"] * 6)


BROKEN = [
    ({"hidden_size": None}, "hidden_size: is missing; give a whole number, at least 1"),
    ({"hidden_size": "64"}, "hidden_size: must be a whole number, at least 1, not '64'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers: must be a whole number, at least 1, not 0"),
    ({"vocab_size": -5}, "vocab_size: must be a whole number, at least 1, not -5"),
    ({"vocab_size": True}, "vocab_size: must be a whole number, at least 1, not True"),
    ({"num_key_value_heads": 3}, r"num_key_value_heads: must divide num_attention_heads \(4\), but it is 3"),
    ({"hidden_size": 66}, r"hidden_size: \(66\) must be a multiple of num_attention_heads \(4\)"),
    ({"num_experts_per_tok": 9}, r"num_experts_per_tok: must be at most the number of experts \(8\), not 9"),
    ({"moe_intermediate_sizes": [1, 2]}, "num_experts: is 8, but moe_intermediate_sizes has 2 entries"),
    ({"moe_intermediate_sizes": [1, -2]}, "moe_intermediate_sizes: must hold whole numbers at least 0"),
    (
        {"layer_types": ["full_attention"]},
        r"layer_types: must have one entry for each .* \(4\)",
    ),
    (
        {"layer_types": ["full_atention"] * 4},
        "layer_types: has the unknown entry 'full_atention'; nearest: 'full_",
    ),
    ({"layer_types": ["sliding_attention"] * 4}, "sliding_window: is missing, but layer_types has layers"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: must be true or false, not 'yes'"),
    ({"mlp_only_layers": [7]}, r"mlp_only_layers: must hold whole numbers from 0 to 3, but it has \[7\]"),
    ({"torch_dtype": "float8"}, "torch_dtype: has the unknown format 'float8'; nearest:"),
    (
        {"quantization_config": {"quant_method": "fp9"}},
        "quantization_config.quant_method: .* 'fp9'; nearest: 'fp8'",
    ),
    (
        {"quantization_config": {"quant_method": "awq", "bits": 3}},
        "quantization_config.bits: must be 4 or 8, not 3",
    ),
    ({"quantization_config": 4}, "quantization_config: must be an object of keys and values, not 4"),
    ({"dtypes": {"experts": "fp9"}}, "dtypes.experts: has the unknown format 'fp9'; nearest:"),
    ({"dtypes": {"expert": "fp8"}}, "dtypes.expert: is not a part of a model; nearest: 'experts'"),
    (
        {"num_hidden_layers": 10**9},
        "num_hidden_layers: must be a whole number, at most 10000, not 10",
    ),
    ({"num_expert": 4}, "num_expert: has no meaning for this model; nearest: 'num_experts'"),
    ({"kv_lora_rank": 8}, "qk_nope_head_dim: is missing"),
]


@pytest.mark.parametrize(("keys", "message"), BROKEN)
def test_a_mistake_is_told_with_its_key_rule_and_value(keys, message):
    with pytest.raises(ValueError, match=message) as error:
        generic(**keys)
    assert str(error.value).startswith("here has ")


def test_all_mistakes_are_told_at_once(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "mixtral",
                "hidden_size": "4096",
                "num_hidden_layers": -1,
                "num_attention_heads": 32,
                "num_key_value_heads": 5,
                "num_local_experts": 4,
                "num_experts_per_tok": 8,
                "vocab_size": 32000,
            }
        )
    )
    with pytest.raises(ValueError, match="5 mistakes") as error:
        read_config(tmp_path)
    text = str(error.value)
    assert str(tmp_path / "config.json") in text
    for key in (
        "hidden_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "num_experts_per_tok",
        "intermediate_size",
    ):
        assert f"\n  {key}: " in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ('{"model_type": "mixtral", "hidden_size"', "not valid JSON .*line 1.*cut short"),
        ("[1, 2]", "must hold a JSON object.*not a list"),
        ("{}", "model_type: is missing.*known: deepseek_v2"),
        (
            '{"model_type": "mixtrl"}',
            "model_type: 'mixtrl' is not a family that can be read; nearest: 'mixtral'",
        ),
        ('{"model_type": 3}', "model_type: must be a string, not 3"),
    ],
)
def test_a_broken_file_is_told_what_is_wrong_with_it(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path)
    assert "config.json" in str(error.value)


def test_a_file_that_is_no_text_is_told_so(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ValueError, match="not text in UTF-8"):
        read_config(tmp_path)


def test_missing_files_and_unknown_names(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="no such file or directory"):
        load_model(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="no such file or directory"):
        read_config(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"unknown model 'mixtral-8x7'.*nearest: 'mixtral-8x7b'.*known: deepseek-r1"):
        load_model("mixtral-8x7")
    with pytest.raises(ValueError, match="nearest: 'mixtral-8x7b'"):
        load_model("mistralai/Mixtral-8x7B-v0.1")
    with pytest.raises(ValueError, match="unknown model 'zzz'"):
        preset_facts("zzz")


def test_reading_a_model_needs_no_torch():
    code = "import sys; from moesim.files.models import load_model; load_model('deepseek-v3');"
    code += "print({'torch', 'transformers', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


JUNK = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(JUNK, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x))


@settings(deadline=None)
@given(st.sampled_from(preset_names()), st.data())
def test_any_wrong_value_is_a_message_for_people(name, data):
    keys = dict(preset_facts(name)["config"])
    for key in data.draw(st.lists(st.sampled_from(sorted(keys)), min_size=1, max_size=3)):
        keys[key] = data.draw(JSON)
    try:
        spec = build_model(keys, "here", "junk")
    except ValueError as error:
        assert "here has " in str(error)
    else:
        assert 0 < spec.num_active_params <= spec.num_params


@st.composite
def made_up(draw):
    heads = draw(st.sampled_from([1, 2, 4, 8]))
    number = draw(st.integers(1, 6))
    widths = draw(st.lists(st.integers(0, 50), min_size=1, max_size=8))
    zero = draw(st.integers(0, 3))
    return generic(
        hidden_size=8 * heads,
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([h for h in (1, 2, 4, 8) if heads % h == 0])),
        num_hidden_layers=number,
        layer_types=draw(
            st.lists(
                st.sampled_from(["full_attention", "sliding_attention", "linear_attention", "mamba"]),
                min_size=number,
                max_size=number,
            )
        ),
        sliding_window=draw(st.integers(1, 40)),
        num_experts=len(widths),
        moe_intermediate_sizes=widths,
        num_zero_experts=zero,
        num_experts_per_tok=draw(st.integers(1, len(widths) + zero)),
        first_k_dense_replace=draw(st.integers(0, number - 1)),
        shared_expert_intermediate_size=draw(st.integers(0, 30)),
        tie_word_embeddings=draw(st.booleans()),
        moe_intermediate_size=None,
        intermediate_size=33,
    )


@settings(deadline=None)
@given(made_up(), st.integers(0, 100), st.integers(0, 100))
def test_counts_obey_their_laws(spec, tokens, more):
    assert 0 < spec.num_active_params <= spec.num_params
    assert spec.kv_bytes(tokens) <= spec.kv_bytes(tokens + more)
    assert spec.kv_bytes(tokens + more) - spec.kv_bytes(tokens) <= more * spec.kv_bytes_per_token
    assert spec.weight_bytes == 2 * spec.num_params


@settings(deadline=None)
@given(made_up(), st.sampled_from(["attention", "experts", "dense", "embedding"]))
def test_weight_bytes_are_linear_in_the_size_of_each_format(spec, part):
    def stored(form):
        return replace(spec, dtypes=replace(Dtypes(), **{part: form})).weight_bytes

    size = BYTES_PER_PARAM
    slope = (stored("fp32") - stored("fp8")) / (size["fp32"] - size["fp8"])
    assert 0 <= slope <= spec.num_params
    for form in size:
        assert stored(form) == pytest.approx(stored("fp8") + slope * (size[form] - size["fp8"]))


BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FINE = BASE | {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
MLA = FINE | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
TINY = {
    "DeepseekV2": MLA,
    "DeepseekV3": MLA | {"attention_bias": True},
    "Glm4Moe": FINE | {"n_routed_experts": 8, "attention_bias": True, "use_qk_norm": True, "head_dim": 16},
    "GptOss": BASE | {"num_local_experts": 8, "head_dim": 16},
    "Jamba": BASE | {"num_hidden_layers": 8, "num_experts": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "Llama": BASE | {"attention_bias": True, "mlp_bias": True},
    "Llama4Text": BASE | {"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 56},
    "MiniMax": BASE | {"num_local_experts": 4},
    "Mistral": BASE,
    "Mixtral": BASE | {"num_local_experts": 4},
    "Olmoe": BASE | {"num_experts": 8},
    "Phimoe": BASE | {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True},
    "Qwen2": BASE,
    "Qwen2Moe": FINE | {"num_experts": 6, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    "Qwen3": BASE,
    "Qwen3Moe": FINE | {"num_experts": 6, "head_dim": 16, "mlp_only_layers": [0]},
    "SwitchTransformers": {
        "vocab_size": 96,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_heads": 4,
        "num_experts": 8,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
    },
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", TINY)
def test_the_count_is_exact_against_the_model_itself(family, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**TINY[family])
    head = "ForConditionalGeneration" if family == "SwitchTransformers" else "ForCausalLM"
    with torch.device("meta"):
        model = getattr(transformers, family.replace("Text", "") + head)(config)
    exact = sum(p.numel() for p in model.parameters())
    exact += sum(b.numel() for name, b in model.named_buffers() if "e_score_correction_bias" in name)
    config.save_pretrained(tmp_path)
    assert read_config(tmp_path).num_params == exact
