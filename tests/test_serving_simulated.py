"""Real serving runs through the full simulator: what is asked of it, that it agrees with the closed form, real runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_calibrate import TRUE, as_csv, made_runs

from moesim.calibrate.recipes import with_recipes
from moesim.calibrate.serving import predict_tpot_s, price_runs
from moesim.cli import cli
from moesim.costs.calibration import NAMES
from moesim.files.runs import Run
from moesim.files.runs_layouts import read_runs
from moesim.routing.synthetic import even_trace
from moesim.simulate.serving import simulate_service
from moesim.validate.cases import summary
from moesim.validate.serving import validate_serving
from moesim.validate.serving_simulated import (
    BENCHMARK,
    FIGURES,
    ROUNDS,
    left_out,
    service_of,
    simulate_run,
    simulate_serving,
)

RUNS = Path(__file__).parents[2] / "shared" / "data" / "serving_runs"
VALUES = np.array([TRUE[name] for name in NAMES])
RUN = Run("a run", "gpt-oss-120b", "h100_sxm", "vllm", 1024, 256, 8, 4, 1.0, etp=4, length_fraction=0.9)


def even():
    return even_trace(36, 128, 4)


def test_a_run_is_a_closed_loop_of_its_concurrency_and_lengths():
    service = service_of(RUN, VALUES, even())
    requests, engine = service.requests, service.engine
    assert (requests.concurrency, len(requests), engine.max_num_seqs) == (8, ROUNDS * 8, 8)
    assert (engine.tensor_parallel_size, engine.enable_expert_parallel) == (4, False)
    assert requests.prompt_Q.min() >= 0.8 * 1024 and requests.prompt_Q.max() <= 1024
    assert requests.output_Q.mean() == pytest.approx(0.9 * 256, rel=0.02)
    assert not service.mistakes()


def test_drafts_and_formats_reach_the_engine():
    run = dataclasses.replace(RUN, num_draft_tokens=2, kv_dtype="fp8", max_requests_per_rank=3)
    service = service_of(run, VALUES, even())
    assert service.model.dtypes.kv == "fp8" and service.engine.max_num_seqs == 3
    a = TRUE["acceptance_rate"]
    assert service.engine.acceptance_length == pytest.approx(1 + a + a * a)


def test_decoding_alone_agrees_with_the_closed_form():
    """Answers so long that prompts do not matter: simulated and closed form price the same iteration."""
    run = dataclasses.replace(RUN, prompt_tokens=64, output_tokens=1500, concurrency=4, length_fraction=1.0)
    closed_s = predict_tpot_s(price_runs([run]), VALUES)[0]
    assert simulate_run(run, VALUES, even(), rounds=4).tpot_s == pytest.approx(closed_s, rel=0.05)


def test_all_clients_send_at_once_and_wait_longer_at_first():
    outcome = simulate_service(service_of(RUN, VALUES, even()))
    ttft_s_Q = outcome.first_token_s_Q - outcome.arrival_s_Q
    assert (outcome.arrival_s_Q[:8] == 0).all() and outcome.arrival_s_Q[8:].min() > 0
    found = simulate_run(RUN, VALUES, even())
    assert found.ttft_s == pytest.approx(ttft_s_Q[: BENCHMARK * 8].mean())
    assert found.ttft_s > found.steady_ttft_s > 0


def test_more_rounds_hardly_move_what_is_steady():
    few, many = (simulate_run(RUN, VALUES, even(), rounds) for rounds in (ROUNDS, 3 * ROUNDS))
    assert few.tpot_s == pytest.approx(many.tpot_s, rel=0.03)


def test_what_is_left_out_says_why():
    assert "computed elsewhere" in left_out(dataclasses.replace(RUN, is_disaggregated=True))
    assert "cut across" in left_out(dataclasses.replace(RUN, dp=4, tp=1))
    assert left_out(RUN) == ""
    with pytest.raises(ValueError, match=r"a run: .*no room for a KV cache"):
        service_of(dataclasses.replace(RUN, model="deepseek-r1", tp=1, etp=1), VALUES, even_trace(58, 256, 8, 8, 4))


def few():
    """A run of each of six groups, three of which compute prompts elsewhere."""
    made = [run for run in made_runs().runs if run.num_draft_tokens == 0 and run.concurrency == 4]
    return [dataclasses.replace(run, ttft_s=0.5) for run in made if run.prompt_tokens == run.output_tokens == 1024]


def test_each_figure_is_judged_and_what_is_left_out_is_counted():
    runs = few()
    found = simulate_serving(runs, validate_serving(runs))
    assert [each.name.split(": ")[1] for each in found] == list(FIGURES)
    tpot, ttft, _ = found
    assert summary(tpot.cases)["rows"] == summary(ttft.cases)["rows"] == 3
    assert tpot.facts["runs"].startswith("3 of 6") and 3 in tpot.facts.values()
    assert summary(tpot.cases)["p75_abs_error"] < 0.25  # the times were made by the closed form
    for case in tpot.cases + ttft.cases:
        assert case.low <= case.predicted <= case.high
    assert all(case.baseline for case in tpot.cases) and not any(case.baseline for case in ttft.cases)


def test_a_groups_own_times_move_no_prediction_of_it():
    runs, mine = few(), few()[-1].group
    slower = [dataclasses.replace(r, tpot_s=5 * r.tpot_s) if r.group == mine else r for r in runs]
    predicted, again = (simulate_serving(some, validate_serving(some))[0].cases[-1] for some in (runs, slower))
    assert predicted.group == mine and again.measured == pytest.approx(5 * predicted.measured)
    assert (again.predicted, again.low, again.high) == (predicted.predicted, predicted.low, predicted.high)


def test_the_command_prints_the_closed_form_and_then_what_was_simulated(tmp_path):
    path = as_csv(tmp_path / "runs.csv", few())
    said = json.loads(CliRunner().invoke(cli, ["validate", "serving", path, "--json"], catch_exceptions=False).stdout)
    assert said["rows"] == 6 and [other["rows"] for other in said["others"]] == [6, 0, 0]  # no TTFT in such a file
    text = CliRunner().invoke(cli, ["validate", "serving", path], catch_exceptions=False).stdout
    assert text.index("easier split") < text.index("serving, simulated: TPOT") < text.index("TTFT-steady")
    alone = CliRunner().invoke(cli, ["validate", "serving", path, "--closed-form"], catch_exceptions=False).stdout
    assert "simulated" not in alone


@pytest.mark.slow
def test_real_runs_are_simulated():
    if not RUNS.exists():
        pytest.skip("the measured serving runs are not on this machine")
    runs = with_recipes(read_runs(RUNS))
    closed = validate_serving(runs)
    tpot, ttft, steady = simulate_serving(runs, closed)
    found = summary(tpot.cases)
    assert found["median_abs_error"] < 0.18 and found["median_abs_error"] < found["baseline_median_abs_error"]
    by_name = {case.case: case.predicted for case in closed.cases}
    assert abs(np.median([case.predicted / by_name[case.case] for case in tpot.cases]) - 1) < 0.03
    assert summary(ttft.cases)["median_abs_error"] < summary(steady.cases)["median_abs_error"]
