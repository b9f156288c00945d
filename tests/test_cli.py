"""The command line as a user meets it, on the packaged quickstart."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from moesim.cli import cli

QUICKSTART = str(Path(__file__).parents[1] / "studies" / "quickstart.toml")
SHORT = ["--set", "workload.output_tokens=4", "--set", "workload.num_requests=16"]


def invoke(*args):
    result = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_has_the_promised_shape_and_the_same_bytes_twice():
    once, again = invoke("run", QUICKSTART, "--json", *SHORT), invoke("run", QUICKSTART, "--json", *SHORT)
    assert once == again
    shape = json.loads(once)
    assert {"scenario", "engine", "seed", "version", "metrics", "intervals", "provenance", "beside"} <= shape.keys()
    assert set(shape["provenance"]) == {f"{s}_fraction" for s in ("measured", "fitted", "datasheet", "assumed")}
    assert set(shape["beside"]) == {"tp8", "rtx-4090-offload"}
    for low, high in shape["intervals"].values():
        assert low <= high
    offload = shape["beside"]["rtx-4090-offload"]["metrics"]
    assert 0 < offload["expert_hit_rate"] < 1


def test_report_and_timeline_are_written(tmp_path):
    invoke("run", QUICKSTART, *SHORT, "--report", str(tmp_path / "r.html"), "--perfetto", str(tmp_path / "t.json"))
    page = (tmp_path / "r.html").read_text()
    for name in ("ep8", "tp8", "rtx-4090-offload"):
        assert name in page
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {"X", "M", "s", "f"} <= {event["ph"] for event in events}
    assert len(list(tmp_path.iterdir())) == 2


def test_both_engines_run_the_quickstart_alike():
    a = json.loads(invoke("run", QUICKSTART, "--json", "--engine", "estimate", *SHORT))
    b = json.loads(invoke("run", QUICKSTART, "--json", "--engine", "simulate", *SHORT))
    for name, value in a["metrics"].items():
        assert b["metrics"][name] == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("kind", ["models", "hardware", "policies", "traces", "studies"])
def test_list(kind):
    rows = json.loads(invoke("list", kind, "--json"))
    assert rows
    text = invoke("list", kind)
    for row in rows:
        assert str(next(iter(row.values()))) in text or kind == "policies"


def test_import_is_light():
    heavy = ("numba", "simpy", "matplotlib", "torch", "pyarrow")
    code = f"import sys, moesim; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"
    code = "import sys, moesim.cli; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"


def test_public_names_load():
    import moesim

    for name in moesim.__all__:
        assert getattr(moesim, name) is not None
