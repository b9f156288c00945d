"""Expert cache: which expert on the device leaves when another one needs its room? Decision: what each is worth.

The least worthy of the places that are offered leave, the lowest of equals; one of infinite worth never does. A cache
has a *scope*: with "layer", each layer has slots of its own, allotted once by `slots_L`; with "device", all layers
share the slots. Experts that the layer needs now, or that are on their way, are never offered. Policies see the past
only; one whose name begins with Oracle is also given the future.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.policies.view import Floats, Ids, View


class Cache(Protocol):
    """The decision object of one run."""

    def used(self, view: View) -> None:
        """A layer has chosen its experts (`view.layer`, `view.ids`); they do not count as used in `view` yet."""

    def worth(self, places: Ids, view: View) -> Floats:
        """Of each of the places that are offered (sorted), finite or infinite."""

    def left(self, place: int) -> None:
        """A place was overwritten."""


class _Idle:
    def used(self, view: View) -> None:
        pass

    def left(self, place: int) -> None:
        pass


def even_slots_L(slots: int, view: View) -> Ids:
    """Slots shared out evenly over layers, earlier layers first; none has more than experts."""
    slots_L = np.full(view.num_layers, slots // view.num_layers)
    slots_L[: slots % view.num_layers] += 1
    return np.asarray(np.minimum(slots_L, view.num_experts))


@dataclass(frozen=True)
class _PerLayer:
    scope: ClassVar[str] = "layer"
    needs_future: ClassVar[bool] = False
    needs_history: ClassVar[bool] = False
    follows_slots: ClassVar[bool] = False  # what an expert is worth depends on what was held, and on how many

    def slots_L(self, slots: int, view: View) -> Ids:
        """Slots of each layer."""
        return even_slots_L(slots, view)

    def first_P(self, slots_L: Ids, history_LE: NDArray[np.int64], view: View) -> Ids:
        """Places that are filled before the run: the lowest ids of each layer."""
        return np.flatnonzero(np.arange(view.num_experts) < slots_L[:, None])


@dataclass(frozen=True)
class LRU(_PerLayer):
    """Least recently used leaves. Source: mixtral-offloading (arXiv 2312.17238), section 3.1."""

    def start(self, view: View, future: object = None) -> Cache:
        """The decision object for one run."""
        return _LRU()


@dataclass(frozen=True)
class LRUDevice(LRU):
    """The same with slots that all layers share. Source: the caches of Pre-gated MoE (arXiv 2308.12066), figure 15."""

    scope: ClassVar[str] = "device"


class _LRU(_Idle):
    def worth(self, places: Ids, view: View) -> Floats:
        return view.last_use_LE.ravel()[places].astype(np.float64)


@dataclass(frozen=True)
class LFU(_PerLayer):
    """Least frequently used leaves, the older one of two. Source: kTransformers, as in HybriMoE (arXiv 2504.05897)."""

    def start(self, view: View, future: object = None) -> Cache:
        """The decision object for one run."""
        return _LFU()


class _LFU(_Idle):
    def worth(self, places: Ids, view: View) -> Floats:
        uses, last = view.num_uses_LE.ravel()[places], view.last_use_LE.ravel()[places]
        return np.asarray(uses + last / (view.step + 2))


@dataclass(frozen=True)
class Random(_PerLayer):
    """Anybody leaves. Source: the baseline of Read-ME (arXiv 2410.19123)."""

    def start(self, view: View, future: object = None) -> Cache:
        """The decision object for one run."""
        return _Random(np.random.default_rng(0))


@dataclass
class _Random(_Idle):
    rng: np.random.Generator

    def worth(self, places: Ids, view: View) -> Floats:
        return self.rng.random(len(places))


@dataclass(frozen=True)
class LIFO(_PerLayer):
    """Experts inactive in this batch leave first, the one used last of them.

    Experts run in the order of their ids, so the last one is the one that the next batch needs latest.
    Source: Towards MoE Deployment (arXiv 2303.06182), section V, expert buffering.
    """

    def start(self, view: View, future: object = None) -> Cache:
        """The decision object for one run."""
        return _LIFO()


class _LIFO(_Idle):
    def worth(self, places: Ids, view: View) -> Floats:
        return np.asarray(-view.last_use_LE.ravel()[places] - places / (view.held_P.size + 1))


@dataclass(frozen=True)
class ARC(_PerLayer):
    """Adaptive replacement: one list of experts used once, one of those used more often, and a target between them
    that moves to the list whose recently dropped experts are asked for again.

    Source: Megiddo and Modha, FAST 2003; for experts, Fate (arXiv 2502.12224).
    """

    follows_slots: ClassVar[bool] = True

    def start(self, view: View, future: object = None) -> Cache:
        """The decision object for one run."""
        return _ARC([_ARCLayer() for _ in range(view.num_layers)], view.num_experts)


@dataclass
class _ARCLayer:
    once: OrderedDict[int, None] = field(default_factory=OrderedDict)
    often: OrderedDict[int, None] = field(default_factory=OrderedDict)
    ghost_once: OrderedDict[int, None] = field(default_factory=OrderedDict)
    ghost_often: OrderedDict[int, None] = field(default_factory=OrderedDict)
    target: float = 0.0

    def ask(self, place: int, slots: int) -> None:
        if place in self.once or place in self.often:
            self.once.pop(place, None)
            self.often[place] = None
            self.often.move_to_end(place)
        elif place in self.ghost_once:
            self.target = min(slots, self.target + max(1.0, len(self.ghost_often) / len(self.ghost_once)))
            del self.ghost_once[place]
            self.often[place] = None
        elif place in self.ghost_often:
            self.target = max(0.0, self.target - max(1.0, len(self.ghost_once) / len(self.ghost_often)))
            del self.ghost_often[place]
            self.often[place] = None
        else:
            self.once[place] = None
        for ghosts in (self.ghost_once, self.ghost_often):
            while len(ghosts) > slots:
                ghosts.popitem(last=False)

    def ranks(self, places: Ids) -> Floats:
        """Where each stands in the order of leaving: those never asked for, then the list to shrink, oldest first."""
        lists = (self.once, self.often) if len(self.once) > self.target else (self.often, self.once)
        order = {place: i for i, place in enumerate((*lists[0], *lists[1]))}
        return np.array([order.get(place, -1) for place in places.tolist()], np.float64)


@dataclass
class _ARC:
    layers: list[_ARCLayer]
    num_experts: int

    def used(self, view: View) -> None:
        base, layer = view.layer * view.num_experts, self.layers[view.layer]
        slots = max(1, view.slots // view.num_layers)
        for expert in view.ids:
            layer.ask(base + int(expert), slots)

    def worth(self, places: Ids, view: View) -> Floats:
        return self.layers[int(places[0]) // self.num_experts].ranks(places)

    def left(self, place: int) -> None:
        layer = self.layers[place // self.num_experts]
        for known, ghosts in ((layer.once, layer.ghost_once), (layer.often, layer.ghost_often)):
            if place in known:
                del known[place]
                ghosts[place] = None


@dataclass(frozen=True)
class MRS(_PerLayer):
    """Minus recent score: each step, S <- a TopP(s) + (1 - a) S; the smallest S leaves.

    s are the router's scores, of which TopP keeps the p = `width` x k greatest and sets the others to 0.
    Source: HybriMoE (arXiv 2504.05897), section IV-D.
    """

    alpha: float = 0.5
    width: int = 2

    def start(self, view: View, future: object = None) -> Cache:
        """The decision object for one run."""
        return _MRS(np.zeros(view.num_layers * view.num_experts), self)


@dataclass
class _MRS(_Idle):
    worth_P: Floats
    policy: MRS

    def used(self, view: View) -> None:
        E, keep = view.num_experts, min(self.policy.width * view.top_k, view.num_experts)
        worth_E = self.worth_P[view.layer * E : (view.layer + 1) * E]
        worth_E *= 1 - self.policy.alpha
        top = np.argpartition(-view.scores_E, keep - 1)[:keep]
        total = view.scores_E.sum()
        if total > 0:
            worth_E[top] += self.policy.alpha / total * view.scores_E[top]

    def worth(self, places: Ids, view: View) -> Floats:
        return self.worth_P[places]


@dataclass(frozen=True)
class _Shared(_PerLayer):
    scope: ClassVar[str] = "device"


@dataclass(frozen=True)
class ActivationAware(_Shared):
    """The lowest (predicted share of its layer + eps) (1 - layer / L) leaves: early layers, which are predicted worst,
    are kept. Source: MoE-Infinity (arXiv 2401.14361), section 6.
    """

    eps: float = 1e-3

    def start(self, view: View, future: object = None) -> Cache:
        """The decision object for one run."""
        return _ActivationAware(self, view)


@dataclass
class _ActivationAware(_Idle):
    policy: ActivationAware
    view: View

    def __post_init__(self) -> None:
        L = self.view.num_layers
        self.share_LE = np.zeros((L, self.view.num_experts))
        self.decay_P = np.repeat(1 - np.arange(L) / L, self.view.num_experts)

    def used(self, view: View) -> None:
        """Predicted shares of the layers to come, and the true one of this layer."""
        later_LE = view.predicted_LE[view.layer + 1 :]
        if len(later_LE) and later_LE[0].any():  # all layers to come are predicted, or none
            self.share_LE[view.layer + 1 :] = later_LE
        share_E = np.bincount(view.ids, view.load, view.num_experts)
        self.share_LE[view.layer] = share_E / share_E.sum()

    def worth(self, places: Ids, view: View) -> Floats:
        return (self.share_LE.ravel()[places] + self.policy.eps) * self.decay_P[places]


@dataclass(frozen=True)
class ProbabilityFrequency(_Shared):
    """The smallest p x frequency leaves: p from the matched expert map, frequency of all uses, recency left out.

    Source: FineMoE (arXiv 2502.05370), section 4.4.
    """

    def start(self, view: View, future: object = None) -> Cache:
        """The decision object for one run."""
        return _ProbabilityFrequency()


class _ProbabilityFrequency(_Idle):
    def worth(self, places: Ids, view: View) -> Floats:
        p, uses = view.predicted_LE.ravel()[places], view.num_uses_LE.ravel()[places]
        return np.asarray((p + 1e-6) * (uses + 1))


@dataclass(frozen=True)
class SlotsByLoads(LRU):
    """LRU with slots shared out so that the expected loads on demand, summed over layers, are fewest.

    With t of N experts cached, guesses right with probability b, one expert in place of two with probability a:
    a (1 - t/N) (1 - b) + (1 - a) (P2 (b + 2 (1 - b)) + P1 (1 - b)), P2 = (N - t)(N - t - 1) / (N (N - 1)),
    P1 = 2 t (N - t) / (N (N - 1)); for k other than two, k (1 - t/N) (1 - b). By dynamic programming.

    Args:
        accuracy_L: b of each layer, at least one; the last stands for all further ones.
        single_L: a of each layer, likewise.

    Source: AdapMoE (arXiv 2408.10284), section IV-C; the defaults are its measurements of Mixtral-8x7B.
    """

    accuracy_L: tuple[float, ...] = (
        0.0, 0.57, 0.72, 0.79, 0.87, 0.86, 0.83, 0.84, 0.85, 0.80, 0.90, 0.90, 0.89, 0.91, 0.93, 0.88, 0.91, 0.94,
        0.90, 0.88, 0.88, 0.89, 0.88, 0.88, 0.89, 0.88, 0.92, 0.91, 0.89, 0.90, 0.90, 0.85,
    )  # fmt: skip
    single_L: tuple[float, ...] = (
        0.0, 0.03, 0.0, 0.0, 0.0, 0.0, 0.01, 0.03, 0.03, 0.05, 0.01, 0.02, 0.03, 0.01, 0.02, 0.03, 0.06, 0.07, 0.14,
        0.28, 0.30, 0.37, 0.41, 0.36, 0.50, 0.52, 0.55, 0.62, 0.78, 0.88, 0.98, 0.86,
    )  # fmt: skip

    def loads_T(self, layer: int, num_experts: int, top_k: int) -> Floats:
        """Expected loads on demand with t = 0 ... N experts cached."""
        N, t = num_experts, np.arange(num_experts + 1)
        b = self.accuracy_L[min(layer, len(self.accuracy_L) - 1)]
        a = self.single_L[min(layer, len(self.single_L) - 1)]
        absent_T = 1 - t / N
        if top_k != 2:
            return np.asarray(top_k * absent_T * (1 - b))
        both_T, one_T = (N - t) * (N - t - 1) / (N * (N - 1)), 2 * t * (N - t) / (N * (N - 1))
        pair_T = both_T * (b + 2 * (1 - b)) + one_T * (1 - b)
        return np.asarray(a * absent_T * (1 - b) + (1 - a) * pair_T)

    def slots_L(self, slots: int, view: View) -> Ids:
        """Slots of each layer, fewest expected loads in all."""
        E, slots = view.num_experts, min(slots, view.num_layers * view.num_experts)
        best_S = np.full(slots + 1, np.inf)
        best_S[0] = 0.0
        taken = []
        for layer in range(view.num_layers):
            loads_T = self.loads_T(layer, E, view.top_k)
            cost_ST = np.full((slots + 1, E + 1), np.inf)
            for t in range(min(E, slots) + 1):
                cost_ST[t:, t] = best_S[: slots + 1 - t] + loads_T[t]
            taken.append(cost_ST.argmin(axis=1))
            best_S = cost_ST.min(axis=1)
        slots_L, left = np.zeros(view.num_layers, np.int64), slots
        for layer in range(view.num_layers - 1, -1, -1):
            slots_L[layer] = taken[layer][left]
            left -= slots_L[layer]
        return slots_L


@dataclass(frozen=True)
class ShallowFirst(ARC):
    """The first layers keep all their experts, since guesses are worst there; the others share the rest, with ARC.

    shallow: layers that keep all, as far as the slots go.
    Source: Fate (arXiv 2502.12224), section 4.3.
    """

    shallow: int = 3

    def slots_L(self, slots: int, view: View) -> Ids:
        """All experts for the shallow layers, even shares for the others; at least k slots stay for each."""
        L, E = view.num_layers, view.num_experts
        whole = min(self.shallow, max(0, (slots - L * view.top_k) // max(E - view.top_k, 1)), L)
        slots_L = np.full(L, E)
        rest = L - whole
        if rest:
            left = slots - whole * E
            slots_L[whole:] = left // rest
            slots_L[whole : whole + left % rest] += 1
        return np.asarray(np.minimum(slots_L, E))


@dataclass(frozen=True)
class PLEC(_Shared):
    """Slots follow predicted demand: layers that are over give theirs to experts predicted for those to come.

    The nearest predicted uses are kept longest; of what is not predicted, the layers passed go first, oldest first.
    Source: ExpertFlow (arXiv 2410.17954), section III-D, predictive locality-aware expert cache.
    """

    def start(self, view: View, future: object = None) -> Cache:
        """The decision object for one run."""
        return _PLEC(view.num_experts)


@dataclass
class _PLEC(_Idle):
    num_experts: int

    def worth(self, places: Ids, view: View) -> Floats:
        layers = places // self.num_experts
        ahead = layers - view.layer
        wanted = (view.predicted_LE.ravel()[places] > 0) & (ahead > 0)
        recency = view.last_use_LE.ravel()[places] / (view.step + 2.0)
        passed = np.where(ahead <= 0, -1.0, 0.0)  # they were needed a moment ago, and not for a whole step
        return np.where(wanted, 10.0 - ahead / view.num_layers, passed + recency)


@dataclass(frozen=True)
class Ring(_Shared):
    """The layer that was computed last leaves: its turn comes last. Source: SE-MoE (arXiv 2205.10034), section 3.2."""

    def start(self, view: View, future: object = None) -> Cache:
        """The decision object for one run."""
        return _Ring(view.num_experts)

    def first_P(self, slots_L: Ids, history_LE: NDArray[np.int64], view: View) -> Ids:
        """The first layers."""
        return np.arange(int(slots_L.sum()))


@dataclass
class _Ring(_Idle):
    num_experts: int

    def worth(self, places: Ids, view: View) -> Floats:
        return np.asarray(-((places // self.num_experts - view.layer - 1) % view.num_layers), np.float64)


@dataclass(frozen=True)
class Popular(_PerLayer):
    """The most used experts of earlier requests stay for good, wherever they are; others are never kept.

    Source: Fiddler (arXiv 2402.07033), section 3.3; the expert placement of kTransformers (SOSP 2025).
    """

    scope: ClassVar[str] = "device"
    needs_history: ClassVar[bool] = True

    def start(self, view: View, future: object = None) -> Cache:
        """The decision object for one run."""
        return _Fixed()

    def first_P(self, slots_L: Ids, history_LE: NDArray[np.int64], view: View) -> Ids:
        """The most popular places."""
        return np.sort(np.argsort(-history_LE.ravel(), kind="stable")[: int(slots_L.sum())])


@dataclass(frozen=True)
class WholeLayers(_PerLayer):
    """All experts of the first layers stay for good, as many layers as fit. Source: llama.cpp, --n-cpu-moe."""

    def slots_L(self, slots: int, view: View) -> Ids:
        """All or nothing."""
        return np.where(np.arange(view.num_layers) < slots // view.num_experts, view.num_experts, 0)

    def start(self, view: View, future: object = None) -> Cache:
        """The decision object for one run."""
        return _Fixed()


class _Fixed(_Idle):
    def worth(self, places: Ids, view: View) -> Floats:
        return np.full(len(places), np.inf)


@dataclass(frozen=True)
class OracleBelady(_PerLayer):
    """The expert whose next use is farthest leaves: the floor of misses. Source: Belady, IBM Systems Journal 1966.

    lookahead: steps that are known; what is used later counts as never. 0: all.
    """

    needs_future: ClassVar[bool] = True
    lookahead: int = 0

    def start(self, view: View, future: object = None) -> Cache:
        """The decision object for one run; `future` is bool [S, L, E]: which experts each step will use."""
        if not isinstance(future, np.ndarray):
            raise TypeError(f"{type(self).__name__} needs the uses of all steps")
        return _Belady(_next_use_SP(future), self.lookahead)


@dataclass(frozen=True)
class OracleBeladyDevice(OracleBelady):
    """The same with slots that all layers share: the floor for caches of that scope."""

    scope: ClassVar[str] = "device"


def _next_use_SP(used_SLE: NDArray[np.bool_]) -> NDArray[np.int32]:
    """For each moment s L + l of the first S steps, the moment of the next use of each place from step s + 1 on."""
    S, L, E = used_SLE.shape
    next_SP = np.empty((S + 1, L * E), np.int32)
    next_SP[S] = np.iinfo(np.int32).max
    layer_P = np.repeat(np.arange(L, dtype=np.int32), E)
    for s in range(S - 1, -1, -1):
        next_SP[s] = np.where(used_SLE[s].ravel(), s * L + layer_P, next_SP[s + 1])
    return next_SP


@dataclass(frozen=True, eq=False)
class _Belady(_Idle):
    next_SP: NDArray[np.int32] = field(repr=False)
    lookahead: int = 0

    def worth(self, places: Ids, view: View) -> Floats:
        """The sooner a place is needed again, the more."""
        step = np.where(places // view.num_experts > view.layer, view.step, view.step + 1)
        next_N = self.next_SP[step, places].astype(np.float64)
        if self.lookahead:
            next_N[next_N > (view.step + self.lookahead) * view.num_layers + view.layer] = np.iinfo(np.int32).max
        return -next_N


CACHES: Mapping[str, type[Any]] = {
    "lru": LRU,
    "lru_device": LRUDevice,
    "lfu": LFU,
    "random": Random,
    "lifo_inactive_first": LIFO,
    "arc": ARC,
    "mrs": MRS,
    "activation_aware": ActivationAware,
    "probability_frequency": ProbabilityFrequency,
    "slots_by_loads": SlotsByLoads,
    "shallow_first": ShallowFirst,
    "plec": PLEC,
    "ring": Ring,
    "popular": Popular,
    "whole_layers": WholeLayers,
    "oracle_belady": OracleBelady,
    "oracle_belady_device": OracleBeladyDevice,
}
