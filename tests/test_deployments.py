"""The deployments of studies/: read without mistakes, and few requests of each are answered by every set-up."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest

from moesim import verbs
from moesim.files.services import is_service
from moesim.serving.instance import prices_of
from moesim.simulate.serving import ServiceRun

STUDIES = Path(__file__).parents[1] / "studies"
DEPLOYMENTS = [path for path in sorted(STUDIES.glob("*.toml")) if is_service(tomllib.loads(path.read_text()))]
FEW = {"num_requests": 50, "concurrency": 20}


def few(path: Path) -> list[str]:
    """Changes that leave few requests, in every set-up."""
    values = tomllib.loads(path.read_text())
    tables = {"requests": values["requests"]}
    tables |= {f"beside.{name}.requests": of.get("requests", {}) for name, of in values.get("beside", {}).items()}
    found = []
    for where, table in tables.items():
        found += [f"{where}.{key}={number}" for key, number in FEW.items() if key in table]
        found += [f"{where}.duration_s=0.3"] if "duration_s" in table else []
    return found


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.stem)
def test_a_deployment_is_read_without_mistakes_and_asks_a_question(path):
    services = verbs.load_services(path)
    asks = path.read_text().partition("\n")[0]
    assert len(services) == 1 + len(tomllib.loads(path.read_text()).get("beside", {}))
    assert asks.startswith("# ") and asks.endswith("?")
    traces = [str(service.plain["trace"]) for service in services]
    assert not any("/" in name or ".parquet" in name for name in traces), "a study needs no other file"


@pytest.mark.slow
@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.stem)
def test_few_requests_of_a_deployment_are_all_answered(path):
    for service in verbs.load_services(path, few(path)):
        outcome = verbs.simulate_service(service)
        assert 0 < len(service.requests) < 200
        assert not outcome.is_partial
        assert (outcome.generated_Q == outcome.output_Q).all(), service.name


def burst(**fleet: object) -> ServiceRun:
    """Forty prompts that are done together, to be decoded by eight ranks."""
    path = next(path for path in DEPLOYMENTS if path.stem == "gb200_nvl72")
    changes = [
        "requests.num_requests=40", "requests.concurrency=40", "decode_engine.data_parallel_size=8",
        "decode_engine.num_redundant_experts=0", "requests.output_tokens=64", "requests.prompt_tokens=512",
        *(f'fleet.{key}="{value}"' for key, value in fleet.items()),
    ]  # fmt: skip
    return ServiceRun(verbs.load_services(path, changes)[0], "value", lambda finished, now_s: None, prices_of)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["least_loaded", "least_tokens"])
def test_caches_on_their_way_count_at_the_rank_that_they_go_to(router):
    run = burst(decode_router=router)
    outcome = run.play()
    at_D = np.bincount(outcome.group_Q, minlength=8)
    assert np.ptp(at_D) <= 1, "a burst is spread evenly, though no cache of it has arrived"
    assert not run.decode.coming_XID.any()
