"""Files of services: what each table becomes, and every wrong value as one error."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from moesim.cli import main
from moesim.faults import ServingFault
from moesim.files.services import load_services
from moesim.fleet import Fleet, Slo
from moesim.policies.autoscaler import Autoscaling
from moesim.service import EngineConfig

ACCEPTANCE = "small:\n  on:\n    1: 1.8\n    2: 2.4\n  off:\n    1: 1.9\n"
REAL = Path(__file__).parents[2] / "shared" / "data" / "speculative_acceptance" / "qwen3.5_mtp.yaml"
REQUESTS = '[requests]\narrivals = "at_once"\nnum_requests = 4\nprompt_tokens = 40\noutput_tokens = 3\n'
APART = "[fleet]\nnum_prefill_instances = 1\nnum_decode_instances = 2\n"
DOWN = '[[fleet.faults]]\nkind = "down"\ninstance = 1\nstart_s = 5\nduration_s = 2.5\n'


def written(folder, more, top=""):
    path = folder / "service.toml"
    parts = 'model = "olmoe-1b-7b"\nhardware = "hgx-h100"\ntrace = "olmoe-shape-16x64"\n'
    path.write_text(parts + top + REQUESTS + more)
    (folder / "acceptance.yaml").write_text(ACCEPTANCE)
    return path


def loaded(folder, more, top=""):
    return load_services(written(folder, more, top))


def test_defaults_are_those_of_the_nouns(tmp_path):
    service = loaded(tmp_path, "")[0]
    assert (service.name, service.engine, service.decode_engine) == ("service", EngineConfig(), None)
    assert (service.fleet, service.slo, service.seed) == (Fleet(), Slo(), 0)


def test_every_table_becomes_its_noun(tmp_path):
    fleet = 'router = "prefix_aware"\nnum_instances = 3\nusd_per_device_hour = 2.5\n'
    scaling = '[fleet.autoscaling]\npolicy = "queue_length"\nmax_instances = 4\ntarget = 8\nstartup_s = 30\n'
    slow = '[[fleet.faults]]\nkind = "slow"\ninstance = 0\nstart_s = 0\nduration_s = inf\nrank = 1\nfactor = 2.0\n'
    engine = '[engine]\ntensor_parallel_size = 2\nscheduler = "sglang"\n'
    service = loaded(tmp_path, f"{engine}[slo]\ntpot_s = 0.05\nttft_s = 1\n[fleet]\n{fleet}{scaling}{DOWN}{slow}")[0]
    assert service.engine == EngineConfig(tensor_parallel_size=2, scheduler="sglang")
    assert service.slo == Slo(ttft_s=1, tpot_s=0.05)
    assert service.fleet == Fleet(
        num_instances=3, router="prefix_aware", usd_per_device_hour=2.5,
        autoscaling=Autoscaling("queue_length", max_instances=4, target=8, startup_s=30),
        faults=(ServingFault("down", 1, 5, 2.5), ServingFault("slow", 0, 0, inf, 1, 2.0)),
    )  # fmt: skip


def test_decode_engine_is_engine_with_changes(tmp_path):
    engine = "[engine]\nblock_size = 32\nmax_num_seqs = 8\n[decode_engine]\nmax_num_seqs = 64\n"
    router = 'decode_router = "least_tokens"\noverlaps_transfer = false\n'
    service = loaded(tmp_path, engine + APART + router)[0]
    assert service.engine == EngineConfig(block_size=32, max_num_seqs=8)
    assert service.decode_engine == replace(service.engine, max_num_seqs=64)
    assert service.fleet == Fleet(
        num_prefill_instances=1, num_decode_instances=2, decode_router="least_tokens", overlaps_transfer=False
    )


def test_a_slow_rank_is_one_of_its_own_instance(tmp_path):
    slow = DOWN.replace("down", "slow") + "rank = 1\nfactor = 3\n"
    apart = "[decode_engine]\ntensor_parallel_size = 2\n" + APART
    assert loaded(tmp_path, apart + slow)[0].fleet.faults == (ServingFault("slow", 1, 5, 2.5, 1, 3),)
    with pytest.raises(ValueError, match="no rank 1 in an instance; 0 to 0 would do"):
        loaded(tmp_path, apart + slow.replace("instance = 1", "instance = 0"))


def test_set_ups_beside_are_changes_to_the_first(tmp_path):
    beside = "[beside.wide.engine]\ntensor_parallel_size = 8\n[beside.many.requests]\nnum_requests = 9\n"
    first, wide, many = loaded(tmp_path, "[engine]\nblock_size = 32\n" + beside)
    assert (wide.name, wide.engine) == ("wide", replace(first.engine, tensor_parallel_size=8))
    assert many.engine == first.engine and (len(many.requests), len(wide.requests)) == (9, 4)


def test_acceptance_lengths_come_from_a_file_of_measured_ones(tmp_path):
    file = 'acceptance_file = "acceptance.yaml"\nacceptance_mode = "on"\n'
    service = loaded(tmp_path, f"[engine]\nnum_speculative_tokens = 2\n{file}acceptance_model = 'small'\n")[0]
    assert service.engine == EngineConfig(num_speculative_tokens=2, acceptance_length=2.4)
    apart = f"[engine]\nnum_speculative_tokens = 1\n[decode_engine]\n{file}{APART}"
    service = loaded(tmp_path, apart)[0]
    assert service.engine.acceptance_length == 1.0
    assert service.decode_engine == EngineConfig(num_speculative_tokens=1, acceptance_length=1.8)


def test_published_acceptance_lengths(tmp_path):
    if not REAL.exists():
        pytest.skip("the published acceptance lengths are not on this machine")
    which = 'acceptance_model = "qwen3.5-397b-a17b-nvfp4"\nacceptance_mode = "thinking_on"\n'
    lengths = [
        loaded(tmp_path, f"[engine]\nnum_speculative_tokens = {n}\nacceptance_file = '{REAL}'\n{which}")[0]
        .engine.acceptance_length
        for n in (1, 2, 3)
    ]  # fmt: skip
    assert 1 < lengths[0] < lengths[1] < lengths[2] <= 4


DRAFTS = "[engine]\nnum_speculative_tokens = 2\nacceptance_file = "
WRONG = [
    ("[fleeet]\n", "fleeet: unknown key; nearest: 'fleet'"),
    ("[engine]\nmax_num_seq = 3\n", "engine.max_num_seq: unknown key; nearest: 'max_num_seqs'"),
    ("[engine]\nmax_num_seqs = 'many'\n", "engine.max_num_seqs: must be a whole number, not 'many'"),
    ("[engine]\nmax_num_seqs = 0\n", "engine.max_num_seqs: must be at least 1, given 0"),
    ("[engine]\nenable_eplb = 1\n", "engine.enable_eplb: must be true or false, not 1"),
    ("[engine]\nscheduler = 'tgi'\n", "engine.scheduler: unknown 'tgi'; one of vllm, sglang would do"),
    ("[engine]\nall2all_backend = 'nvshmem'\n", "engine.all2all_backend: unknown 'nvshmem'; one of"),
    ("[engine]\ngpu_memory_utilization = 1.5\n", "engine.gpu_memory_utilization: must lie in 0..1, above 0, given 1.5"),
    ("[engine]\ngpu_memory_utilization = 0.01\n", "engine: no room for a KV cache on one"),
    ("[engine]\npreemption_mode = 'swap'\n", "engine.preemption_mode: swapping needs swap_space_gib above 0"),
    ("[engine]\ndata_parallel_size = 2\n", "engine.enable_expert_parallel: must be true with data_parallel_size = 2"),
    ("[engine]\nacceptance_length = 1.5\n", "engine.acceptance_length: must lie in 1..1, as num_speculative_tokens"),
    ("[engine]\nmax_model_len = 10\n", "requests: none fits: the shortest has 43 tokens, engine holds 10"),
    ("[engine]\nacceptance_mode = 'on'\n", "engine.acceptance_file: is missing; acceptance_mode and acceptance_model"),
    ("[engine]\nacceptance_file = 'acceptance.yaml'\n", "engine.acceptance_file: needs num_speculative_tokens of at"),
    (DRAFTS + "'acceptance.yaml'\nacceptance_length = 2\n", "engine.acceptance_length: acceptance_file gives it"),
    (DRAFTS + "'nothing.yaml'\n", "nothing.yaml cannot be read"),
    (DRAFTS + "'acceptance.yaml'\n", "acceptance.yaml: several of a mode, and none is named; known: off, on"),
    (DRAFTS + "'acceptance.yaml'\nacceptance_mode = 'off'\n", "small, off has no acceptance length for 2 speculative"),
    (DRAFTS + "3\n", "engine.acceptance_file: must be a string, not 3"),
    ("[decode_engine]\nmax_num_seqs = 3\n", "decode_engine: is of instances that decode alone; give"),
    (APART + "[decode_engine]\nseqs = 3\n", "decode_engine.seqs: unknown key"),
    ("[fleet]\nnum_instances = 0\n", "fleet.num_instances: must be at least 1, given 0"),
    ("[fleet]\nnum_instances = 9\n", "fleet: num_instances = 9 need 9 devices, the machine has 8; use fewer"),
    ("[fleet]\nnum_decode_instances = 1\n", "come together, both at least 1, given 0 and 1"),
    ("[fleet]\nrouter = 'fair'\n", "fleet.router: unknown 'fair'; one of round_robin, random"),
    ("[fleet]\nusd_per_device_hour = -1\n", "fleet.usd_per_device_hour: must be 0 or more, given -1"),
    ("[fleet.autoscaling]\npolicy = 'magic'\n", "fleet.autoscaling.policy: 'magic' is not one of fixed"),
    ("[fleet.autoscaling]\npolicy = 'queue_length'\nmin_instances = 3\n", "must have 1 <= min_instances <="),
    (APART + "[fleet.autoscaling]\npolicy = 'queue_length'\n", "instances that prefill or decode alone are not scaled"),
    ("[fleet]\nfaults = 3\n", "fleet.faults: must be an array of tables, [[fleet.faults]], not 3"),
    ("[[fleet.faults]]\nkind = 'down'\nstart_s = 1\nduration_s = 1\n",
     "fleet.faults[0].instance: is missing; give a whole number"),
    (DOWN.replace("down", "lost"), "fleet.faults: kind must be 'down' or 'slow', given 'lost'"),
    (DOWN.replace("= 1", "= 8"), "fleet.faults: no instance 8; 0 to 7 would do"),
    (DOWN.replace("= 5", "= -5"), "fleet.faults: start_s must be 0 or more seconds, given -5"),
    (DOWN + "factor = 2.0\n", "fleet.faults: rank and factor are of a slow rank"),
    (DOWN + DOWN, "fleet.faults: instance 1 is down from 5 s, but still so from 5 s; make one fault of the two"),
    (DOWN.replace("down", "slow"), "fleet.faults: factor must be above 1, given 1.0; 2 takes twice as long"),
    (DOWN.replace("down", "slow") + "rank = 1\nfactor = 2\n", "no rank 1 in an instance; 0 to 0 would do"),
    ("[engine]\npipeline_parallel_size = 2\n" + DOWN.replace("down", "slow") + "factor = 2\n",
     "a slow rank of one stage is not modelled, given engine.pipeline_parallel_size = 2"),
    ("[slo]\nttft_s = 0\n", "slo.ttft_s: must be above 0, given 0"),
    ("[slo]\nattainment = 1.5\n", "slo.attainment: must lie in 0..1, above 0, given 1.5"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "says"), WRONG, ids=[says[:40] for _, says in WRONG])
def test_a_wrong_value_is_one_error(tmp_path, monkeypatch, capsys, more, says):
    path = written(tmp_path, more)
    monkeypatch.setattr("sys.argv", ["moesim", "check", str(path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = "".join(capsys.readouterr())
    assert stopped.value.code == 2
    assert says in said and "1 mistake\n" in said and str(path) in said and "Traceback" not in said


def test_mistakes_of_all_tables_are_told_together(tmp_path):
    more = "[engine]\nseqs = 3\n[fleet]\nrouters = 'x'\n[slo]\nttft_s = 'soon'\n[beside.b.engine]\nblock_size = 'x'\n"
    with pytest.raises(ValueError, match="4 mistakes") as error:
        loaded(tmp_path, more)
    for where in ("engine.seqs", "fleet.routers", "slo.ttft_s", "beside.b.engine.block_size"):
        assert f"  - {where}: " in str(error.value)
