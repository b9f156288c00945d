"""A scenario whose experts do not fit: its policies, its store and its clock, over the iterations of the run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from moesim.costs.operators import Operators
from moesim.offload.prices import Prices, host_of
from moesim.offload.replay import PolicySet
from moesim.offload.routing import counted_LE, routing_of
from moesim.offload.steps import OffloadedSteps
from moesim.offload.store import ExpertStore
from moesim.policies.view import View
from moesim.program.iterations import Iteration, Iterations
from moesim.program.operation import Played


class OffloadedRun:
    """The iterations of one scenario, played one after another."""

    def __init__(self, iterations: Iterations) -> None:
        s, self._iterations = iterations.scenario, iterations
        self._trace, policies = s.trace, s.policies
        L, E = len(s.model.moe_layers), s.model.experts.num_experts
        view = View(L, E, s.model.experts.top_k)
        chosen = PolicySet.named(policies)
        cache, predictor = chosen.cache, chosen.predictor
        future_SLE = self._future_SLE() if cache.needs_future or predictor.needs_future else None
        slots = L * int(np.ceil(E * policies.device_expert_fraction))
        history_LE = self._history_LE() if cache.needs_history else None
        store = ExpertStore(view, slots, cache, future_SLE, history_LE)
        host = host_of(s.cluster, chosen.executor.numa_aware)
        self.prices = Prices(s.model, s.cluster, iterations.operators(iterations.bound), host)
        self.steps = OffloadedSteps(
            store, self.prices, chosen.executor, chosen.prefetch,
            predictor.start(view, future_SLE, s.stream("predictor")), s.model.moe_layers, self._host_slots(),
        )  # fmt: skip
        self._host_operators = Operators(host, iterations.bound) if chosen.executor.whole_layers and host else None
        self._num_steps = 0

    def play(self, iteration: Iteration) -> Played:
        """The next iteration."""
        self._num_steps += 1
        assert iteration.counts is not None
        load_LE = iteration.counts.load_LRS[:, 0, :].astype(np.int64)
        batch, is_prefill = iteration.batch, iteration.phase == "prefill"
        routing = routing_of(self._trace, batch.rows_B, load_LE, int(batch.members.request_Q[0]), is_prefill)
        on_host, operators = None, self._host_operators
        if operators is not None:
            forward, bound = self._iterations.forward, self._iterations.bound
            on_host = forward.price([(iteration.batch, None)], bound, lambda _: operators)
        return self.steps.play(iteration.program, iteration.costs, routing, on_host)

    def metrics(self) -> Mapping[str, float]:
        """What the run says of experts."""
        uses, store = self.steps.store.uses, self.steps.store
        total, busy = max(uses.total, 1), self.steps.busy_s
        elapsed_s = max(self.steps.now_s, 1e-30)
        found = {
            "expert_hit_rate": uses.hit_rate,
            "cached_expert_fraction": uses.cached / total,
            "prefetched_expert_fraction": uses.prefetched / total,
            "late_expert_fraction": uses.late / total,
            "prefetched_experts_per_iteration": store.num_prefetched / max(self._num_steps, 1),
            "host_link_busy_fraction": busy.get("h2d", 0.0) / elapsed_s,
            "device_busy_fraction": busy.get("compute", 0.0) / elapsed_s,
        }
        found |= {f"{unit}_busy_fraction": busy[unit] / elapsed_s for unit in ("cpu", "disk") if unit in busy}
        cluster, joules = self._iterations.scenario.cluster, 0.0
        for unit, device in (("gpu", cluster.device), ("near", cluster.near)):
            if read := self.steps.read_bytes[unit]:
                joules += read * (device.energy_j.get("byte", np.nan) if device else np.nan)
        if np.isfinite(joules) and joules:
            found["expert_read_joules_per_iteration"] = joules / max(self._num_steps, 1)
        return found

    def _host_slots(self) -> int | None:
        """Experts that fit in host memory, where some must stay on disk."""
        s = self._iterations.scenario
        away, room = s.host_bytes()
        return None if away <= room else int(room / self.prices.bytes_E.max())

    def _future_SLE(self) -> NDArray[np.int32]:
        """Tokens of each expert in each iteration, for oracles only."""
        it, ids_TLK, E = self._iterations, self._trace.expert_ids_TLK, self._trace.num_experts
        batches = [*it.prefill_batches(), *it.decode_batches()]
        return np.stack([counted_LE(ids_TLK[batch.rows_B], E) for batch in batches]).astype(np.int32)

    def _history_LE(self) -> NDArray[np.int64]:
        """Uses in the requests that are not replayed."""
        return counted_LE(self._trace.expert_ids_TLK[self._iterations.replay.history], self._trace.num_experts)
