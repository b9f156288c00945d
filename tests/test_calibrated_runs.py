"""A calibration in a run: each factor moves its own parts, the host's work is added, residuals become the interval."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import small_scenario

from moesim import load, run
from moesim.calibrate.calibration import calibrate
from moesim.calibrate.serving import predict_with, price_runs
from moesim.costs.calibration import CONSTANTS, NAMES, Calibration
from moesim.files.profiles.calibrated import write_calibration
from moesim.files.runs import Run
from moesim.layout import AttentionGrid, ExpertGrid, Layout

QUICKSTART = Path(__file__).parents[1] / "studies" / "quickstart.toml"
HOST_S = 1e-5


def made(kernels="roofline", **values) -> Calibration:
    """Every factor 1, no time of the host to speak of, and an interval of -10 % to +20 %."""
    neutral = {name: 1.0 if name.endswith("_factor") else next(c.value for c in CONSTANTS if c.name == name)
               for name in NAMES}  # fmt: skip
    given = neutral | {"iteration_overhead_s": HOST_S} | values
    return Calibration(given, dict.fromkeys(NAMES, "fitted: made up"), 0.9, 1.2, kernels, {})


def scenarios():
    """Spread experts over two nodes; matrices cut in four; experts in host memory."""
    return {
        "ep": small_scenario(nodes=2, shared=32),
        "tp": small_scenario(spread=False, tp=4),
        "offload": small_scenario(per_node=1, spread=False, fraction=0.5),
    }


@pytest.mark.parametrize("engine", ["simulate", "estimate"])
@pytest.mark.parametrize("name", ["ep", "tp", "offload"])
def test_factors_of_one_add_the_hosts_work_to_each_iteration_and_nothing_else(name, engine):
    plain = scenarios()[name]
    before, after = (run(replace(plain, calibration=c), engine) for c in (None, made()))
    assert after.metrics["tpot_s"] == pytest.approx(before.metrics["tpot_s"] + HOST_S)
    for phase, parts in before.breakdown_s.items():
        assert after.breakdown_s[phase].pop("host") == pytest.approx(HOST_S)
        assert after.breakdown_s[phase] == pytest.approx(parts, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "constant", "parts"),
    [
        ("tp", "gemm_factor", {"attention", "dense", "router", "head"}),
        ("tp", "attention_factor", {"attention"}),
        ("tp", "experts_factor", {"experts"}),
        ("tp", "collective_factor", {"allreduce"}),
        ("tp", "collective_start_factor", {"allreduce"}),
        ("tp", "launch_factor", {"attention", "dense", "router", "head", "experts"}),
        ("tp", "internode_start_factor", set()),
        ("ep", "internode_start_factor", {"dispatch", "combine"}),
    ],
)
def test_a_factor_makes_its_own_parts_slower(name, constant, parts):
    plain = scenarios()[name]
    before, after = (
        run(replace(plain, calibration=made(**given)), "estimate").breakdown_s["decode"]
        for given in ({}, {constant: 2.0})
    )
    for part in ("attention", "dense", "router", "head", "experts", "allreduce", "dispatch", "combine"):
        if part in before:
            assert (after[part] > before[part] * (1 + 1e-9)) == (part in parts), part
            assert after[part] <= 2 * before[part] * (1 + 1e-9)


def test_residuals_are_the_interval_of_decoding_and_the_least_width_of_the_rest():
    result = run(replace(scenarios()["ep"], calibration=made()), "estimate")
    plain = run(scenarios()["ep"], "estimate")
    low, high = result.intervals["tpot_s"]
    value = result.metrics["tpot_s"]
    assert (low, high) == pytest.approx((0.9 * value, 1.2 * value))
    rate = result.metrics["output_tokens_per_s"]
    assert result.intervals["output_tokens_per_s"] == pytest.approx((rate / 1.2, rate / 0.9))
    for name in ("ttft_s", "prefill_tokens_per_s"):
        ends, was = result.intervals[name], plain.intervals[name]
        assert ends[1] / ends[0] >= max(1.2 / 0.9, was[1] / was[0] * 0.9)
    assert "num_requests" not in result.intervals


def test_a_factor_on_a_measured_time_is_fitted():
    assert run(replace(scenarios()["ep"], calibration=made()), "estimate").provenance["measured_fraction"] == 0
    assert sum(run(replace(scenarios()["ep"], calibration=made())).provenance.values()) == pytest.approx(1)


def test_kernels_must_be_those_of_the_fit():
    wrong = replace(scenarios()["ep"], calibration=made("measured tables: x")).mistakes()
    assert wrong == ["calibration: fitted with kernels of 'measured tables: x'; give those tables as the profile"]


def test_a_scenario_names_its_calibration(tmp_path):
    write_calibration(made(), tmp_path / "mine.toml")
    path = tmp_path / "study.toml"
    path.write_text(QUICKSTART.read_text().replace('hardware = "', 'calibration = "mine.toml"\nhardware = "', 1))
    first, *others = load(path)
    assert first.calibration == made()
    assert all(scenario.calibration == made() for scenario in others)
    path.write_text(path.read_text().replace("mine.toml", "nowhere.toml"))
    with pytest.raises(ValueError, match=r"calibration: .*nowhere\.toml"):
        load(path)


def test_a_run_and_the_model_that_calibrations_are_fitted_with_agree():
    """Matrices cut in eight: both price the same kernels, so that constants of one hold in the other."""
    base = load(QUICKSTART)[0]
    layout = Layout(AttentionGrid(tp=8), ExpertGrid(etp=8))
    served = [
        Run(f"{n}", base.model.name, "h100_sxm", "any", 512, 64, n, 8, 1.0, etp=8, is_disaggregated=True)
        for n in (1, 8, 64, 256)
    ]
    for values in ({}, {"launch_factor": 0.5, "experts_factor": 1.3, "collective_factor": 0.7}):
        predicted_N, *_ = predict_with(made(**values), price_runs(served))
        told = []
        for one in served:
            work = replace(base.workload, num_requests=int(one.concurrency), prompt_tokens=512, output_tokens=64)
            found = run(replace(base, layout=layout, workload=work, calibration=made(**values)), "estimate")
            told.append(found.metrics["tpot_s"])
        assert predicted_N == pytest.approx(np.array(told), rel=0.08)


def test_a_device_that_no_run_was_on_is_warned_of():
    base, _, offloaded = load(QUICKSTART)
    known = replace(made(), facts={"groups": ["gpt-oss-120b h100_sxm vllm"]})
    assert not any("calibration" in said for said in replace(base, calibration=known).warnings())
    (said,) = [x for x in replace(offloaded, calibration=known).warnings() if "calibration" in x]
    assert said.endswith("none of them ran on rtx-4090")


def test_fitted_constants_carry_over():
    served = [
        Run(f"{m} {n}", m, s, "any", 512, 64, n, 8, 5e-3 * n**0.2, etp=8)
        for m in ("olmoe-1b-7b", "mixtral-8x7b") for s in ("h100_sxm", "h200_sxm") for n in (1, 8, 64)
    ]  # fmt: skip
    found, _ = calibrate(price_runs(served), "roofline")
    result = run(replace(load(QUICKSTART)[0], calibration=found), "estimate")
    low, high = result.intervals["tpot_s"]
    assert low < result.metrics["tpot_s"] < high
