"""Results of serving benchmarks as runs: vLLM's JSON, SGLang's JSON lines, and moesim's own `run --json`.

None of the two benchmarks writes down the machine, and vLLM's no layout: such facts come with the file (vLLM's
`--metadata key=value` lands in its JSON) or are given beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesim.files.runs import Run, positive
from moesim.files.tables import raise_all

FACTS = ("model", "system", "version", "tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size", "num_draft_tokens",
         "kv_dtype", "isl", "osl")  # fmt: skip
"""What may be given beside a file."""


def read_benchmark_runs(path: str | Path, facts: Mapping[str, Any]) -> list[Run]:
    """Read one JSON object, or one on each line.

    Layouts, told apart by their keys:
        vLLM `vllm bench serve --save-result`: model_id, max_concurrency (else request_rate), completed,
            total_input_tokens, total_output_tokens, mean_tpot_ms, mean_ttft_ms, and what --metadata added.
        SGLang `sglang.bench_serving --output-file`: backend, max_concurrency or concurrency (the mean), completed,
            total_input_tokens, total_output_tokens, mean_tpot_ms, mean_ttft_ms, and in newer versions server_info with
            model_path, tp_size, dp_size, ep_size, enable_dp_attention, version, speculative_num_draft_tokens.
        moesim `run --json`: scenario, metrics, and "beside" with further ones.

    Args:
        facts: one of `FACTS` each; what the file says itself goes first.

    Raises:
        ValueError: one message with every mistake.
    """
    path = Path(path)
    unknown = [name for name in facts if name not in FACTS]
    raise_all("facts of the runs", [f"{name} is not known; one of {', '.join(FACTS)} would do" for name in unknown])
    mistakes: list[str] = []
    runs: list[Run] = []
    for i, item in enumerate(_objects(path)):
        where = f"object {i}"
        if "scenario" in item and "metrics" in item:
            runs += _own_runs(item, path.stem, where, mistakes)
        elif "mean_tpot_ms" in item:
            runs += _benchmark_run({**facts, **_said(item)}, f"{path.stem}-{i}", where, mistakes)
        else:
            mistakes.append(
                f"{where}: has neither mean_tpot_ms (vLLM, SGLang) nor scenario and metrics (moesim run --json); "
                f"its keys are {', '.join(list(item)[:8])}"
            )
    raise_all(str(path), mistakes)
    return runs


def _objects(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a benchmark's result")
    text = path.read_text()
    try:
        found = [json.loads(text)]
    except ValueError:
        try:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise ValueError(f"{path}: neither JSON nor JSON lines ({error}); write it again") from error
    found = found[0] if len(found) == 1 and isinstance(found[0], list) else found
    if not found or not all(isinstance(item, dict) for item in found):
        raise ValueError(f"{path}: must hold JSON objects, one for each run")
    return found


def _said(item: Mapping[str, Any]) -> dict[str, Any]:
    """What a benchmark's object says, under the names of the serving runs."""
    server = item.get("server_info") or {}
    said = dict(item)
    if "tp_size" in server:  # SGLang counts the data-parallel ranks of attention inside tp_size
        dp = server.get("dp_size", 1) if server.get("enable_dp_attention") else 1
        ep = server.get("ep_size", 1) or 1
        said |= {"tp_size": server["tp_size"] // dp, "attention_dp_size": dp}
        said |= {"moe_ep_size": ep, "moe_tp_size": server["tp_size"] // ep}
    drafts = server.get("speculative_num_draft_tokens")
    said["num_draft_tokens"] = drafts - 1 if drafts else None  # the verified token is counted among them
    said["version"] = server.get("version")
    said["model"] = item.get("model_id") or server.get("model_path")
    said["concurrency_asked"] = item.get("max_concurrency") or item.get("concurrency")
    completed = item.get("completed")
    if isinstance(completed, int) and completed > 0:
        said["isl"] = item.get("total_input_tokens", 0) / completed
        said["osl"] = item.get("total_output_tokens", 0) / completed
    if "model_id" in item:
        said["backend"] = "vllm"
    return {key: value for key, value in said.items() if value is not None}


def _benchmark_run(said: Mapping[str, Any], name: str, where: str, mistakes: list[str]) -> list[Run]:
    before = len(mistakes)
    unsaid = [key for key in ("model", "system", "backend") if not isinstance(said.get(key), str)]
    mistakes += [f"{where}: {key} is not in the file; give it beside the file, such as {key}=..." for key in unsaid]
    asked = ("isl", "osl", "concurrency_asked", "mean_tpot_ms", "tp_size")
    isl, osl, concurrency, tpot_ms, tp = (positive(said, key, where, mistakes) for key in asked)
    dp, ep = (int(said.get(key, 1)) for key in ("attention_dp_size", "moe_ep_size"))
    if len(mistakes) > before:
        return []
    etp = int(said.get("moe_tp_size", tp * dp / ep))
    run = Run(
        name, str(said["model"]).rpartition("/")[2].lower(), said["system"], said["backend"], isl, osl, concurrency,
        int(tp), tpot_ms / 1e3, version=said.get("version", ""), dp=dp, ep=ep, etp=etp,
        ttft_s=said["mean_ttft_ms"] / 1e3 if said.get("mean_ttft_ms") else None,
        kv_dtype=said.get("kv_dtype", "bf16"), num_draft_tokens=int(said.get("num_draft_tokens", 0)), source=name,
    )  # fmt: skip
    if run.dp * run.tp != run.ep * run.etp:
        mistakes.append(f"{where}: attention has {run.dp} x {run.tp} ranks but the experts {run.ep} x {run.etp}")
    return [run]


def _own_runs(item: Mapping[str, Any], name: str, where: str, mistakes: list[str]) -> list[Run]:
    """A result of moesim: its closed batch decodes without prefill between, as a disaggregated run does."""
    found: list[Run] = []
    for label, result in {"": item, **item.get("beside", {})}.items():
        scenario, metrics = result["scenario"], result["metrics"]
        if not {"model", "hardware"} <= scenario.keys():
            mistakes.append(f"{where}: its scenario has no model, hardware; give the output of moesim run --json")
            continue
        layout, workload = scenario.get("layout", {}), scenario.get("workload", {})
        attention, experts = layout.get("attention", {}), layout.get("experts", {})
        output, requests = (positive(workload, key, where, mistakes) for key in ("output_tokens", "num_requests"))
        if "prompt_tokens" in workload:
            prompt = positive(workload, "prompt_tokens", where, mistakes)
        else:  # the trace's own lengths: what was prefilled, over the requests
            rate, ttft_s = (positive(metrics, key, where, mistakes) for key in ("prefill_tokens_per_s", "ttft_s"))
            prompt = rate * ttft_s / requests
        run = Run(
            f"{name} {label}".strip(), scenario["model"], scenario["hardware"], "moesim", prompt, output, requests,
            attention.get("tp", 1), positive(metrics, "tpot_s", where, mistakes), result.get("version", ""), True,
            attention.get("dp", 1), experts.get("ep", 1), experts.get("etp", 1), metrics.get("ttft_s"),
            scenario.get("dtypes", {}).get("kv", "bf16"), source=f"moesim run, engine {result.get('engine')}",
        )  # fmt: skip
        found.append(run)
    return found
