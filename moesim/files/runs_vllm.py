"""Real vLLM runs as LLMServingSim records them: bench/examples/DEVICE/MODEL/{config.json, vllm/, validation/}."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.files.imports.text import read_json, read_text
from moesim.files.requests.raw import read_raw
from moesim.files.requests.read import read_traffic
from moesim.files.tables import raise_all
from moesim.hardware import Link
from moesim.requests import Requests
from moesim.service import EngineConfig

Floats = NDArray[np.float64]

TIMES = ("queued_ts", "first_token_ts", "last_token_ts")
_OWN_MISTAKE = "copy the whole folder of the run again"


@dataclass(frozen=True, eq=False)
class VllmRun:
    """One run.

    Attributes:
        name: DEVICE/MODEL; model, device: in the source's words.
        engine: what it was started with; blocks of the cache where vLLM wrote them down.
        link: what LLMServingSim takes for the link between devices of that machine.
        requests: in order of arrival.
        ttft_s_Q, tpot_s_Q, e2e_s_Q: measured, from the moment at which the engine had the request in its queue.
        theirs_s: what LLMServingSim predicted, such as "TTFT Mean"; vllm_s: vLLM's own figure beside it.
        version: of vLLM.
    """

    name: str
    model: str
    device: str
    engine: EngineConfig
    link: Link
    requests: Requests
    ttft_s_Q: Floats
    tpot_s_Q: Floats
    e2e_s_Q: Floats
    theirs_s: Mapping[str, float]
    vllm_s: Mapping[str, float]
    version: str


def read_vllm_runs(folder: Path) -> list[VllmRun]:
    """Every run under bench/examples of LLMServingSim's folder, by name.

    Raises:
        ValueError: there is none, or one has mistakes.
    """
    found = sorted((folder / "bench" / "examples").glob("*/*/vllm/requests.jsonl"))
    if not found:
        raise ValueError(f"{folder}: no bench/examples/DEVICE/MODEL/vllm/requests.jsonl; give LLMServingSim's folder")
    return [read_vllm_run(path.parents[1]) for path in found]


def read_vllm_run(folder: Path) -> VllmRun:
    """One run: its folder DEVICE/MODEL."""
    config, meta = read_json(folder / "config.json"), read_json(folder / "vllm" / "meta.json")
    mistakes: list[str] = []
    given = _mapping(meta, "engine_kwargs", "vllm/meta.json", mistakes)
    cache = meta.get("kv_cache") if isinstance(meta, dict) else None
    try:
        instance = config["nodes"][0]["instances"][0]
        model, device = str(instance["model_name"]), str(instance["hardware"])
        link = Link(float(config["link_bw"]) * 1e9, float(config["link_latency"]) * 1e-9)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        mistakes.append(f"config.json: {error} lacks, or is of another kind; {_OWN_MISTAKE}")
        model, device, link = "", "", Link(1.0, 0.0)
    engine = engine_of(given, mistakes)
    if isinstance(cache, dict) and isinstance(cache.get("num_gpu_blocks"), int):
        engine = replace(
            engine,
            num_gpu_blocks_override=cache["num_gpu_blocks"],
            block_size=cache.get("block_size", engine.block_size),
            enable_prefix_caching=cache.get("enable_prefix_caching", True),
        )
    raise_all(str(folder), mistakes)
    path = folder / "vllm" / "requests.jsonl"
    requests, times = read_traffic(path).requests, _times(path)
    queued_Q, first_Q, last_Q = times.T
    summary = folder / "validation" / "summary.txt"
    vllm_s, theirs_s = _summary(summary) if summary.is_file() else ({}, {})
    return VllmRun(
        f"{folder.parent.name}/{folder.name}", model, device, engine, link, requests, first_Q - queued_Q,
        (last_Q - first_Q) / np.maximum(requests.output_Q - 1, 1), last_Q - queued_Q, theirs_s, vllm_s,
        str(meta.get("vllm_version", "?")),
    )  # fmt: skip


def _mapping(value: Any, key: str, where: str, mistakes: list[str]) -> dict[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    if isinstance(found, dict):
        return found
    mistakes.append(f"{where}: key {key} must be a table, given {found!r}; {_OWN_MISTAKE}")
    return {}


def engine_of(given: Mapping[str, Any], mistakes: list[str]) -> EngineConfig:
    """vLLM's keyword arguments as a configuration; what is not said is vLLM's default."""
    whole = ("tensor_parallel_size", "data_parallel_size", "max_num_seqs", "max_num_batched_tokens")
    wrong = [key for key in whole if not isinstance(given.get(key, 1), int) or given.get(key, 1) < 1]
    mistakes += [f"vllm/meta.json: {key} must be a whole number above 0, given {given[key]!r}" for key in wrong]
    if wrong:
        return EngineConfig()
    counts: dict[str, Any] = {key: given[key] for key in whole if key in given}
    return EngineConfig(
        enable_expert_parallel=bool(given.get("enable_expert_parallel", False)),
        max_model_len=given.get("max_model_len"),
        **counts,
    )


def _times(path: Path) -> Floats:
    """The columns `TIMES`, [Q, 3], in order of arrival.

    Raises:
        ValueError: one lacks, or does not follow the one before it.
    """
    table = read_raw(path).table
    lacking = [name for name in TIMES if name not in table.column_names]
    raise_all(str(path), [f"column {name} lacks; {_OWN_MISTAKE}" for name in lacking])
    columns = [np.asarray(table[name].to_numpy(), np.float64) for name in ("arrival_time", *TIMES)]
    times_QX = np.stack(columns[1:], axis=1)
    wrong_Q = ~(np.diff(times_QX, axis=1) >= 0).all(axis=1)
    raise_all(
        str(path),
        [f"row {row + 1}: {' <= '.join(TIMES)} must hold, given {times_QX[row].tolist()}; {_OWN_MISTAKE}"
         for row in np.flatnonzero(wrong_Q)[:5]],
    )  # fmt: skip
    return np.asarray(times_QX[np.argsort(columns[0], kind="stable")])


def _summary(path: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by figure, such as "TTFT Mean": vLLM's and the simulator's. The file has milliseconds."""
    rows = re.findall(r"^(\w+ \w+)\s+([\d.]+)\s+([\d.]+)\s", read_text(path), re.MULTILINE)
    return ({name: float(vllm) / 1e3 for name, vllm, _ in rows}, {name: float(sim) / 1e3 for name, _, sim in rows})
