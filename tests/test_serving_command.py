"""`moesim run` knows a service from a closed batch."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from serving_cases import queue, small_service

from moesim import verbs
from moesim.cli import cli
from moesim.fleet import Slo


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    path = tmp_path / "service.toml"
    path.write_text("[requests]\n")
    monkeypatch.setattr(verbs, "load_services", lambda path, changes=(): [small_service(num=40, slo=Slo(ttft_s=0.5))])
    monkeypatch.setattr(verbs, "simulate_service", lambda service, bound="value", tell=None: queue(service, bound))
    return lambda *args: CliRunner().invoke(cli, ["run", str(path), *args])


def test_a_file_with_requests_is_run_as_a_service(invoke):
    result = invoke("--json", "--find", "rate")
    assert result.exit_code == 0
    assert "ttft_p99_s" in json.loads(result.stdout)["metrics"]


def test_options_of_the_other_kind_are_refused(invoke):
    assert "--engine simulate" in str(invoke("--engine", "estimate").exception)
    result = CliRunner().invoke(cli, ["run", "studies/quickstart.toml", "--find", "rate"])
    assert "no [requests] table" in str(result.exception)
