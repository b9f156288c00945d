"""Command lines of vLLM and SGLang as keys of a service file."""

from __future__ import annotations

import io
import sys

import pytest

from moesim.cli import main
from moesim.files.flags import import_flags
from moesim.files.services import load_services
from moesim.service import EngineConfig

SGLANG = "python3 -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3-0324"
LOWEST = {"scheduler": "sglang", "tensor_parallel_size": 1, "data_parallel_size": 1, "enable_expert_parallel": False,
          "enable_chunked_prefill": True, "max_num_batched_tokens": 8192}  # fmt: skip


def import_of(monkeypatch, capsys, *words, stdin=""):
    """Exit code, stdout and stderr of the command."""
    monkeypatch.setattr(sys, "argv", ["moesim", "import-flags", *words])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    return stopped.value.code, said.out, said.err


@pytest.mark.parametrize(
    ("line", "model", "preset", "engine"),
    [
        ("vllm serve Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b", {}),
        ("vllm serve openai/gpt-oss-120b -tp 8 -ep --max-num-seqs=512 --max-num-batched-tokens 8k",
         "openai/gpt-oss-120b", "gpt-oss-120b",
         {"tensor_parallel_size": 8, "enable_expert_parallel": True, "max_num_seqs": 512,
          "max_num_batched_tokens": 8000}),
        ("python -m vllm.entrypoints.openai.api_server --model deepseek-ai/DeepSeek-R1 \\\n  --data_parallel_size 16 "
         "--enable-expert-parallel --all2all-backend deepep_low_latency --max-model-len 16K --no-enable-prefix-caching",
         "deepseek-ai/DeepSeek-R1", "deepseek-r1",
         {"data_parallel_size": 16, "enable_expert_parallel": True, "all2all_backend": "deepep_low_latency",
          "max_model_len": 16384, "enable_prefix_caching": False}),
        ("vllm serve deepseek-ai/DeepSeek-V3 --enable-eplb --eplb-config "
         "'{\"num_redundant_experts\": 32, \"window_size\": 500, \"step_interval\": 1500, \"log_balancedness\": true}'",
         "deepseek-ai/DeepSeek-V3", "deepseek-v3",
         {"enable_eplb": True, "num_redundant_experts": 32, "eplb_window_size": 500, "eplb_step_interval": 1500}),
        ("vllm serve ./my-model --gpu-memory-utilization 0.85 --scheduling-policy priority --block-size 64 "
         "--speculative-config '{\"method\": \"mtp\", \"num_speculative_tokens\": 2}'",
         "./my-model", None,
         {"gpu_memory_utilization": 0.85, "scheduling_policy": "priority", "block_size": 64,
          "num_speculative_tokens": 2}),
    ],
)  # fmt: skip
def test_vllms_flags_have_their_own_names(line, model, preset, engine):
    found = import_flags([line])
    assert (found.tool, found.model, found.preset, found.engine) == ("vllm", model, preset, engine)
    assert not found.unknown and not found.ignored


@pytest.mark.parametrize(
    ("flags", "engine"),
    [
        ("", {}),
        ("--tp 8", {"tensor_parallel_size": 8}),
        ("--tp-size 16 --ep-size 16 --page-size 64",
         {"tensor_parallel_size": 16, "enable_expert_parallel": True, "block_size": 64}),
        ("--tp 16 --dp 8 --enable-dp-attention --chunked-prefill-size 32768 --max-running-requests 1024",
         {"tensor_parallel_size": 2, "data_parallel_size": 8, "enable_expert_parallel": True,
          "max_num_batched_tokens": 4096, "max_num_seqs": 128}),
        ("--tp 8 --chunked-prefill-size -1 --max-prefill-tokens 4096",
         {"tensor_parallel_size": 8, "enable_chunked_prefill": False, "max_num_batched_tokens": 4096}),
        ("--tp 32 --dp 32 --enable-dp-attention --moe-a2a-backend deepep --deepep-mode low_latency --enable-eplb "
         "--ep-num-redundant-experts 32 --eplb-rebalance-num-iterations 400 --mem-fraction-static 0.8",
         {"data_parallel_size": 32, "enable_expert_parallel": True, "all2all_backend": "deepep_low_latency",
          "max_num_batched_tokens": 256, "num_redundant_experts": 32, "enable_eplb": True, "eplb_step_interval": 400,
          "gpu_memory_utilization": 0.8}),
        ("--tp 8 --enable-deepep-moe --deepep-mode normal --disable-radix-cache --speculative-num-draft-tokens 4",
         {"tensor_parallel_size": 8, "enable_expert_parallel": True, "all2all_backend": "deepep_high_throughput",
          "enable_prefix_caching": False, "num_speculative_tokens": 3}),
    ],
)  # fmt: skip
def test_sglangs_flags_are_translated(flags, engine):
    found = import_flags([f"{SGLANG} {flags}"])
    assert (found.tool, found.preset, found.engine) == ("sglang", "deepseek-v3", LOWEST | engine)
    assert not found.unknown


def test_what_changes_nothing_and_what_is_not_known_is_said(monkeypatch, capsys):
    words = "vllm serve org/odd --port 8000 --enforce-eager --frobnicate 3 -dp 2 --swap-space=4"
    code, out, err = import_of(monkeypatch, capsys, *words.split())
    assert code == 0
    assert out == 'model = "org/odd"\n\n[engine]\ndata_parallel_size = 2\nswap_space_gib = 4.0\n'
    assert "org/odd: none of `moesim list models`" in err
    assert "not modelled, left out: --port, --enforce-eager" in err and "unknown, left out: --frobnicate" in err
    assert import_of(monkeypatch, capsys, "-", stdin=words) == (code, out, err)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("ollama run mixtral", "import-flags: must be a command line of `vllm serve` or `python -m sglang"),
        ("vllm serve m --max-num-seqs", "--max-num-seqs: a value must follow"),
        (
            "vllm serve m --max-num-seqs many",
            "--max-num-seqs: must be a whole number, such as 8192 or 8k, given 'many'",
        ),
        ("vllm serve m -tp 2x -pp 1.5x", "-tp: must be a whole number, such as 8192 or 8k, given '2x'; -pp: must be"),
        ("vllm serve m --gpu-memory-utilization all", "--gpu-memory-utilization: must be a number, given 'all'"),
        ("vllm serve m --eplb-config 7", "--eplb-config: must be a JSON object, given '7'"),
        ("vllm serve m --eplb-config '{\"window_size\": 0.5}'", "window_size must be a whole number"),
        (f"{SGLANG} --tp 8 --dp 3 --enable-dp-attention", "--dp-size must divide --tp-size 8, given 3"),
        (f"{SGLANG} --tp 8 --dp 2", "--dp-size 2 without --enable-dp-attention are 2 servers of their own"),
        ("vllm serve 'm", "must be a command line that a shell would take, given"),
    ],
)
def test_a_line_that_cannot_be_is_one_error(monkeypatch, capsys, line, says):
    code, out, err = import_of(monkeypatch, capsys, line)
    assert (code, out) == (2, "")
    assert err.startswith("error: import-flags: ") and says in err and "Traceback" not in err


@pytest.mark.parametrize(
    "line",
    ["vllm serve Qwen/Qwen3-30B-A3B -dp 2 -ep --max-num-seqs 128 --max-num-batched-tokens 2048 --enable-prefix-caching",
     f"{SGLANG} --tp 8 --dp 8 --enable-dp-attention --moe-a2a-backend deepep --max-running-requests 512"],
)  # fmt: skip
def test_what_is_printed_loads(tmp_path, line):
    found = import_flags([line])
    path = tmp_path / "service.toml"
    top = f'hardware = "hgx-h200"\ntrace = "zipf:0.5"\n{found.as_toml()}'
    path.write_text(f'{top}[requests]\narrivals = "at_once"\nnum_requests = 1\nprompt_tokens = 9\noutput_tokens = 2\n')
    service = load_services(path)[0]
    assert service.engine == EngineConfig(**found.engine) and service.model.name == found.preset
