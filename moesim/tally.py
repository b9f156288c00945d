"""Adding up played iterations into a result."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.hardware import SOURCES
from moesim.program.iterations import Iteration, Iterations
from moesim.program.operation import Played
from moesim.program.walk import account
from moesim.results import Record, Result
from moesim.version import __version__


@njit(cache=True)
def _add_busy(seconds_NR, shares_NX, busy_X):  # type: ignore[no-untyped-def]
    """Add the time of all ranks that rests on each source."""
    for n in range(seconds_NR.shape[0]):
        total = seconds_NR[n].sum()
        for x in range(shares_NX.shape[1]):
            busy_X[x] += total * shares_NX[n, x]


@njit(cache=True)
def _add_load(load_LRS, load_LR):  # type: ignore[no-untyped-def]
    """Add the tokens of each rank, and return the fullest rank's share of the mean, averaged over layers."""
    num_layers, num_ranks, num_slots = load_LRS.shape
    ratios = 0.0
    for layer in range(num_layers):
        total, most = 0, 0
        for r in range(num_ranks):
            tokens = 0
            for s in range(num_slots):
                tokens += load_LRS[layer, r, s]
            load_LR[layer, r] += tokens
            total += tokens
            most = max(most, tokens)
        ratios += most / max(total / num_ranks, 1e-9)
    return ratios / num_layers


class Tally:
    """Sums over the iterations of one run.

    Args:
        timeline: how many iterations of each phase leave their records.
    """

    def __init__(self, iterations: Iterations, engine: str, timeline: int = 0) -> None:
        self._iterations, self._engine, self._timeline = iterations, engine, timeline
        self._step_s: dict[str, list[float]] = {"prefill": [], "decode": []}
        self._parts_s: dict[str, dict[str, float]] = {"prefill": {}, "decode": {}}
        self._busy_s = np.zeros(len(SOURCES))
        self._imbalance: list[float] = []
        self._load_LR: NDArray[np.int64] | None = None
        self._records: list[Record] = []

    def add(self, iteration: Iteration, played: Played, start_s: float) -> None:
        """Count one played iteration that began at `start_s`."""
        steps, parts_s = self._step_s[iteration.phase], self._parts_s[iteration.phase]
        exposed_XR, idle_R = account(played)
        num_ranks = len(idle_R)
        for name, exposed in zip(played.parts, exposed_XR.sum(axis=1).tolist(), strict=True):
            parts_s[name] = parts_s.get(name, 0.0) + exposed / num_ranks
        parts_s["imbalance"] = parts_s.get("imbalance", 0.0) + float(idle_R.sum()) / num_ranks
        _add_busy(played.costs.seconds_NR, played.costs.shares_NX, self._busy_s)
        if iteration.counts is not None and iteration.phase == "decode":
            if self._load_LR is None:
                self._load_LR = np.zeros(iteration.counts.load_LRS.shape[:2], np.int64)
            self._imbalance.append(_add_load(iteration.counts.load_LRS, self._load_LR))
        if len(steps) < self._timeline:
            self._record(iteration, played, start_s)
        steps.append(played.seconds)

    def _record(self, iteration: Iteration, played: Played, start_s: float) -> None:
        step = sum(len(steps) for steps in self._step_s.values())
        index: dict[tuple[int, int], int] = {}
        rows = []
        for n, op in enumerate(played.operations):
            ranks = np.flatnonzero(iteration.program.groups[op.group] >= 0)
            rows += [(float(played.start_NR[n, r]), n, int(r)) for r in ranks]
        rows.sort()
        for i, (_, n, r) in enumerate(rows):
            index[n, r] = len(self._records) + i
        for start, n, r in rows:
            op = played.operations[n]
            after = tuple(index[a, r] for a in op.after if (a, r) in index)
            self._records.append(
                Record(
                    op.name,
                    iteration.phase,
                    step,
                    op.layer,
                    r,
                    op.resource,
                    start_s + start,
                    start_s + float(played.finish_NR[n, r]),
                    float(played.costs.bytes_NR[n, r]),
                    after,
                )
            )

    def result(self, further: Mapping[str, float]) -> Result:
        """The result of the run so far, with further metrics."""
        s, it = self._iterations.scenario, self._iterations
        prefill, decode = self._step_s["prefill"], self._step_s["decode"]
        num_requests = s.workload.num_requests
        total = sum(prefill) + sum(decode)
        gained = s.workload.tokens_per_decode
        tokens = num_requests * len(decode) * gained
        iteration_s = float(np.mean(decode)) if decode else 0.0
        metrics = {
            "output_tokens_per_s": tokens / sum(decode) if decode else 0.0,
            "output_tokens_per_s_per_device": tokens / sum(decode) / s.cluster.num_ranks if decode else 0.0,
            "tpot_s": iteration_s / gained,
            "ttft_s": sum(prefill),
            "prefill_tokens_per_s": float(it.lengths_Q.sum()) / sum(prefill) if prefill else 0.0,
            "e2e_s": total,
            "num_requests": float(num_requests),
            "num_prefill_iterations": float(len(prefill)),
            "num_decode_iterations": float(len(decode)),
        }
        breakdown = {
            phase: {name: value / len(steps) for name, value in self._parts_s[phase].items()}
            for phase, steps in self._step_s.items()
            if steps
        }
        if gained > 1:
            metrics["decode_iteration_s"] = iteration_s
        if self._imbalance:
            metrics["expert_load_max_to_mean_ratio"] = float(np.mean(self._imbalance))
        exposed = [n for n in breakdown.get("decode", {}) if n in _COMMUNICATION]
        if decode and s.cluster.num_ranks > 1:
            metrics["exposed_communication_fraction"] = sum(breakdown["decode"][n] for n in exposed) / iteration_s
        metrics |= further
        busy = self._busy_s.sum()
        shares = {
            f"{name}_fraction": float(b / busy) if busy else 0.0 for name, b in zip(SOURCES, self._busy_s, strict=True)
        }
        return Result(
            name=s.name,
            scenario=s.plain,
            engine=self._engine,
            seed=s.seed,
            version=__version__,
            metrics=metrics,
            provenance=shares,
            breakdown_s=breakdown,
            memory_bytes=s.memory_bytes(),
            load_LR=() if self._load_LR is None else tuple(tuple(map(int, row)) for row in self._load_LR),
            step_s=tuple(decode),
            records=tuple(self._records),
            warnings=tuple(s.warnings() + it.repeats()),
        )


_COMMUNICATION = (
    "dispatch",
    "combine",
    "allreduce",
    "kv_exchange",
    "send",
    "reduce_scatter",
    "all_gather",
    "expert_copies",
    "prefetch",
)
