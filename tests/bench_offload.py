"""Offload: 1,000 decode tokens of DeepSeek-V2-Lite's routing shape (26 x 64, top-6) under every set of policies, and
under every cache at ten sizes. `python tests/bench_offload.py` runs these alone."""

from __future__ import annotations

import resource
import time

import numpy as np

from moesim.offload.hits import hit_rates_C
from moesim.offload.replay import PolicySet, UnitTimes, replay
from moesim.policies import SYSTEMS
from moesim.policies.cache import CACHES, LRU
from moesim.routing.synthetic import sticky_trace

TIMES = UnitTimes(
    17.3e6, 24e9, gpu_expert_s=25e-6, cpu_expert_s=0.3e-3, cpu_token_s=0.1e-3, near_expert_s=1e-4, host_bytes_per_s=73e9
)


def offload() -> dict[str, tuple[float, str]]:
    """Seconds on one core; the slowest set of policies, and the median."""
    trace = sticky_trace(26, 64, 6, stickiness=0.33, num_tokens=1200)
    rows, history = [np.array([t]) for t in range(1000)], np.arange(1000, 1200)

    def played(name: str, steps: list[np.ndarray]) -> float:
        start = time.perf_counter()
        replay(trace, steps, TIMES, 416, PolicySet.of(name), layer_s=60e-6, shared_s=20e-6, history=history)
        return time.perf_counter() - start

    systems = [name for name, policies in SYSTEMS.items() if "batching" not in policies]
    for name in systems:
        played(name, rows[:2])  # compile
    taken = {name: played(name, rows) for name in systems}
    sizes = [26 * 64 * k // 11 for k in range(1, 11)]
    hit_rates_C(trace, rows[:2], LRU(), sizes)
    start = time.perf_counter()
    for cache in CACHES.values():
        hit_rates_C(trace, rows, cache(), sizes, history=history)
    return {
        "offload_1000_tokens_slowest_s": (max(taken.values()), "s"),
        "offload_1000_tokens_median_s": (float(np.median(list(taken.values()))), "s"),
        "offload_all_caches_ten_sizes_s": (time.perf_counter() - start, "s"),
        "offload_peak_memory_gb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, "GB"),
    }


if __name__ == "__main__":
    for key, (value, unit) in offload().items():
        print(f"{key:48s} {value:8.2f} {unit}")
