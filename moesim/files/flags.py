"""Flags of a serving engine's command line as keys of a service file.

vLLM's flags have their own names in moesim. SGLang's are translated: with data-parallel attention its tensor-parallel
size is all devices of an instance.

Source: vLLM's engine arguments (docs.vllm.ai, "Engine Arguments"); SGLang's server arguments (docs.sglang.ai).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moesim.files.models import preset_names

Put = Callable[[dict[str, Any], str], None]
"""Enters the text of a flag's value."""


@dataclass
class Imported:
    """What a command line says.

    Attributes:
        tool: "vllm" or "sglang".
        model: as it was named there; "" where it was not.
        preset: the model of moesim's that it is, None where there is none.
        engine: keys of [engine].
        ignored: flags that change nothing that is modelled.
        unknown: flags that are not known at all.
    """

    tool: str
    model: str = ""
    preset: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def as_toml(self) -> str:
        """The top of a service file."""
        lines = [f"model = {json.dumps(self.preset or self.model)}"] if self.model else []
        lines += ["", "[engine]"] + [f"{key} = {json.dumps(value)}" for key, value in self.engine.items()]
        return "\n".join(lines) + "\n"


def import_flags(words: Sequence[str]) -> Imported:
    """Read a command line of `vllm serve` or `sglang.launch_server`, as one text or as words.

    Raises:
        ValueError: it is of neither, or values that cannot be.
    """
    text = " ".join(words) if len(words) == 1 else shlex.join(words)
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise ValueError(
            f"import-flags: must be a command line that a shell would take, given {text!r:.60} ({error}); close it"
        ) from error
    joined = " ".join(words)
    if "sglang" in joined:
        tool, table, ignored = "sglang", _SGLANG, _SGLANG_IGNORED
    elif "vllm" in joined:
        tool, table, ignored = "vllm", _VLLM, _VLLM_IGNORED
    else:
        raise ValueError(
            "import-flags: must be a command line of `vllm serve` or `python -m sglang.launch_server`, "
            f"given {joined!r}"
        )
    found, raw = Imported(tool), dict[str, Any]()
    mistakes: list[str] = []
    i = next((i + 1 for i, word in enumerate(words) if tool in word), 0)
    while i < len(words):
        word = words[i]
        i += 1
        if not word.startswith("-"):
            if tool == "vllm" and i > 1 and words[i - 2] == "serve":
                found.model = word
            continue
        name, has_value, value = word.partition("=")
        name = "--" + name[2:].replace("_", "-") if name.startswith("--") else name
        takes = i < len(words) and not has_value and not re.match(r"-{1,2}[a-zA-Z]", words[i])
        if name in table:
            is_switch, put = table[name]
            if not is_switch and not has_value:
                if not takes:
                    mistakes.append(f"{name}: a value must follow")
                    continue
                value = words[i]
                i += 1
            try:
                put(raw, value)
            except (ValueError, TypeError) as error:
                mistakes.append(f"{name}: {error}, given {value!r}")
        else:
            (found.ignored if name in ignored else found.unknown).append(name)
            i += takes
    if mistakes:
        raise ValueError("import-flags: " + "; ".join(mistakes))
    found.model = str(raw.pop("model", found.model))
    found.preset = _preset(found.model)
    found.engine = _sglang(raw) if tool == "sglang" else raw
    return found


def _whole(text: str) -> int:
    """A whole number, also as 32k (thousands) or 32K (1,024), as vLLM reads it."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG]?)", text)
    if not match:
        raise ValueError("must be a whole number, such as 8192 or 8k")
    factor = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}[match[2]]
    return int(float(match[1]) * factor)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number") from None


def _to(key: str, read: Callable[[str], Any] = _whole) -> tuple[bool, Put]:
    return False, lambda raw, text: raw.__setitem__(key, read(text))


def _set(key: str, value: Any) -> tuple[bool, Put]:
    return True, lambda raw, text: raw.__setitem__(key, value)


def _object(keys: Mapping[str, str]) -> tuple[bool, Put]:
    """A JSON object, of which some keys are entered."""

    def put(raw: dict[str, Any], text: str) -> None:
        try:
            given = json.loads(text)
        except json.JSONDecodeError:
            given = None
        if not isinstance(given, dict):
            raise ValueError("must be a JSON object")
        for theirs, ours in keys.items():
            if theirs in given:
                if isinstance(given[theirs], bool) or not isinstance(given[theirs], int):
                    raise ValueError(f"{theirs} must be a whole number")
                raw[ours] = given[theirs]

    return False, put


_VLLM: dict[str, tuple[bool, Put]] = {
    "--model": _to("model", str),
    "--tensor-parallel-size": _to("tensor_parallel_size"),
    "-tp": _to("tensor_parallel_size"),
    "--pipeline-parallel-size": _to("pipeline_parallel_size"),
    "-pp": _to("pipeline_parallel_size"),
    "--data-parallel-size": _to("data_parallel_size"),
    "-dp": _to("data_parallel_size"),
    "--enable-expert-parallel": _set("enable_expert_parallel", True),
    "-ep": _set("enable_expert_parallel", True),
    "--no-enable-expert-parallel": _set("enable_expert_parallel", False),
    "--all2all-backend": _to("all2all_backend", str),
    "--max-num-seqs": _to("max_num_seqs"),
    "--max-num-batched-tokens": _to("max_num_batched_tokens"),
    "--max-model-len": _to("max_model_len"),
    "--gpu-memory-utilization": _to("gpu_memory_utilization", _number),
    "--block-size": _to("block_size"),
    "--num-gpu-blocks-override": _to("num_gpu_blocks_override"),
    "--swap-space": _to("swap_space_gib", _number),
    "--enable-chunked-prefill": _set("enable_chunked_prefill", True),
    "--no-enable-chunked-prefill": _set("enable_chunked_prefill", False),
    "--long-prefill-token-threshold": _to("long_prefill_token_threshold"),
    "--enable-prefix-caching": _set("enable_prefix_caching", True),
    "--no-enable-prefix-caching": _set("enable_prefix_caching", False),
    "--scheduling-policy": _to("scheduling_policy", str),
    "--enable-eplb": _set("enable_eplb", True),
    "--num-redundant-experts": _to("num_redundant_experts"),
    "--eplb-config": _object(
        {
            "num_redundant_experts": "num_redundant_experts",
            "window_size": "eplb_window_size",
            "step_interval": "eplb_step_interval",
        }
    ),
    "--speculative-config": _object({"num_speculative_tokens": "num_speculative_tokens"}),
}
_VLLM_IGNORED = frozenset(
    (
        "--host", "--port", "--api-key", "--served-model-name", "--trust-remote-code", "--dtype", "--seed",
        "--tokenizer", "--tokenizer-mode", "--download-dir", "--load-format", "--disable-log-requests",
        "--disable-log-stats", "--enforce-eager", "--chat-template", "--enable-auto-tool-choice", "--tool-call-parser",
        "--reasoning-parser",
        "--kv-cache-dtype", "--quantization", "-q", "-O", "--compilation-config", "--distributed-executor-backend",
        "--revision", "--uvicorn-log-level", "--async-scheduling", "--data-parallel-address",
        "--data-parallel-rpc-port", "--data-parallel-size-local", "--headless", "--nnodes", "--node-rank",
    )
)  # fmt: skip
"""Known, and without an effect on what is simulated (formats are those of [dtypes])."""

_SGLANG: dict[str, tuple[bool, Put]] = {
    "--model-path": _to("model", str),
    "--model": _to("model", str),
    "--tp-size": _to("tp"),
    "--tp": _to("tp"),
    "--tensor-parallel-size": _to("tp"),
    "--dp-size": _to("dp"),
    "--dp": _to("dp"),
    "--data-parallel-size": _to("dp"),
    "--enable-dp-attention": _set("dp_attention", True),
    "--ep-size": _to("ep"),
    "--ep": _to("ep"),
    "--expert-parallel-size": _to("ep"),
    "--pp-size": _to("pipeline_parallel_size"),
    "--pp": _to("pipeline_parallel_size"),
    "--pipeline-parallel-size": _to("pipeline_parallel_size"),
    "--max-running-requests": _to("max_running"),
    "--chunked-prefill-size": _to("chunked", int),
    "--max-prefill-tokens": _to("max_prefill"),
    "--context-length": _to("max_model_len"),
    "--mem-fraction-static": _to("gpu_memory_utilization", _number),
    "--page-size": _to("block_size"),
    "--disable-radix-cache": _set("enable_prefix_caching", False),
    "--enable-priority-scheduling": _set("scheduling_policy", "priority"),
    "--moe-a2a-backend": _to("a2a", str),
    "--enable-deepep-moe": _set("a2a", "deepep"),
    "--deepep-mode": _to("deepep_mode", str),
    "--ep-num-redundant-experts": _to("num_redundant_experts"),
    "--enable-eplb": _set("enable_eplb", True),
    "--eplb-rebalance-num-iterations": _to("eplb_step_interval"),
    "--speculative-num-draft-tokens": _to("drafts"),
}
_SGLANG_IGNORED = frozenset(
    (
        "--host", "--port", "--api-key", "--served-model-name", "--trust-remote-code", "--dtype", "--random-seed",
        "--tokenizer-path", "--log-level", "--disable-cuda-graph", "--cuda-graph-max-bs", "--cuda-graph-bs",
        "--chat-template", "--tool-call-parser", "--reasoning-parser", "--kv-cache-dtype", "--quantization",
        "--attention-backend", "--watchdog-timeout", "--dist-init-addr", "--nnodes", "--node-rank", "--enable-metrics",
        "--decode-log-interval", "--schedule-policy", "--schedule-conservativeness", "--speculative-algorithm",
        "--speculative-num-steps", "--speculative-eagle-topk", "--speculative-draft-model-path", "--moe-dense-tp-size",
        "--enable-dp-lm-head", "--disable-overlap-schedule", "--init-expert-location", "--eplb-algorithm",
        "--stream-interval",
    )
)  # fmt: skip


def _sglang(raw: dict[str, Any]) -> dict[str, Any]:
    """[engine] of SGLang's flags, which depend on each other.

    Raises:
        ValueError: sizes that do not divide each other.
    """
    tp, dp, running = raw.pop("tp", 1), raw.pop("dp", 1), raw.pop("max_running", None)
    chunked, drafts = raw.pop("chunked", 8192), raw.pop("drafts", 0)
    backend, mode, ep = raw.pop("a2a", "none"), raw.pop("deepep_mode", "auto"), raw.pop("ep", 1)
    if raw.pop("dp_attention", False):
        if tp % dp:
            raise ValueError(
                f"import-flags: with --enable-dp-attention, --dp-size must divide --tp-size {tp}, given {dp}"
            )
        tp //= dp
    elif dp > 1:
        raise ValueError(
            f"import-flags: --dp-size {dp} without --enable-dp-attention are {dp} servers of their own; leave it out, "
            f"and give fleet.num_instances = {dp}"
        )
    found: dict[str, Any] = {"scheduler": "sglang", "tensor_parallel_size": tp, "data_parallel_size": dp}
    found["enable_expert_parallel"] = ep > 1 or backend == "deepep" or dp > 1
    if backend == "deepep":
        is_low = mode == "low_latency"
        found["all2all_backend"] = "deepep_low_latency" if is_low else "deepep_high_throughput"
    if running is not None:
        found["max_num_seqs"] = max(running // dp, 1)  # SGLang counts all ranks together
    found["enable_chunked_prefill"] = chunked > 0
    found["max_num_batched_tokens"] = max(chunked // dp, 1) if chunked > 0 else raw.pop("max_prefill", 16384)
    raw.pop("max_prefill", None)
    if drafts > 1:
        found["num_speculative_tokens"] = drafts - 1  # one of them is the token that is always right
    return found | raw


def _preset(model: str) -> str | None:
    """A model of moesim's by the last part of its name, without what names a version of the same shape."""
    name = model.rstrip("/").rpartition("/")[2].lower()
    known = {_plain(preset): preset for preset in preset_names()}
    while name:
        if _plain(name) in known:
            return known[_plain(name)]
        name = name.rpartition("-")[0]
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
