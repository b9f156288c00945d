"""A made-up folder in LLMServingSim's layout: layers whose times are known, and runs that our own simulator made."""

from __future__ import annotations

import json
from itertools import product

import numpy as np

from moesim.files.profiles.llmservingsim import CALLS, ONCE
from moesim.hardware import Link
from moesim.requests import Requests
from moesim.service import EngineConfig
from moesim.validate.vllm_setups import setup_of

MODEL, DEVICE = "meta-llama/Llama-3.1-8B", "RTX4090"
ENGINE = EngineConfig(max_num_seqs=16, max_num_batched_tokens=2048, max_model_len=8192)
LINK = Link(16e9, 1e-6)
CHUNKS, BEFORES, NUMS, CONTEXTS = (16, 512, 2048), (0, 16, 8192), (1, 16, 64), (16, 1024, 16384)
DENSE_US, TOKEN_US, MIXED_US = 10.0, 0.05, 7.0


def attention_us(chunk, before, num, context):
    """A chunk alone and decoding alone add up, and both together take `MIXED_US` longer."""
    alone = (4 + 1e-2 * chunk + 1e-6 * chunk * before) * (chunk > 0) + (3 + 2e-4 * num * context) * (num > 0)
    return alone + MIXED_US * (chunk > 0 and num > 0)


def write_profile(folder, layers=(*ONCE, *CALLS), moe=False):
    """A variant: folder/meta.yaml and folder/tp1/*.csv."""
    (folder / "tp1").mkdir(parents=True)
    (folder / "meta.yaml").write_text("gpu: made up\nvllm_version: 0.19.0\ncuda_version: '12.8'\n")
    points = [(chunk, before, 0, 0) for chunk, before in product(CHUNKS, BEFORES)]
    points += [(0, 0, num, context) for num, context in product(NUMS, CONTEXTS)]
    points += [(chunk, 0, num, context) for chunk, num, context in product(CHUNKS, NUMS, CONTEXTS)]
    rows = {
        "attention": ["prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"]
        + [",".join(map(str, (*point, attention_us(*point)))) for point in points],
        "dense": ["layer,tokens,time_us"]
        + [f"{layer},{tokens},{DENSE_US + TOKEN_US * tokens}" for layer in layers for tokens in (1, 64, 2048)],
        "per_sequence": ["layer,sequences,time_us"]
        + [f"{layer},{num},{50 + num}" for layer in ("lm_head", "sampler") for num in (1, 64)],
    }
    if moe:
        rows["moe"] = ["tokens,activated_experts,time_us"]
        rows["moe"] += [f"{n},{e},{20 + e + 0.1 * n}" for e in (8, 128) for n in (1, 2048) if n * 8 >= e]
    for name, lines in rows.items():
        (folder / "tp1" / f"{name}.csv").write_text("\n".join(lines) + "\n")


def requests(num, rate_per_s, seed=0):
    rng = np.random.default_rng(seed)
    arrival_s_Q = np.cumsum(rng.exponential(1 / rate_per_s, num))
    return Requests.of(arrival_s_Q, rng.integers(50, 1500, num), rng.integers(20, 200, num))


def write_run(folder, name, traffic, host_s, engine=ENGINE, theirs=1.25):
    """A run as it would have been with so many seconds of the host, and a prediction of it that is `theirs` x it."""
    outcome = setup_of(folder, DEVICE, MODEL, engine, traffic, LINK).simulate(host_s)
    place = folder / "bench" / "examples" / DEVICE / name
    (place / "vllm").mkdir(parents=True)
    (place / "validation").mkdir()
    instance = {"model_name": MODEL, "hardware": DEVICE}
    config = {"link_bw": 16, "link_latency": 1000, "nodes": [{"instances": [instance]}]}
    (place / "config.json").write_text(json.dumps(config))
    kwargs = {"max_num_seqs": engine.max_num_seqs, "max_num_batched_tokens": 2048, "max_model_len": 8192}
    (place / "vllm" / "meta.json").write_text(json.dumps({"engine_kwargs": kwargs, "vllm_version": "0.19.0"}))
    rows = [
        {
            "request_id": f"bench-{q}", "input_toks": int(traffic.prompt_Q[q]), "output_toks": int(traffic.output_Q[q]),
            "arrival_time": 1e9 + outcome.arrival_s_Q[q], "queued_ts": 5e3 + outcome.arrival_s_Q[q],
            "scheduled_ts": 5e3 + outcome.scheduled_s_Q[q], "first_token_ts": 5e3 + outcome.first_token_s_Q[q],
            "last_token_ts": 5e3 + outcome.finish_s_Q[q],
        }
        for q in range(len(traffic))
    ]  # fmt: skip
    (place / "vllm" / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ms = 1e3 * float((outcome.first_token_s_Q - outcome.arrival_s_Q).mean())
    summary = f"Metric   vLLM   Sim   Diff%\n----\nTTFT Mean   {ms:.3f}   {theirs * ms:.3f}   +25.0%\n"
    (place / "validation" / "summary.txt").write_text(summary)
    return outcome
