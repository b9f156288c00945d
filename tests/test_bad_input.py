"""Ten broken files, ten good errors: one message that lists every mistake, exit code 2, no traceback."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from moesim.cli import cli, main
from moesim.files.traces import write_trace
from moesim.routing.synthetic import zipf_trace

GOOD = """
model = "olmoe-1b-7b"
hardware = "hgx-h100"
trace = "trace.parquet"
[layout]
attention = { dp = 8, tp = 1 }
experts = { ep = 8 }
[workload]
num_requests = 16
output_tokens = 4
"""


@pytest.fixture
def folder(tmp_path):
    write_trace(zipf_trace(16, 64, 8, num_requests=4, prompt_tokens=6, output_tokens=4), tmp_path / "trace.parquet")
    write_trace(zipf_trace(3, 8, 2, num_requests=4, prompt_tokens=6, output_tokens=4), tmp_path / "other.parquet")
    whole = (tmp_path / "trace.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    machine = Path(__file__).parents[1] / "hwprofiles" / "nodes" / "hgx-h100.toml"
    text = machine.read_text()
    assert "bytes_per_s = 450e9" in text
    (tmp_path / "machine.toml").write_text(text.replace("bytes_per_s = 450e9", "bytes_per_s = -450e9"))
    return tmp_path


def check(folder, text, monkeypatch, capsys, name="scenario.toml"):
    """Exit code and stderr of `moesim check`, through the real entry point."""
    path = folder / name
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr("sys.argv", ["moesim", "check", str(path)])
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    return code, capsys.readouterr()


def test_the_good_file_is_good(folder, monkeypatch, capsys):
    code, seen = check(folder, GOOD, monkeypatch, capsys)
    assert code == 0, seen.err
    assert "1 set-up" in seen.out


BROKEN = {
    "typo in a key, and a wrong type": (
        GOOD.replace("num_requests", "num_request").replace("dp = 8", 'dp = "8"'),
        ["workload.num_request: unknown key; nearest: 'num_requests'", "layout.attention.dp", "must be a whole number"],
    ),
    "negative bandwidth": (GOOD.replace('"hgx-h100"', '"machine.toml"'), ["machine.toml", "bytes_per_s", "-450"]),
    "layout that does not divide, and no such policy": (
        GOOD.replace("dp = 8", "dp = 3") + '[policies]\ncache = "lruu"\n',
        ["dp x cp x tp must equal the 8 devices", "given 3 x 1 x 1 = 3", "policies.cache: unknown 'lruu'"],
    ),
    "weights that do not fit": (
        GOOD.replace("hgx-h100", "rtx-4090").replace("dp = 8", "dp = 1").replace("ep = 8", "ep = 1")
        + "prompt_tokens = 9000\n",
        ["memory: needs", "experts 12.0", "kv_cache", "device_expert_fraction"],
    ),
    "trace of another shape": (
        GOOD.replace("trace.parquet", "other.parquet"),
        ["has 3 MoE layers", "has 8 experts,", "has 2 experts per token"],
    ),
    "truncated Parquet": (GOOD.replace("trace.parquet", "cut.parquet"), ["cut.parquet"]),
    "empty file": ("", ["is empty"]),
    "not TOML": (GOOD + "[layout", ["TOML"]),
    "names that do not exist": (
        GOOD.replace("olmoe-1b-7b", "olmo-1b").replace("hgx-h100", "hgx-h1000").replace("trace.parquet", "nothing"),
        ["olmoe-1b-7b", "hgx-h100", "nothing"],
    ),
    "numbers that cannot be": (
        GOOD.replace("output_tokens = 4", "output_tokens = 0") + "[policies]\ndevice_expert_fraction = 1.5\n",
        ["output_tokens must be at least 2, given 0", "must lie in 0..1, given 1.5"],
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_one_error_names_every_mistake(folder, monkeypatch, capsys, what):
    text, expected = BROKEN[what]
    code, seen = check(folder, text, monkeypatch, capsys)
    assert code == 2
    assert "Traceback" not in seen.err
    assert seen.err.count("error:") == 1
    for words in expected:
        assert words in seen.err, seen.err


def test_a_directory_and_a_missing_file(folder, monkeypatch, capsys):
    for name, words in {"": "is a directory", "nowhere.toml": "does not exist"}.items():
        code, seen = check(folder, None, monkeypatch, capsys, name)
        assert code == 2
        assert words in seen.err


def test_run_stops_in_the_same_way(folder, monkeypatch, capsys):
    path = folder / "scenario.toml"
    path.write_text(GOOD)
    monkeypatch.setattr("sys.argv", ["moesim", "run", str(path), "--set", "workload.num_requests=-1", "--set", "oops"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "--set oops: must be path=value" in err
    monkeypatch.setattr("sys.argv", ["moesim", "run", str(path), "--report", str(folder)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2


def test_every_set_up_beside_the_base_is_checked(folder):
    path = folder / "scenario.toml"
    path.write_text(GOOD + "[beside.wrong.workload]\nnum_requests = 0\n[beside.typo]\nmodle = 'x'\n")
    with pytest.raises(ValueError, match=r"(?s)beside\.typo\.modle: unknown key.*") as error:
        from moesim import load

        load(path)
    path.write_text(GOOD + "[beside.wrong.workload]\nnum_requests = 0\n")
    with pytest.raises(ValueError, match=r"beside\.wrong\.workload: num_requests must be at least 1, given 0"):
        load(path)
    assert "2 mistakes" in str(error.value) or "1 mistake" in str(error.value)


def test_made_up_routing_is_labelled_and_takes_the_models_shape(folder):
    from moesim import load, run

    path = folder / "scenario.toml"
    path.write_text(GOOD.replace("trace.parquet", "zipf:0.3").replace("olmoe-1b-7b", "qwen3-30b-a3b"))
    (scenario,) = load(path)
    assert (scenario.trace.num_layers, scenario.trace.num_experts, scenario.trace.top_k) == (48, 128, 8)
    assert "synthetic" in run(scenario, "estimate").warnings[0]
    path.write_text(GOOD.replace("trace.parquet", "zipf:hot"))
    with pytest.raises(ValueError, match="zipf:EXPONENT"):
        load(path)


def test_what_cannot_be_lowered_is_an_error_and_dense_models_run(folder):
    from moesim import load, run

    path = folder / "scenario.toml"
    text = GOOD.replace("trace.parquet", "zipf")
    path.write_text(text.replace("olmoe-1b-7b", "switch-base-128"))
    with pytest.raises(ValueError, match="encoder-decoder"):
        load(path)
    dense = text.replace("olmoe-1b-7b", "llama-3-70b").replace("dp = 8, tp = 1", "dp = 1, tp = 8")
    path.write_text(dense.replace("ep = 8", "ep = 1, etp = 8"))
    assert run(load(path)[0]).metrics["tpot_s"] > 0


def test_help_is_there():
    for args in ([], ["run"], ["check"], ["list"], ["capture"]):
        result = CliRunner().invoke(cli, [*args, "--help"])
        assert result.exit_code == 0
        assert "Usage" in result.output
