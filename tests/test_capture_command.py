"""The command on saved models: streams, interruptions, stacks, what it measures and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

import moesim.capture.capture as capturing  # noqa: E402
from moesim.capture.capture import Watch, capture  # noqa: E402
from moesim.capture.tiny_models import VOCABULARY, tiny_model  # noqa: E402
from moesim.cli import cli  # noqa: E402
from moesim.files.traces import TraceWriter, read_trace, write_trace  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = " ".join(f"w{number % (VOCABULARY - 4)}" for number in range(600))
SMALL = {"num_requests": 6, "prompt_tokens": (4, 7), "output_tokens": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saved tiny models with a tokenizer of whole words, made when first asked for."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            torch.set_num_threads(1)
            tiny_model(family).save_pretrained(made[family])
            words = {f"w{number}": number + 2 for number in range(VOCABULARY - 4)} | {"<unk>": 0, "<pad>": 1}
            tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
            transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(
                made[family]
            )
            (made[family] / "text.txt").write_text(WORDS)
        return made[family]

    return of


def run(*arguments):
    result = CliRunner().invoke(cli, ["capture", *map(str, arguments)])
    if isinstance(result.exception, ValueError):
        return 2, result.stdout, str(result.exception)
    return result.exit_code, result.stdout, result.stderr


def test_encoder_decoder_stacks(folder, tmp_path):
    for stack in ("decoder", "encoder"):
        out = tmp_path / f"{stack}.parquet"
        output = 0 if stack == "encoder" else 2
        capture(
            folder("nllb_moe"),
            [WORDS],
            out,
            **(SMALL | {"output_tokens": output}),
            watch=Watch(stack=stack, scores=True),
        )
        trace = read_trace(out)
        assert trace.layers == (0, 1, 2, 3) and len(trace.predicted_HTLW) == 3
        assert trace.provenance["layers"].startswith(f"of the {stack}")
        counts = np.bincount(trace.request_T)
        if stack == "decoder":
            assert counts.tolist() == [3] * 6 and trace.is_decode_T.tolist() == [False, True, True] * 6
        else:
            assert set(counts) <= {4, 5, 6, 7} and len(set(counts)) > 1 and not trace.is_decode_T.any()
            assert not (trace.token_id_T == 1).any(), "pads are left out"


def test_what_only_a_run_tells_is_in_the_provenance(folder, tmp_path):
    capture(folder("longcat_flash"), [WORDS], tmp_path / "t.parquet", **SMALL, watch=Watch(predict_width=5))
    trace = read_trace(tmp_path / "t.parquet")
    assert trace.num_experts == 10 and trace.expert_ids_TLK.max() >= 8
    assert trace.provenance["experts"].startswith("ids from 8 on compute nothing")
    assert {ids_TLW.shape[2] for ids_TLW in trace.predicted_HTLW} == {5}
    capture(folder("zaya"), [WORDS], tmp_path / "z.parquet", **SMALL)
    assert read_trace(tmp_path / "z.parquet").provenance["routers"] == "router: may skip experts"


def test_options_reach_the_trace(folder, tmp_path):
    olmoe = folder("olmoe")
    code, stdout, _ = run(
        olmoe, "--text", olmoe / "text.txt", "-o", tmp_path / "t.parquet", "--requests", 3, "--prompt-tokens", "4-6",
        "--output-tokens", 1, "--horizons", 2, "--predict-width", 4, "--scores",
    )  # fmt: skip
    trace = read_trace(tmp_path / "t.parquet")
    assert code == 0 and stdout == ""
    assert [ids_TLW.shape[1:] for ids_TLW in trace.predicted_HTLW] == [(3, 4), (2, 4)]
    assert trace.scores_TLE.shape[1:] == (4, 8)
    best_TLK = np.sort(trace.scores_TLE.argsort(axis=2)[..., -2:], axis=2)
    assert (best_TLK == np.sort(trace.expert_ids_TLK, axis=2)).all()  # OLMoE bends no choice


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (RuntimeError, 1)])
@pytest.mark.parametrize("done", [0, 2])
def test_an_interrupted_capture_keeps_whole_batches(folder, tmp_path, monkeypatch, error, code, done):
    whole, out = tmp_path / "whole.parquet", tmp_path / "t.parquet"
    capture(folder("olmoe"), [WORDS], whole, **SMALL)
    batches = []

    def fails_later(*args, **kwargs):
        batches.append(capturing_run(*args, **kwargs))
        if len(batches) > done + 1:  # the first is the trial before the batches
            raise error("stop")
        return batches[-1]

    capturing_run = capturing.run_batch
    monkeypatch.setattr(capturing, "run_batch", fails_later)
    olmoe = folder("olmoe")
    given, _, stderr = run(
        olmoe, "--text", olmoe / "text.txt", "-o", out, "--requests", 6, "--prompt-tokens", "4-7",
        "--output-tokens", 2, "--batch", 2,
    )  # fmt: skip
    assert given == code
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    if not done:
        assert not out.exists() and "was not written" in stderr
        return
    assert "holds the first 4 of 6 requests" in stderr
    trace, all_of_it = read_trace(out), read_trace(whole)
    rows = all_of_it.request_T < 4
    assert trace.expert_ids_TLK.tolist() == all_of_it.expert_ids_TLK[rows].tolist()
    assert trace.num_experts == 8 and trace.provenance["requests"].startswith("asked for 6")


def test_parts_are_dropped_unless_they_are_to_be_kept(folder, tmp_path):
    capture(folder("olmoe"), [WORDS], tmp_path / "t.parquet", **SMALL)
    trace = read_trace(tmp_path / "t.parquet")
    for keep in (False, True):
        path = tmp_path / f"{keep}.parquet"
        with pytest.raises(RuntimeError), TraceWriter(path, keep_parts=keep) as writer:
            writer.append(trace)
            raise RuntimeError
        assert path.exists() is keep
    write_trace(trace, tmp_path / "again.parquet")
    assert (tmp_path / "True.parquet").read_bytes() == (tmp_path / "again.parquet").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.slow
def test_signals(folder, tmp_path, number):
    """A real process: Ctrl-C and SIGTERM leave the batches that were done; SIGKILL leaves nothing to read."""
    out = tmp_path / "t.parquet"
    model_dir = str(folder("olmoe"))
    process = subprocess.Popen(
        [
            sys.executable, "-m", "moesim", "capture", model_dir, "--text", f"{model_dir}/text.txt",
            "-o", str(out), "--requests", "100", "--prompt-tokens", "4", "--output-tokens", "400", "--batch", "1",
        ],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # it is ignored in background jobs
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size > 40_000 for path in tmp_path.glob(".t.parquet.*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    if number == signal.SIGKILL:
        assert not out.exists()
        return
    requests = len(np.unique(read_trace(out).request_T))
    assert 0 < requests < 100 and f"holds the first {requests} of 100 requests" in " ".join(stderr.split())


def test_overhead_is_measured_in_pairs(folder):
    olmoe = folder("olmoe")
    code, stdout, _ = run(
        olmoe, "--text", olmoe / "text.txt", "--measure-overhead", 2, "--batch", 2, "--prompt-tokens", 8,
        "--output-tokens", 2, "--horizons", 1, "--scores", "--json",
    )  # fmt: skip
    rows = json.loads(stdout)
    assert code == 0
    assert [row["recorded"] for row in rows[::2]] == ["ids and weights", "+ 1 horizon", "+ scores"]
    assert [row["phase"] for row in rows] == ["prefill", "decode"] * 3
    assert all(row["bare (CPU ms)"] > 0 and row["watched (CPU ms)"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("family", "arguments", "says"),
    [
        ("olmoe", ["--horizons", "4"], r"horizons must be 0 to 3; given 4"),
        (
            "nemotron_h",
            ["--horizons", "3"],
            r"horizons must be below the 3 MoE layers of NemotronHForCausalLM; given 3",
        ),
        ("olmoe", ["--predict-width", "9"], r"predict_width must be at most 8 experts; given 9"),
        ("olmoe", ["--prompt-tokens", "500", "--output-tokens", "20"], r"'olmoe' has 512 positions .* need 520"),
        ("olmoe", ["--stack", "encoder"], r"'olmoe'.*no encoder to choose"),
        ("nllb_moe", ["--stack", "encoder"], r"'nllb-moe'.*its encoder writes no tokens, so output_tokens must be 0"),
        ("doge", [], r"'doge'.*DogeCDMoE chooses and computes in one module"),
        ("olmoe", ["--measure-overhead", "0"], r"at least 1 pair"),
    ],
)
def test_what_cannot_be_is_one_message(folder, tmp_path, family, arguments, says):
    import re

    given = ["--requests", 1, "--output-tokens", 2, *arguments]
    if "--prompt-tokens" not in given:
        given += ["--prompt-tokens", 6]
    code, _, stderr = run(folder(family), "--text", folder(family) / "text.txt", "-o", tmp_path / "t.parquet", *given)
    assert code == 2 and re.search(says, stderr) and not list(tmp_path.iterdir())


def test_a_folder_without_a_tokenizer(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder("olmoe") / "config.json").read_text())
    with pytest.raises(ValueError, match="no tokenizer that transformers can load"):
        capture(tmp_path, [WORDS], tmp_path / "t.parquet")
    code, _, stderr = run(tmp_path)
    assert code == 2 and "--text, --out missing" in stderr


def test_routers_that_cannot_be_asked(folder, tmp_path, monkeypatch):
    """Predictions are left out with a note, or refused when they were asked for."""
    monkeypatch.setattr("moesim.capture.hooks.ranking", lambda _choice, _width: None)
    olmoe = folder("olmoe")
    given = [olmoe, "--text", olmoe / "text.txt", "-o", tmp_path / "t.parquet", "--requests", 1, "--prompt-tokens", 4]
    code, _, stderr = run(*given, "--output-tokens", 1)
    assert code == 0 and "no predictions: OlmoeTopKRouter does not tell a ranking of 2 experts" in stderr
    assert read_trace(tmp_path / "t.parquet").predicted_HTLW == ()
    code, _, stderr = run(*given, "--horizons", 1)
    assert code == 2 and "ask for 0 horizons" in stderr
