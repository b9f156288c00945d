"""A torch profiler trace as seconds of GPU work by class of operator, and what the host left idle."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CLASSES: tuple[tuple[str, str], ...] = (
    ("collective", r"nccl|all_?reduce|all_?gather|reduce_?scatter|cross_device_reduce|all_?to_?all|deep_?ep"),
    ("attention", r"attn|attention|fmha|flash|mla|paged"),
    ("experts", r"moe|expert|grouped_?gemm|group_?gemm"),
    ("gemm", r"gemm|gemv|matmul|cutlass|cublas|nvjet|xmma|wgmma|splitk"),
    ("copy", r"memcpy|memset"),
)
"""Class and the pattern of its kernels' names; the first that matches counts, "other" where none does."""

_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_STEP = re.compile(r"ProfilerStep#\d+$")


@dataclass(frozen=True)
class ProfiledSteps:
    """Iterations of a profiled program, means over them, in seconds.

    Attributes:
        num_steps: iterations with GPU work.
        class_s: class -> seconds of its kernels (kernels of several streams may overlap).
        span_s: from the start of an iteration to its end.
        busy_s: part of it in which at least one kernel ran.
    """

    num_steps: int
    class_s: Mapping[str, float]
    span_s: float
    busy_s: float

    @property
    def gap_s(self) -> float:
        """Part of an iteration in which the GPU had nothing to do: the host's overhead."""
        return self.span_s - self.busy_s


def kernel_class(name: str) -> str:
    """Class of a kernel by its name.

    >>> kernel_class("ncclDevKernel_AllReduce_Sum_bf16_RING_LL")
    'collective'
    >>> kernel_class("void flash::flash_fwd_splitkv_kernel")
    'attention'
    """
    return next((label for label, pattern in CLASSES if re.search(pattern, name, re.IGNORECASE)), "other")


def read_profile(path: str | Path, step_name: str | None = None) -> ProfiledSteps:
    """Read a Chrome trace of torch.profiler (`export_chrome_trace`), plain or gzipped.

    Layout: {"traceEvents": [{"ph": "X", "cat": ..., "name": ..., "ts": us, "dur": us}, ...]}; kernels have the category
    "kernel", "gpu_memcpy" or "gpu_memset"; iterations are annotations "ProfilerStep#n", or those called `step_name`. A
    kernel belongs to the iteration in which it starts, but keeps the GPU busy in every one that it runs in.

    Raises:
        ValueError: not such a trace, or no iteration or kernel in it.
    """
    path = Path(path)
    events = _events(path)
    steps = sorted({(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events if _is_step(e, step_name)})
    kernels = [(float(e["ts"]), float(e["dur"]), str(e.get("name"))) for e in events if e.get("cat") in _GPU]
    if not steps:
        wanted = step_name or "ProfilerStep#n"
        raise ValueError(
            f"{path}: no annotation {wanted!r}; call profiler.step() once an iteration, or name the annotation"
        )
    if not kernels:
        raise ValueError(f"{path}: no event of the categories {', '.join(_GPU)}; record with ProfilerActivity.CUDA")
    class_us: dict[str, float] = {}
    spans, busy = [], []
    for start, end in steps:
        mine = [(dur, name) for ts, dur, name in kernels if start <= ts < end]
        if not mine:
            continue
        for dur, name in mine:
            label = kernel_class(name)
            class_us[label] = class_us.get(label, 0.0) + dur
        spans.append(end - start)
        busy.append(
            covered([(max(ts, start), min(ts + dur, end)) for ts, dur, _ in kernels if ts < end and ts + dur > start])
        )
    if not spans:
        raise ValueError(f"{path}: no kernel starts in any of its {len(steps)} iterations; synchronise before step()")
    num = len(spans)
    seconds = {label: us * 1e-6 / num for label, us in sorted(class_us.items())}
    return ProfiledSteps(num, seconds, float(np.mean(spans)) * 1e-6, float(np.mean(busy)) * 1e-6)


def _is_step(event: Mapping[str, Any], step_name: str | None) -> bool:
    """Whether an event is an iteration of the host: the profiler repeats its annotations on the GPU's own rows."""
    name = str(event.get("name"))
    is_named = name == step_name if step_name else bool(_STEP.match(name))
    return is_named and not str(event.get("cat")).startswith("gpu")


def _events(path: Path) -> list[Mapping[str, Any]]:
    try:
        raw = path.read_bytes()
        text = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        events = json.loads(text)["traceEvents"]
        return [e for e in events if e.get("ph") == "X" and "ts" in e and "dur" in e]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give a trace of torch.profiler") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise ValueError(
            f"{path}: not a Chrome trace with traceEvents ({error}); export_chrome_trace writes one"
        ) from error


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals.

    >>> covered([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)])
    4.0
    """
    total, reached = 0.0, -np.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return float(total)
