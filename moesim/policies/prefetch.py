"""Prefetch: which experts of the layers to come should travel now? Decision: places, first things first.

It is asked when a layer's router has chosen and its own copies are queued, which go first, and when a step begins, if
anything is predicted by then (`view.layer` is -1). Places that were chosen before and are still waiting for the link
are given up if they are not chosen again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.policies.executor import savings
from moesim.policies.view import Floats, Ids, View


class Prices(Protocol):
    """Seconds of experts by their tokens."""

    @property
    def copy_s(self) -> float:
        """Of a copy of one expert to the device."""

    @property
    def cold_s(self) -> float:
        """Of the start of a burst on the CPU."""

    def gpu_s(self, ids: Ids, load: Ids) -> Floats:
        """Of each on the GPU."""

    def cpu_s(self, ids: Ids, load: Ids) -> Floats:
        """Of each on the CPU."""


@dataclass
class Outlook:
    """What the link can do: `layer_s`, seconds of the layer before; `link_free_s`, until it has done what is urgent."""

    prices: Prices
    layer_s: float
    link_free_s: float

    @property
    def num_copies(self) -> int:
        """Copies that would end within one layer, after what is needed now."""
        return max(0, int((self.layer_s - self.link_free_s) / self.prices.copy_s)) if self.prices.copy_s else 0


@dataclass(frozen=True)
class _Plain:
    """stages: buffers for experts that came early, which take no slot until they are used; 0: they take slots.

    preempts: a copy of an expert that is needed now interrupts those of experts that are needed later.
    bulk: all that is chosen of a layer is one copy, and nothing of it is there before all of it is.
    """

    needs_predictions: ClassVar[bool] = True
    stages: ClassVar[int] = 0
    preempts: ClassVar[bool] = False
    bulk: ClassVar[bool] = False


def _best(view: View, layer: int, most: int) -> Ids:
    """Places of the experts that are predicted most for a layer, and are not here yet."""
    predicted_E = view.predicted_LE[layer]
    (ids,) = predicted_E.nonzero()
    order = np.argsort(-predicted_E[ids], kind="stable")[:most]
    first = layer * view.num_experts
    best = ids[order]
    return np.asarray(first + best[view.not_here(first, first + view.num_experts)[best]])


@dataclass(frozen=True)
class NoPrefetch(_Plain):
    """Experts travel when they are needed."""

    needs_predictions: ClassVar[bool] = False

    def choose(self, view: View, outlook: Outlook) -> Sequence[int]:
        """Nothing."""
        return ()


@dataclass(frozen=True)
class NextLayer(_Plain):
    """The experts predicted for the next layer, `width` x k of them at most for each token.

    Source: Pre-gated MoE (arXiv 2308.12066), section IV-B.
    """

    width: float = 1.0

    def choose(self, view: View, outlook: Outlook) -> Sequence[int]:
        """Best first."""
        if view.layer + 1 >= view.num_layers:
            return ()
        tokens = max(1, int(view.load.sum()) // view.top_k)
        return [int(p) for p in _best(view, view.layer + 1, max(1, round(self.width * view.top_k * tokens)))]


@dataclass(frozen=True)
class Speculative(NextLayer):
    """One or two of them, into staging buffers. Source: mixtral-offloading (arXiv 2312.17238), section 3.2."""

    stages: ClassVar[int] = 4
    most: int = 2

    def choose(self, view: View, outlook: Outlook) -> Sequence[int]:
        """Best first."""
        return NextLayer.choose(self, view, outlook)[: self.most]


@dataclass(frozen=True)
class Widened(_Plain):
    """As many of the next layer as travel while this one is computed, at least k for each token.

    Source: Fate (arXiv 2502.12224), section 4.2.
    """

    def choose(self, view: View, outlook: Outlook) -> Sequence[int]:
        """Best first."""
        if view.layer + 1 >= view.num_layers:
            return ()
        tokens = max(1, int(view.load.sum()) // view.top_k)
        found = _best(view, view.layer + 1, max(view.top_k * tokens, outlook.num_copies))
        return [int(p) for p in found]


@dataclass(frozen=True)
class LookFurther(_Plain):
    """The next layer's; where all of these are here, those of the layer after it, and so on.

    Source: AdapMoE (arXiv 2408.10284), section IV-B.
    """

    def choose(self, view: View, outlook: Outlook) -> Sequence[int]:
        """Of the first layer that lacks any."""
        for layer in range(view.layer + 1, view.num_layers):
            if len(found := _best(view, layer, view.num_experts)):
                return [int(p) for p in found]
            if not view.predicted_LE[layer].any():
                break
        return ()


@dataclass(frozen=True)
class WholeLayer(_Plain):
    """All experts of the next layer. Source: SE-MoE (arXiv 2205.10034), as MoE-Prefetch in arXiv 2308.12066."""

    needs_predictions: ClassVar[bool] = False
    bulk: ClassVar[bool] = True

    def choose(self, view: View, outlook: Outlook) -> Sequence[int]:
        """In the order of their ids; the first layer follows the last."""
        first = (view.layer + 1) % view.num_layers * view.num_experts
        return [int(p) for p in first + np.flatnonzero(view.not_here(first, first + view.num_experts))]


@dataclass(frozen=True)
class WholeRing(_Plain):
    """All experts of the layers that come next, as many layers as fit on the device: a ring of layers.

    Source: SE-MoE (arXiv 2205.10034), section 3.2, ring memory offload.
    """

    needs_predictions: ClassVar[bool] = False
    bulk: ClassVar[bool] = True

    def choose(self, view: View, outlook: Outlook) -> Sequence[int]:
        """Layer by layer; the first layer follows the last."""
        found: list[int] = []
        for ahead in range(1, max(2, view.slots // view.num_experts)):
            first = (view.layer + ahead) % view.num_layers * view.num_experts
            found += (first + np.flatnonzero(view.not_here(first, first + view.num_experts))).tolist()
        return found


@dataclass(frozen=True)
class ByActivity(_Plain):
    """All layers to come, those predicted most first, as many as travel while a layer is computed and one more.

    Source: MoE-Infinity (arXiv 2401.14361), section 5.
    """

    preempts: ClassVar[bool] = True

    def choose(self, view: View, outlook: Outlook) -> Sequence[int]:
        """Best first."""
        first = (view.layer + 1) * view.num_experts
        predicted_P = view.predicted_LE.ravel()[first:] * view.not_here(first, view.held_P.size)
        most = min(outlook.num_copies + 1, len(predicted_P))
        if not most:
            return ()
        best = np.argpartition(-predicted_P, most - 1)[:most]
        best = best[np.argsort(-predicted_P[best], kind="stable")]
        return [first + int(p) for p in best if predicted_P[p] > 0]


@dataclass(frozen=True)
class WholePathAhead(_Plain):
    """All that is predicted, the nearest layer first, as many as have slots. A miss goes before all of it.

    Source: ExpertFlow (arXiv 2410.17954).
    """

    preempts: ClassVar[bool] = True

    def choose(self, view: View, outlook: Outlook) -> Sequence[int]:
        """Layer by layer."""
        first = (view.layer + 1) * view.num_experts
        wanted_P = (view.predicted_LE.ravel()[first:] > 0) & view.not_here(first, view.held_P.size)
        return list((first + np.flatnonzero(wanted_P)[: view.slots]).tolist())


@dataclass(frozen=True)
class Threshold(_Plain):
    """Of the layer that was matched: the likeliest until their probabilities add up to 1 - likeness, at least k.

    Sooner ones first: priority is p / layers ahead. A miss stops all of them until it is here.
    Source: FineMoE (arXiv 2502.05370), section 4.3.
    """

    preempts: ClassVar[bool] = True

    def choose(self, view: View, outlook: Outlook) -> Sequence[int]:
        """Of all layers that anything is said of, by p over distance."""
        needed = float(np.clip(1 - view.confidence, 0, 1))
        places, nearness = [], []
        for layer in (view.layer + 1 + np.flatnonzero(view.predicted_LE[view.layer + 1 :].any(axis=1))).tolist():
            p_E = view.predicted_LE[layer]
            order = np.argsort(-p_E, kind="stable")
            sum_E = p_E[order].cumsum()
            most = max(view.top_k, int(np.searchsorted(sum_E / sum_E[-1], needed)) + 1)
            ids = order[:most]
            first = layer * view.num_experts
            ids = ids[view.not_here(first, first + view.num_experts)[ids] & (p_E[ids] > 0)]
            places.append(first + ids)
            nearness.append(p_E[ids] / (layer - view.layer))
        if not places:
            return []
        place_N = np.concatenate(places)
        return list(place_N[np.lexsort((place_N, -np.concatenate(nearness)))].tolist())


@dataclass(frozen=True)
class Impact(_Plain):
    """Of the next layers, the experts whose presence shortens the layer's play-ahead most, while the link has time.

    Source: HybriMoE (arXiv 2504.05897), section IV-C.
    """

    horizon: int = 3

    def choose(self, view: View, outlook: Outlook) -> Sequence[int]:
        """Greatest saving first, the nearer layer of equals."""
        most, prices = outlook.num_copies, outlook.prices
        if most < 1:
            return ()
        found: list[tuple[float, int, int]] = []
        for layer in range(view.layer + 1, min(view.layer + 1 + self.horizon, view.num_layers)):
            predicted_E = view.predicted_LE[layer]
            (ids,) = predicted_E.nonzero()
            if not len(ids):
                continue
            ids = ids[np.argsort(-predicted_E[ids], kind="stable")]
            load = np.maximum(1, np.rint(predicted_E[ids])).astype(np.int64)
            places = layer * view.num_experts + ids
            is_here_N: NDArray[np.bool_] = view.held_P[places] & ~view.coming_P[places]
            if is_here_N.all():
                continue
            saved_N = savings(
                is_here_N, prices.gpu_s(ids, load), prices.cpu_s(ids, load), prices.copy_s, prices.cold_s, 0.0, 0.0, 0.0
            )
            found += [(-saved_N[n], layer, int(places[n])) for n in np.flatnonzero(saved_N > 0)]
        return [place for _, _, place in sorted(found)[:most]]


PREFETCHERS: Mapping[str, type[Any]] = {
    "none": NoPrefetch,
    "next_layer": NextLayer,
    "speculative": Speculative,
    "widened": Widened,
    "look_further": LookFurther,
    "whole_layer": WholeLayer,
    "whole_ring": WholeRing,
    "by_activity": ByActivity,
    "whole_path_ahead": WholePathAhead,
    "threshold": Threshold,
    "impact": Impact,
}
