"""Experts in host memory: what happens when the router has chosen and some experts are not on the device.

Experts that are resident run at once. Each missing one is copied over the host link and runs when it has arrived,
most loaded first; then the prefetcher may send experts of the next layer after them. A miss takes a slot of its layer:
a free one, or that of a victim which the step does not need; where there is none, the expert runs from a staging
buffer and is dropped.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.costs.operators import Operators, Timed
from moesim.hardware import Cluster
from moesim.model import BYTES_PER_PARAM, ModelSpec
from moesim.policies.cache import Cache, CacheView
from moesim.policies.prefetch import NextLayerGate, NoPrefetch
from moesim.program.operation import Fragment, Operation

_ARRIVED = -1


class ExpertStore:
    """Which experts each layer has on the device, over one run.

    Args:
        slots_per_layer: experts that fit on the device, per MoE layer; it starts with the lowest ids.
        operators: of the cluster's device.
    """

    def __init__(
        self, model: ModelSpec, cluster: Cluster, slots_per_layer: int, cache: Cache,
        prefetch: NoPrefetch | NextLayerGate, operators: Operators,
    ) -> None:  # fmt: skip
        self._model, self._cluster, self._operators = model, cluster, operators
        self._cache, self._prefetch, self._slots = cache, prefetch, slots_per_layer
        num_layers, num_experts = len(model.moe_layers), model.experts.num_experts
        self.resident: list[dict[int, int]] = [
            dict.fromkeys(range(slots_per_layer), _ARRIVED) for _ in range(num_layers)
        ]
        shape = (num_layers, num_experts)
        self._view = CacheView(-1, np.full(shape, -1, np.int64), np.zeros(shape, np.int64))
        self.num_hits = self.num_misses = self.num_prefetched = 0
        widths = model.experts.expert_widths
        self._params_E = np.array([float(model.experts.expert_params(model.hidden_size, w)) for w in widths])
        self._bytes_E = self._params_E * BYTES_PER_PARAM[model.dtypes.experts]
        self._load_LE = np.zeros(shape, np.int32)
        self._predicted: NDArray[np.unsignedinteger] | None = None
        self._last_copy: int | None = None
        self._priced: dict[bytes, Timed] = {}

    def begin(self, load_LE: NDArray[np.int32], predicted_BLK: NDArray[np.unsignedinteger] | None) -> None:
        """Start a step with the tokens of each expert and the predictions captured with them."""
        self._load_LE, self._predicted, self._last_copy = load_LE, predicted_BLK, None
        self._view.step += 1
        for layer in self.resident:
            for expert in layer:
                layer[expert] = _ARRIVED

    def expand(self, layer: int, choice: int, first_id: int) -> Fragment:
        """The fetches and the expert computations of one layer, in the order in which they are queued."""
        load_E = self._load_LE[layer]
        needed = [int(e) for e in np.lexsort((np.arange(load_E.size), -load_E)) if load_E[e] and self._params_E[e]]
        resident = self.resident[layer]
        here = [e for e in needed if resident.get(e) == _ARRIVED]
        coming = [e for e in needed if resident.get(e, _ARRIVED) != _ARRIVED]
        missing = [e for e in needed if e not in resident]
        self.num_hits += len(here) + len(coming)
        self.num_misses += len(missing)
        pieces = _Pieces(first_id, self._model.moe_layers[layer])
        last_run: int | None = None
        if here:
            last_run = pieces.add("experts", "compute", self._run(load_E, here), 0.0, ())
        for expert in [*coming, *missing]:
            copy = resident.get(expert, _ARRIVED)
            if expert not in resident:
                copy = self._fetch(pieces, "expert_copies", expert)
                self._keep(layer, expert, set(needed))
            waits = (copy,) if last_run is None else (copy, last_run)
            last_run = pieces.add("experts", "compute", self._run(load_E, [expert]), 0.0, waits)
        self._view.last_use_LE[layer, needed] = self._view.step
        self._view.num_uses_LE[layer, needed] += 1
        self._send_ahead(layer, pieces)
        join = () if last_run is None else (last_run,)
        return pieces.fragment(join)

    def _send_ahead(self, layer: int, pieces: _Pieces) -> None:
        if layer + 1 >= len(self.resident) or self._predicted is None:
            return
        wanted = list(self._prefetch.choose(self._predicted[:, layer]))[: self._slots]
        for expert in wanted:
            if expert not in self.resident[layer + 1] and self._keep(layer + 1, expert, set(wanted)):
                self.resident[layer + 1][expert] = self._fetch(pieces, "prefetch", expert)
                self.num_prefetched += 1

    def _fetch(self, pieces: _Pieces, name: str, expert: int) -> int:
        waits = () if self._last_copy is None else (self._last_copy,)
        num_bytes = float(self._bytes_E[expert])
        copy = self._operators.host_copy(num_bytes, self._cluster)
        self._last_copy = pieces.add(name, "h2d", copy, num_bytes, waits)
        return self._last_copy

    def _keep(self, layer: int, expert: int, needed: set[int]) -> bool:
        """Give the expert a slot of its layer, if one is free or can be freed."""
        resident = self.resident[layer]
        if len(resident) >= self._slots:
            candidates = sorted(e for e in resident if e not in needed)
            if not candidates:
                return False
            victim = self._cache.victim(layer, candidates, self._view)
            if victim not in candidates:
                raise RuntimeError(f"cache policy chose expert {victim}, which is not one of {candidates}")
            del resident[victim]
        resident[expert] = _ARRIVED
        return True

    def _run(self, load_E: NDArray[np.int32], experts: list[int]) -> Timed:
        """Experts computed by one launch, an array of one entry."""
        load_S, params_S = load_E[experts], self._params_E[experts]
        key = load_S.tobytes() + params_S.tobytes()  # the same few loads come again and again
        if key not in self._priced:
            m, load_LRS, params_LRS = self._model, load_S.reshape(1, 1, -1), params_S.reshape(1, 1, -1)
            self._priced[key] = self._operators.experts(
                load_LRS, params_LRS, m.experts, m.hidden_size, m.dtypes.experts
            )
        return self._priced[key]


class _Pieces:
    """A fragment being written."""

    def __init__(self, first_id: int, layer: int) -> None:
        self._first_id, self._layer = first_id, layer
        self._operations: list[Operation] = []
        self._seconds: list[float] = []
        self._bytes: list[float] = []
        self._shares: list[NDArray[np.float64]] = []

    def add(self, name: str, resource: str, timed: Timed, num_bytes: float, after: tuple[int, ...]) -> int:
        self._operations.append(Operation(name, self._layer, resource, "rank", after))
        self._seconds.append(float(timed.seconds.sum()))
        self._bytes.append(num_bytes)
        self._shares.append(timed.shares_X)
        return self._first_id + len(self._operations) - 1

    def fragment(self, join: tuple[int, ...]) -> Fragment:
        return Fragment(tuple(self._operations), tuple(self._seconds), tuple(self._bytes), tuple(self._shares), join)
