"""Capture: what the hooks write is what the model's own routers chose, for four families of MoE models."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from moesim.capture.capture import Watch, capture  # noqa: E402
from moesim.capture.hooks import RoutingRecorder  # noqa: E402
from moesim.capture.prompts import cut_prompts, read_texts  # noqa: E402
from moesim.cli.capture import capture_command  # noqa: E402
from moesim.files.traces import read_trace  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 20
COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
}
DEEPSEEK = COMMON | {
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
FAMILIES = {
    "mixtral": ("Mixtral", COMMON | {"num_hidden_layers": 3, "intermediate_size": 48, "num_local_experts": 4}),
    "olmoe": ("Olmoe", COMMON | {"num_hidden_layers": 3, "intermediate_size": 16, "num_experts": 8}),
    "qwen3_moe": (
        "Qwen3Moe",
        COMMON
        | {
            "num_hidden_layers": 3,
            "moe_intermediate_size": 16,
            "num_experts": 8,
            "mlp_only_layers": [0],
            "head_dim": 8,
        },
    ),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
}
MOE_LAYERS = {"mixtral": (0, 1, 2), "olmoe": (0, 1, 2), "qwen3_moe": (1, 2), "deepseek_v3": (1, 2, 3)}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def save_tokenizer(folder):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)


def tiny_model(family):
    prefix, settings = FAMILIES[family]
    torch.manual_seed(1)
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**settings))
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if ".gate." in name and ("weight" in name or "bias" in name):
            torch.nn.init.normal_(value, std=0.5)  # decided routers: no ties for rounding to flip
    return model.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def captured(request, tmp_path_factory):
    """A saved tiny model, and the trace captured from it: three requests in batches of two, of different lengths."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder)
    save_tokenizer(folder)
    out = folder / "trace.parquet"
    capture(
        folder,
        [TEXT],
        out,
        num_requests=3,
        prompt_tokens=(5, 12),
        output_tokens=4,
        batch_size=2,
        origin="random",
        watch=Watch(predict_width=4, scores=True),
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    return request.param, folder, read_trace(out), model


def routers_of(model):
    return [module for name, module in model.named_modules() if name.endswith("mlp.gate")]


def route_alone(model, token_ids):
    """What each router is given and answers when one request runs alone, whole, unpadded and without a cache."""
    seen = []
    handles = [
        router.register_forward_hook(lambda _m, args, output: seen.append((args[0], output)))
        for router in routers_of(model)
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([token_ids.tolist()]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_ids_weights_and_predictions_are_the_models_own(captured):
    _family, _folder, trace, model = captured
    routers = routers_of(model)
    assert len(routers) == trace.num_layers
    for request in range(3):
        rows = trace.request_T == request
        seen = route_alone(model, trace.token_id_T[rows])
        for layer, (hidden, (logits, weights, ids)) in enumerate(seen):
            order = weights.float().argsort(dim=-1, descending=True, stable=True)
            np.testing.assert_array_equal(trace.expert_ids_TLK[rows, layer], ids.gather(1, order).numpy())
            np.testing.assert_allclose(
                trace.weights_TLK[rows, layer], weights.float().gather(1, order).numpy(), rtol=2e-3, atol=1e-4
            )
            np.testing.assert_allclose(trace.scores_TLE[rows, layer], logits.numpy(), rtol=2e-3, atol=1e-4)
            for horizon in range(1, len(seen) - layer):
                with torch.no_grad():
                    scores, weights, chosen = routers[layer + horizon](hidden)
                order = weights.float().argsort(dim=-1, descending=True, stable=True)
                chosen = chosen.gather(1, order)
                others = scores.scatter(1, chosen, -torch.inf).argsort(dim=1, descending=True)[:, :2]
                np.testing.assert_array_equal(
                    trace.predicted_HTLW[horizon - 1][rows, layer], torch.cat([chosen, others], 1).numpy()
                )
        assert len(trace.predicted_HTLW) == len(seen) - 1


def test_positions_phases_and_layers(captured):
    family, _folder, trace, _model = captured
    assert trace.layers == MOE_LAYERS[family]
    lengths = []
    for request in range(3):
        rows = trace.request_T == request
        assert trace.position_T[rows].tolist() == list(range(rows.sum()))
        assert trace.is_decode_T[rows].tolist() == [False] * (rows.sum() - 4) + [True] * 4
        lengths.append(int(rows.sum()) - 4)
    assert len(set(lengths)) > 1, "the batch must need padding for this to test it"
    assert all(5 <= length <= 12 for length in lengths)


def test_prompts_are_the_text_without_pads(captured):
    _family, folder, trace, _model = captured
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer.encode(TEXT)
    for request in range(3):
        prompt = trace.token_id_T[(trace.request_T == request) & ~trace.is_decode_T].tolist()
        start = request * len(ids) // 3
        assert prompt == ids[start : start + len(prompt)]


def test_header(captured):
    family, _folder, trace, _model = captured
    assert trace.origin == "random" and trace.name == "trace"
    assert trace.num_experts == (4 if family == "mixtral" else 8) and trace.top_k == 2
    assert trace.provenance["model_type"] == family
    assert torch.__version__ in trace.provenance["versions"]


@pytest.mark.parametrize("captured", ["olmoe"], indirect=True)
def test_seed_and_greedy(captured, tmp_path):
    _family, folder, trace, _model = captured
    small = {"num_requests": 3, "prompt_tokens": (5, 12), "output_tokens": 4}

    def tokens(name, **settings):
        capture(folder, [TEXT], tmp_path / name, **small, **settings)
        return read_trace(tmp_path / name).token_id_T.tolist()

    assert tokens("same", batch_size=2) == trace.token_id_T.tolist()
    assert tokens("other", batch_size=2, seed=1) != trace.token_id_T.tolist()
    # Greedy decoding does not depend on how requests are batched.
    assert tokens("a", batch_size=1, temperature=0) == tokens("b", batch_size=3, temperature=0)


@pytest.mark.parametrize("captured", ["mixtral"], indirect=True)
def test_command(captured, tmp_path):
    _family, folder, _trace, _model = captured
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(2)))
    out = tmp_path / "trace.parquet"
    arguments = [str(folder), "--text", str(text), "-o", str(out), "--requests", "4", "--prompt-tokens", "4-6"]
    run = CliRunner().invoke(capture_command, [*arguments, "--output-tokens", "2"], catch_exceptions=False)
    assert run.exit_code == 0 and run.stdout == ""
    assert read_trace(out).provenance["text"] == "text.jsonl"
    assert np.unique(read_trace(out).request_T).tolist() == [0, 1, 2, 3]


def test_command_without_torch(monkeypatch, tmp_path):
    import sys

    monkeypatch.delitem(sys.modules, "moesim.capture.capture")
    monkeypatch.setitem(sys.modules, "torch", None)
    run = CliRunner().invoke(capture_command, [str(tmp_path), "--text", "t.txt", "-o", "o.parquet"])
    assert isinstance(run.exception, ValueError)
    assert "pip install 'moesim[capture]'" in str(run.exception)


def test_a_dense_model_is_refused():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match=r"family 'llama' \(LlamaForCausalLM\).*no MoE layer.*--families"):
        RoutingRecorder(transformers.LlamaForCausalLM(config))


def test_hooks_leave_the_model_as_it_was():
    model = tiny_model("olmoe")
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        with RoutingRecorder(model) as recorder:
            during = model(input_ids=tokens).logits
            assert recorder.take(12).expert_ids.shape == (12, 3, 2)
        after = model(input_ids=tokens).logits
    assert torch.equal(before, during) and torch.equal(before, after)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_wrong_input_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        capture(tmp_path, [TEXT], tmp_path / "o.parquet")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        capture(tmp_path, [TEXT], tmp_path / "o.parquet", batch_size=0)
    with pytest.raises(ValueError, match="cannot read the text"):
        read_texts(tmp_path / "none.txt")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"no": 1}\n[\n')
    with pytest.raises(ValueError, match="lines 2, 3"):
        read_texts(tmp_path / "bad.jsonl")


def test_prompts_never_overlap():
    class Letters:
        def encode(self, text, verbose):
            return list(map(ord, text))

    texts = ["".join(map(chr, range(100, 140))), "".join(map(chr, range(200, 223))), "short"]
    prompts = cut_prompts(Letters(), texts, 5, (8, 10), seed=0)
    letters = np.concatenate(prompts)
    assert len(set(letters.tolist())) == len(letters)
    assert [prompt[0] for prompt in prompts] == [100, 200, 113, 211, 126]
    with pytest.raises(ValueError, match="hold 6 prompts of 10 tokens; 7 are asked"):
        cut_prompts(Letters(), texts, 7, (8, 10), seed=0)
    with pytest.raises(ValueError, match="shortest first"):
        cut_prompts(Letters(), texts, 1, (10, 8), seed=0)
