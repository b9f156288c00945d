"""Every MoE family of the installed transformers: what is captured is what the model itself chose and used.

The observation is independent of the hooks: `forward` of routers and experts is wrapped, in another pass.
"""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from moesim.capture.families import moe_families, prove  # noqa: E402
from moesim.capture.hooks import RoutingRecorder, UnsupportedFamilyError  # noqa: E402
from moesim.capture.passes import check_stack, run_batch, stacks, writes  # noqa: E402
from moesim.capture.tiny_models import VOCABULARY, tiny_model  # noqa: E402
from moesim.cli.capture import capture_command  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

REFUSED = {"doge": "DogeCDMoE chooses and computes in one module"}
DEFAULT = ("llama4", "jetmoe", "switch_transformers", "zaya", "longcat_flash", "dbrx", "deepseek_v4", "qwen3_vl_moe")
"""One family for each way of reading a router, and the odd ones of the usual way."""
PADDED = (*DEFAULT[:6], "nllb_moe", "olmoe", "deepseek_v3", "gpt_oss", "inkling2_loop")
BLOCKS = ("deepseek_v4",)
"""Attention compresses blocks of columns, pads included, so pads move what a token sees (and what it chooses)."""
EXPERTS = {"longcat_flash": (8, 10), "zaya": (8, 9)}
"""Experts with weights, and as many as the router chooses from, where these are not 8."""


def sweep(names, default=DEFAULT):
    return [pytest.param(name, marks=() if name in default else pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def models():
    """Tiny models, built once."""
    built = {}
    return lambda family: built.setdefault(family, None) or built.update({family: tiny_model(family)}) or built[family]


def tokens(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(3, VOCABULARY - 2, shape))


def whole_pass(model, stack):
    """One unpadded pass over two sequences of seven tokens, without a cache; number of tokens and the output."""
    read = tokens(2, 7)
    with torch.no_grad():
        if stack == "encoder":
            return 14, model.get_encoder()(input_ids=read)
        if stack == "decoder":
            return 10, model(input_ids=read, decoder_input_ids=tokens(2, 5, seed=1), use_cache=False)
        return 14, model(input_ids=read, use_cache=False)


class Spy:
    """Wraps `forward` of routers and experts of one stack; notes copies of what goes in and what comes out."""

    def __init__(self, model, stack, monkeypatch):
        self.seen = []
        for name, module in model.named_modules():
            kind = type(module).__name__
            chooses = kind.endswith(("Router", "Gating", "V1Gate")) and ".self_attention." not in name
            if (chooses or kind.endswith("Experts")) and (stack is None or f".{stack}." in f".{name}"):
                monkeypatch.setattr(module, "forward", self.wrapped(module))

    def wrapped(self, module):
        forward = module.forward

        def spied(*args, **kwargs):
            given = inspect.signature(forward).bind(*args, **kwargs).args
            given = [value.clone() if isinstance(value, torch.Tensor) else value for value in given]
            output = forward(*args, **kwargs)
            copy = (
                tuple(o.clone() if isinstance(o, torch.Tensor) else o for o in output)
                if isinstance(output, tuple)
                else output.clone()
            )
            self.seen.append((module, given, copy))
            return output

        return spied

    def routers(self):
        return [one for one in self.seen if not type(one[0]).__name__.endswith("Experts")]

    def experts(self):
        found = []
        for module, given, _ in self.seen:
            flat = [g.reshape(-1, g.shape[-1]) for g in given[1:3] if isinstance(g, torch.Tensor)]
            if type(module).__name__.endswith("Experts") and len(flat) == 2 and not flat[0].is_floating_point():
                found.append((module, flat[0], flat[1]))
        return found


def used(model, spy):
    """What the model used in each layer: a dense [N, E] of weights, told from its own routers or experts."""
    kind = {type(module).__name__ for module, _, _ in spy.seen}
    if "Llama4Router" in kind:
        return [output[0] for _, _, output in spy.routers()]
    if "SwitchTransformersTop1Router" in kind:
        return [(mask * weight).flatten(0, 1) for _, _, (mask, weight, _) in spy.routers()]
    if "NllbMoeTop2Router" in kind:
        return [output[1] for _, _, output in spy.routers()]
    if "JetMoeTopKGating" in kind:
        dense = []
        for _, _, (_, token, weight, counts, logits) in spy.routers():
            table = torch.zeros_like(logits)
            for expert, pairs in enumerate(torch.arange(len(token)).split(counts)):
                table[token[pairs], expert] = weight[pairs]
            dense.append(table)
        return dense
    width = (
        max(output[0].shape[-1] for _, _, output in spy.routers() if isinstance(output, tuple))
        if all(isinstance(output, tuple) for _, _, output in spy.routers())
        else 8
    )
    return [
        torch.zeros(len(ids), max(width, 8), dtype=weights.dtype).scatter(1, ids.long(), weights)
        for _, ids, weights in spy.experts()
    ]


@pytest.mark.parametrize("family", sweep([name for name in moe_families() if name not in REFUSED]))
def test_captured_is_what_the_model_used(family, models, monkeypatch):
    model = models(family)
    for stack in stacks(model):
        with RoutingRecorder(model, stack=stack, horizons=3, scores=True) as recorder:
            num_tokens, watched = whole_pass(model, stack)
            routing = recorder.take(num_tokens)
        with monkeypatch.context() as patch:
            spy = Spy(model, stack, patch)
            _, bare = whole_pass(model, stack)
        assert torch.equal(watched[0], bare[0]), "watching must leave the model as it is"
        dense = used(model, spy)
        assert len(dense) == routing.expert_ids.shape[1] == len(recorder.layers)
        assert (recorder.num_real_experts, recorder.num_experts) == EXPERTS.get(family, (8, 8))
        for layer, weights_NE in enumerate(dense):
            ids, weights = routing.expert_ids[:, layer], routing.weights[:, layer]
            assert (weights.diff(dim=1) <= 0).all() and (ids.sort(dim=1).values.diff(dim=1) > 0).all()
            placed = torch.zeros(num_tokens, recorder.num_experts).scatter(1, ids, weights)
            expected = torch.zeros_like(placed)
            expected[:, : weights_NE.shape[1]] = weights_NE
            assert torch.equal(placed, expected)
            if family not in ("switch_transformers", "nllb_moe", "zaya"):  # those drop or skip
                assert (weights != 0).all()
        check_predictions(spy, routing, family)


def is_choice(value, top_k):
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and value.shape[-1] == top_k


def check_predictions(spy, routing, family):
    """Each prediction is the later router's own answer to a copy of what entered the earlier one."""
    routers = spy.routers()
    scores = [output[0] if isinstance(output, tuple) else output for _, _, output in routers]
    assert len(routing.predicted) == min(3, len(routers) - 1)
    if family == "llama4":
        scores = [output[1] for _, _, output in routers]
    if family in ("jetmoe", "switch_transformers", "nllb_moe"):
        scores = [output[-1] for _, _, output in routers]
    for layer, said in enumerate(scores):
        assert torch.equal(routing.scores[:, layer], said.float().reshape(routing.scores[:, layer].shape))
    for horizon, predicted in enumerate(routing.predicted, start=1):
        for layer in range(len(routers) - horizon):
            later, given = routers[layer + horizon][0], routers[layer][1]
            with torch.no_grad():
                answer = later(*given[: len(inspect.signature(later.forward).parameters)])
            values = answer if isinstance(answer, tuple) else (answer,)
            chosen = next((v for v in values if is_choice(v, predicted.shape[2])), None)
            if family == "zaya":
                chosen = chosen.masked_fill(values[1] == 0, 8)
            elif family in ("llama4", "dbrx", "jetmoe", "switch_transformers", "nllb_moe"):  # these bend no choice
                logits = values[1] if family == "llama4" else values[-1]
                chosen = logits.flatten(0, -2).topk(predicted.shape[2]).indices
            assert torch.equal(predicted[:, layer].sort(dim=1).values, chosen.sort(dim=1).values)


@pytest.mark.parametrize("family", sweep([name for name in moe_families() if name not in (*REFUSED, *BLOCKS)], PADDED))
def test_padded_prefill_and_decode_equal_one_whole_pass(family, models):
    model = models(family)
    for stack in stacks(model):
        prompts = [tokens(5).numpy(), tokens(9, seed=1).numpy()]
        with RoutingRecorder(model, stack=stack, horizons=1) as recorder:
            steps = 4 if writes(model, stack) else 0
            batch = run_batch(model, recorder, prompts, steps, lambda logits: logits.argmax(-1, keepdim=True), stack)
        for row, prompt in enumerate(prompts):
            real = batch.real[row]
            written = batch.tokens[row][real]
            read = {"input_ids": torch.from_numpy(prompt)[None]} | (
                {"decoder_input_ids": written[None]} if stack == "decoder" else {"input_ids": written[None]}
            )
            alone = model.get_encoder() if stack == "encoder" else model
            with torch.no_grad(), RoutingRecorder(model, stack=stack, horizons=1) as recorder:
                alone(**read)
                whole = recorder.take(len(written))
            assert batch.positions[row][real].tolist() == list(range(len(written)))
            assert torch.equal(batch.routing.expert_ids[row][real], whole.expert_ids)
            torch.testing.assert_close(batch.routing.weights[row][real], whole.weights, rtol=1e-3, atol=1e-5)
            assert torch.equal(batch.routing.predicted[0][row][real], whole.predicted[0])


@pytest.mark.parametrize("family", sweep(BLOCKS, ()))
def test_prompts_of_one_length_need_no_pads(family, models):
    model, prompts = models(family), list(tokens(2, 30).numpy())
    with RoutingRecorder(model) as recorder:
        batch = run_batch(model, recorder, prompts, 20, lambda logits: logits.argmax(-1, keepdim=True))
        assert batch.real.all()
        with torch.no_grad():
            model(input_ids=batch.tokens)
        assert torch.equal(batch.routing.expert_ids.flatten(0, 1), recorder.take(100).expert_ids)


def recorded(model, read, **settings):
    with RoutingRecorder(model, **settings) as recorder, torch.no_grad():
        model(**read)
        return recorder.take(read["input_ids"].numel())


@pytest.mark.parametrize("family", ["llama4", "jetmoe"])
def test_ids_and_weights_make_the_output_of_the_block(family, models):
    """Each token through its experts alone, weighted as captured, is what the block computed."""
    model = models(family)
    seen = []
    name = "JetMoeMoE" if family == "jetmoe" else "Llama4TextMoe"
    block = next(module for module in model.modules() if type(module).__name__ == name)
    handle = block.register_forward_hook(lambda _m, args, output: seen.append((args[0], output)))
    routing = recorded(model, {"input_ids": tokens(2, 7)})
    handle.remove()
    hidden, output = seen[0][0].flatten(0, 1), seen[0][1]
    output = (output[0] if isinstance(output, tuple) else output).reshape(hidden.shape)
    with torch.no_grad():
        made = block.bias.expand_as(hidden).clone() if family == "jetmoe" else block.shared_expert(hidden)
        for token, (ids, weights) in enumerate(zip(routing.expert_ids[:, 0], routing.weights[:, 0], strict=True)):
            for expert, weight in zip(ids.tolist(), weights, strict=True):
                if family == "jetmoe":
                    gate, up = (block.input_linear.weight[expert] @ hidden[token]).chunk(2)
                    made[token] += weight * (block.output_linear.weight[expert] @ (block.activation(gate) * up))
                else:  # Llama 4 weighs what enters the expert
                    up = (weight * hidden[token]) @ block.experts.gate_up_proj[expert]
                    made[token] += (up.chunk(2)[1] * block.experts.act_fn(up.chunk(2)[0])) @ block.experts.down_proj[
                        expert
                    ]
    torch.testing.assert_close(made, output, rtol=1e-4, atol=1e-5)


def test_switch_keeps_the_choice_of_a_dropped_token_with_weight_0(models):
    model = models("switch_transformers")
    read = {"input_ids": tokens(2, 24), "decoder_input_ids": tokens(2, 24)}
    free = recorded(model, read, stack="encoder")
    routers = [module for module in model.modules() if type(module).__name__ == "SwitchTransformersTop1Router"]
    capacity = routers[0].expert_capacity
    for router in routers:
        router.expert_capacity = 2
    full = recorded(model, read, stack="encoder")
    for router in routers:
        router.expert_capacity = capacity
    assert torch.equal(full.expert_ids[:, 0], free.expert_ids[:, 0]), "the first router sees the same"
    for request in (full.expert_ids[:, 0, 0].split(24),):
        for ids, weights in zip(request, full.weights[:, 0, 0].split(24), strict=True):
            turn = [(ids[:place] == ids[place]).sum() for place in range(24)]
            assert [weight > 0 for weight in weights.tolist()] == [bool(earlier < 2) for earlier in turn]
    assert (free.weights > 0).all() and (full.weights == 0).any()


def test_nllb_keeps_the_choices_of_a_full_expert_with_weight_0(models):
    model = models("nllb_moe")
    routers = [module for module in model.modules() if type(module).__name__ == "NllbMoeTop2Router"]
    read = {"input_ids": tokens(2, 24), "decoder_input_ids": tokens(2, 24)}
    for router in routers:
        router.moe_eval_capacity_token_fraction = 0.1  # 5 of 48 tokens
    full = recorded(model, read, stack="encoder", scores=True)
    for router in routers:
        router.moe_eval_capacity_token_fraction = 1.0
    ids, weights = full.expert_ids[:, 0], full.weights[:, 0]
    assert torch.equal(ids.sort(dim=1).values, full.scores[:, 0].topk(2).indices.sort(dim=1).values)
    kept = torch.zeros(48, 8).scatter(1, ids, (weights > 0).float())
    assert kept.sum(0).max() <= 10 and (weights == 0).any() and (weights > 0).any()


def test_zaya_skips_have_an_id_of_their_own(models):
    model = models("zaya")
    routers = [module for module in model.modules() if type(module).__name__ == "ZayaRouter"]
    before = [router.balancing_biases.clone() for router in routers]
    for router in routers:
        router.balancing_biases[-1] = 0.3
    routing = recorded(model, {"input_ids": tokens(2, 24)}, horizons=1, predict_width=3)
    for router, biases in zip(routers, before, strict=True):
        router.balancing_biases.copy_(biases)
    skipped = routing.expert_ids == 8
    assert skipped.any() and not skipped.all()
    assert torch.equal(skipped, routing.weights == 0)
    ranked = routing.predicted[0].flatten(0, 1)
    assert ranked.shape[1] == 3 and (ranked.sort(dim=1).values.diff(dim=1) > 0).all()


def test_layers_that_run_again_are_numbered_by_turn(models):
    model = models("inkling2_loop")
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(input_ids=tokens(1, 5))
        recorder.take(5)
    assert recorder.layers_repeat
    assert recorder.layers == tuple(range(len(recorder.layers))) and len(recorder.layers) == 6


def test_what_is_refused_says_why(models):
    for family, reason in REFUSED.items():
        told = prove(family)
        assert not told.captured and told.because.startswith(reason)
    with pytest.raises(UnsupportedFamilyError, match=r"diffusion_gemma.*its decoder routes the same places again"):
        check_stack(models("diffusion_gemma"), "decoder")
    with pytest.raises(UnsupportedFamilyError, match=r"'mixtral'.*no encoder to choose"):
        check_stack(models("mixtral"), "encoder")


def test_the_command_proves_what_it_lists(monkeypatch):
    monkeypatch.setattr("moesim.capture.families.moe_families", lambda: ["olmoe", "doge", "switch_transformers"])
    run = CliRunner().invoke(capture_command, ["--families", "--json"], catch_exceptions=False)
    olmoe, doge, switch = json.loads(run.stdout)
    assert olmoe == {
        "family": "olmoe", "model": "OlmoeForCausalLM", "captured": True, "how": "what the experts are given",
        "stacks": "", "horizons": 3, "scores": True, "because": "",
    }  # fmt: skip
    assert not doge["captured"] and "one module" in doge["because"]
    assert switch["captured"] and switch["stacks"] == "decoder, encoder"
    run = CliRunner().invoke(capture_command, ["--families"], catch_exceptions=False)
    assert "2 of 3 families can be captured" in run.stdout


def test_at_least_sixty_families_are_found():
    assert len(moe_families()) - len(REFUSED) >= 60
