"""What fits a box: sound answers, and every mistake of a file at once."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from moesim.boxes import ALL_HERE, fit_box
from moesim.cli import cli
from moesim.files.boxes import UPGRADES, load_box, upgraded

GOOD = """
[box]
hardware = "workstation-4090"
host_memory_bytes = 68.7e9
stickiness = 0.33
models = ["mixtral-8x7b", "olmoe-1b-7b", "deepseek-v3"]
systems = ["fiddler", "on_demand", "llama_cpp_experts"]
[dtypes]
experts = "int4"
[workload]
num_requests = 1
prompt_tokens = 8
output_tokens = 5
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "box.toml"
    path.write_text(GOOD)
    return path


def test_the_best_is_the_best_and_what_does_not_fit_says_why(file):
    olmoe, mixtral, v3 = fit_box(load_box(file))
    assert olmoe.best == ALL_HERE and olmoe.on_device == 1 and olmoe.hit_rate == 1
    assert set(olmoe.gains.values()) == {1.0}, "nothing helps a model that fits"
    assert set(mixtral.rates) == {"fiddler", "on_demand", "llama_cpp_experts"}
    assert list(mixtral.rates.values()) == sorted(mixtral.rates.values(), reverse=True)
    assert 0 < mixtral.hit_rate < 1 and 0 < mixtral.on_device < 1
    assert mixtral.low < mixtral.rates[mixtral.best] < mixtral.high
    assert set(mixtral.gains) == set(UPGRADES) and all(gain >= 1 - 1e-9 for gain in mixtral.gains.values())
    assert mixtral.gains["vram"] > 1.2
    assert v3.reason == "memory: 309 GiB of experts stay in host memory, which has 64 GiB" and not v3.rates


def test_an_upgrade_changes_one_thing(file):
    box = load_box(file).cluster
    assert upgraded(box, "vram").device.memory.capacity_bytes == 2 * box.device.memory.capacity_bytes
    assert upgraded(box, "link").host_link.bytes_per_s == 2 * box.host_link.bytes_per_s
    assert upgraded(box, "dram").host.memory.bytes_per_s == 2 * box.host.memory.bytes_per_s
    assert upgraded(box, "") is box and upgraded(box, "link").device is box.device


def test_the_command_prints_a_table_or_json_and_writes_a_picture(file, tmp_path):
    picture = tmp_path / "box.png"
    shown = CliRunner().invoke(cli, ["run", str(file), "--report", str(picture)])
    assert shown.exit_code == 0, shown.output
    assert "mixtral-8x7b" in shown.output and "What does not" in shown.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    shape = json.loads(CliRunner().invoke(cli, ["run", str(file), "--json"]).stdout)
    assert [fit["model"] for fit in shape["fits"]] == ["olmoe-1b-7b", "mixtral-8x7b", "deepseek-v3"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("workstation-4090", "hgx-h100", ["box.hardware: needs one device and a host"]),
        ("0.33", "1.5", ["box.stickiness: must lie in 0..1, given 1.5"]),
        ('"fiddler"', '"fidler"', ["box.systems: unknown 'fidler'; nearest: 'fiddler'"]),
        ('"olmoe-1b-7b"', '"llama-3.1-8b"', ["box.models: 'llama-3.1-8b' is not a decoder with experts"]),
        ("stickiness", "stikiness", ["box.stikiness: unknown key", "box.stickiness: is missing"]),
        ("[dtypes]", "[dtype]", ["dtype: unknown key"]),
    ],
)
def test_mistakes_of_a_file(file, old, new, says):
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(ValueError) as error:
        load_box(file)
    for part in says:
        assert part in str(error.value)
    assert CliRunner().invoke(cli, ["run", str(file)]).exit_code != 0


def test_a_report_that_is_no_picture_is_refused(file, tmp_path):
    with pytest.raises(ValueError, match=r"give a .png, .svg or .pdf"):
        CliRunner().invoke(cli, ["run", str(file), "--report", str(tmp_path / "x.html")], catch_exceptions=False)
