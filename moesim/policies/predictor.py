"""Predictor: which experts will the layers to come of this step use? Decision: expected uses, into `view.predicted_LE`.

`begin` is asked before the first layer of a step, `look` after each router has chosen; both write rows of the layers to
come. Rows are shares (they add up to about k for one token) or counts: only their order and their sum over a layer
matter. A predictor sees the past and the captured guesses of the model's own routers; one whose name begins with Oracle
is given the truth. That of Pre-gated MoE is exact because the model was trained to choose a layer early.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.policies.view import View


class Predictor(Protocol):
    """The decision object of one run."""

    def begin(self, view: View) -> None:
        """A step begins; `view.predicted_LE` is all 0."""

    def look(self, view: View) -> None:
        """A layer's router has chosen."""


@dataclass(frozen=True)
class _Plain:
    needs_guesses: ClassVar[bool] = False
    needs_future: ClassVar[bool] = False


@dataclass(frozen=True)
class NoPredictor(_Plain):
    """Nothing is predicted."""

    def start(self, view: View, future_SLE: NDArray[np.int32] | None, rng: np.random.Generator) -> Predictor:
        """The decision object for one run."""
        return _Silent()


class _Silent:
    def begin(self, view: View) -> None:
        pass

    def look(self, view: View) -> None:
        pass


@dataclass(frozen=True)
class Popularity(_Plain):
    """Experts used most so far, as MoE-Infinity (arXiv 2401.14361) says of BrainStorm's global counts."""

    def start(self, view: View, future_SLE: NDArray[np.int32] | None, rng: np.random.Generator) -> Predictor:
        """The decision object for one run."""
        return _Popularity()


class _Popularity(_Silent):
    def begin(self, view: View) -> None:
        view.predicted_LE[:] = view.top_k * view.num_uses_LE / max(view.step, 1)


@dataclass(frozen=True)
class NextLayerGate(_Plain):
    """The routers of the next layers, applied to this layer's hidden state: what the trace has captured of that.

    horizon: layers ahead, as far as they were captured.
    Source: mixtral-offloading (arXiv 2312.17238), section 3.2; three layers ahead: HybriMoE (arXiv 2504.05897).
    """

    needs_guesses: ClassVar[bool] = True
    horizon: int = 3

    def start(self, view: View, future_SLE: NDArray[np.int32] | None, rng: np.random.Generator) -> Predictor:
        """The decision object for one run."""
        return _Gate(self.horizon)


@dataclass
class _Gate(_Silent):
    horizon: int

    def look(self, view: View) -> None:
        for ahead, guessed_E in enumerate(view.guessed[: self.horizon], 1):
            if view.layer + ahead < view.num_layers:
                view.predicted_LE[view.layer + ahead] = guessed_E


@dataclass(frozen=True)
class OracleStated(_Plain):
    """Right with a stated probability, for each expert by itself; a wrong guess is some other expert of the layer.

    For models whose guesses nobody captured: the accuracy is the source's, not the trace's.

    Args:
        accuracy_H: probability one, two, ... layers ahead; nothing is said beyond.
        accuracy_L: factor on it for each layer that is guessed; the last stands for all further ones.
        whole_path: all layers are guessed when the step begins, each with the first accuracy.
    """

    needs_future: ClassVar[bool] = True
    accuracy_H: tuple[float, ...] = (0.87, 0.8, 0.72)
    accuracy_L: tuple[float, ...] = (1.0,)
    whole_path: bool = False

    def start(self, view: View, future_SLE: NDArray[np.int32] | None, rng: np.random.Generator) -> Predictor:
        """The decision object for one run."""
        if future_SLE is None:
            raise TypeError(f"{type(self).__name__} needs the tokens of all steps")
        return _Stated(self, future_SLE, rng)


@dataclass(eq=False)
class _Stated:
    policy: OracleStated
    future_SLE: NDArray[np.int32]
    rng: np.random.Generator

    def begin(self, view: View) -> None:
        if self.policy.whole_path:
            for layer in range(view.num_layers):
                self._guess(view, layer, self.policy.accuracy_H[0])

    def look(self, view: View) -> None:
        if not self.policy.whole_path:
            for ahead, accuracy in enumerate(self.policy.accuracy_H, 1):
                if view.layer + ahead < view.num_layers:
                    self._guess(view, view.layer + ahead, accuracy)

    def _guess(self, view: View, layer: int, accuracy: float) -> None:
        by_layer = self.policy.accuracy_L
        accuracy *= by_layer[min(layer, len(by_layer) - 1)]
        true_E = self.future_SLE[view.step, layer]
        guessed_E = true_E.astype(np.float64)
        if accuracy < 1:
            (ids,) = true_E.nonzero()
            wrong = ids[self.rng.random(len(ids)) >= accuracy]
            if len(wrong):
                others = np.flatnonzero(true_E == 0)
                guessed_E[wrong] = 0
                if len(others):
                    drawn = self.rng.choice(others, min(len(wrong), len(others)), replace=False)
                    guessed_E[drawn] = true_E[wrong[: len(drawn)]]
        view.predicted_LE[layer] = guessed_E


@dataclass(frozen=True)
class PreGate(OracleStated):
    """The router of a layer chooses for the next one, so that the prediction is the choice; none for the first layer.

    Source: Pre-gated MoE (arXiv 2308.12066), section IV-A: the model is trained so.
    """

    accuracy_H: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class WholePath(OracleStated):
    """A small model that tells the experts of all layers before the first: right in 9 of 10 cases at least.

    Source: ExpertFlow (arXiv 2410.17954), section III-B: above 90 % in its own domain, 80 to 90 % across.
    """

    accuracy_H: tuple[float, ...] = (0.92,)
    whole_path: bool = True


@dataclass(frozen=True)
class Oracle(OracleStated):
    """All layers of the step, without a mistake."""

    accuracy_H: tuple[float, ...] = (1.0,)
    whole_path: bool = True


@dataclass(frozen=True)
class EAMMatch(_Plain):
    """What past requests did whose activations so far look most like those of this request.

    A request's matrix counts the tokens of each expert in each layer. After each layer, the matrix of this step is
    compared with the matrices of past requests (cosine); those matched are added up, each row is made to sum to k, and
    that of layer i, seen from layer l, is multiplied by 1 - (i - l) / L. A new request's matrix takes the place of the
    stored one that it is most like, when the collection is full.

    Args:
        capacity: matrices stored. matched: how many of them are added up; the paper does not say.

    Source: MoE-Infinity (arXiv 2401.14361), section 5.
    """

    capacity: int = 120
    matched: int = 4

    def start(self, view: View, future_SLE: NDArray[np.int32] | None, rng: np.random.Generator) -> Predictor:
        """The decision object for one run."""
        return _EAM(self, view)


class _EAM:
    """Dots and norms over the layers seen so far grow layer by layer."""

    def __init__(self, policy: EAMMatch, view: View) -> None:
        shape = policy.capacity, view.num_layers, view.num_experts
        self.policy, self.size = policy, 0
        self.stored_CLE = np.zeros(shape, np.float32)
        self.squares_CL = np.zeros(shape[:2], np.float32)
        self.request, self.was_prefill = -1, False
        self.own_LE = np.zeros(shape[1:], np.float32)
        self.dots_C = np.zeros(policy.capacity, np.float32)
        self.norms_C = np.zeros(policy.capacity, np.float32)
        self.best, self.shares_LE = np.zeros(0, np.int64), self.own_LE.copy()
        self.nearness_L1 = (1 - np.arange(1, view.num_layers) / view.num_layers)[:, None].astype(np.float32)

    def begin(self, view: View) -> None:
        if (view.request, view.is_prefill) != (self.request, self.was_prefill):
            if self.own_LE.any():
                self._store()
            self.request, self.was_prefill = view.request, view.is_prefill
        self.dots_C[:] = self.norms_C[:] = 0.0

    def look(self, view: View) -> None:
        layer, load = view.layer, view.load.astype(np.float32)
        self.own_LE[layer, view.ids] += load
        if not self.size:
            return
        self.dots_C[: self.size] += self.stored_CLE[: self.size, layer][:, view.ids] @ load
        self.norms_C += self.squares_CL[:, layer]
        if layer + 1 == view.num_layers:
            return
        with np.errstate(invalid="ignore", divide="ignore"):
            likeness_C = np.nan_to_num(self.dots_C[: self.size] / np.sqrt(self.norms_C[: self.size]))
        best = np.sort(np.argsort(-likeness_C, kind="stable")[: self.policy.matched])
        if not np.array_equal(best, self.best):
            self.best, summed_LE = best, self.stored_CLE[best].sum(axis=0)
            self.shares_LE = view.top_k * summed_LE / np.maximum(summed_LE.sum(axis=1, keepdims=True), 1e-9)
        later = self.shares_LE[layer + 1 :]
        np.multiply(later, self.nearness_L1[: len(later)], out=view.predicted_LE[layer + 1 :])

    def _store(self) -> None:
        norm = np.linalg.norm(self.own_LE)
        place = self.size
        if self.size < self.policy.capacity:
            self.size += 1
        else:
            place = int((self.stored_CLE.reshape(self.size, -1) @ self.own_LE.ravel()).argmax())
        self.stored_CLE[place] = self.own_LE / norm
        self.best = np.zeros(0, np.int64)
        self.squares_CL[place] = (self.stored_CLE[place] ** 2).sum(axis=1)
        self.own_LE[:] = 0.0


@dataclass(frozen=True)
class MapSearch(_Plain):
    """The expert map (each layer's distribution over experts) of the past step whose layers so far are most like this
    one's. For the first layers, which have none before them, the step before of the same request is taken: the paper
    takes the one with the most similar embedding of the prompt, which traces do not have.

    Args:
        capacity: maps stored; the oldest leaves. distance: layers between what is compared and what is predicted.

    Source: FineMoE (arXiv 2502.05370), section 4.2.
    """

    capacity: int = 1000
    distance: int = 3

    def start(self, view: View, future_SLE: NDArray[np.int32] | None, rng: np.random.Generator) -> Predictor:
        """The decision object for one run."""
        return _Maps(self, view)


class _Maps:
    def __init__(self, policy: MapSearch, view: View) -> None:
        shape = policy.capacity, view.num_layers, view.num_experts
        self.policy, self.size, self.next, self.last = policy, 0, 0, -1
        self.stored_CLE = np.zeros(shape, np.float32)
        self.unit_CLE = np.zeros(shape, np.float32)
        self.own_LE = np.zeros(shape[1:], np.float32)
        self.dots_C = np.zeros(policy.capacity, np.float32)

    def begin(self, view: View) -> None:
        if self.own_LE.any():
            self.stored_CLE[self.next] = self.own_LE
            norm_L1 = np.maximum(np.linalg.norm(self.own_LE, axis=1, keepdims=True), 1e-9)
            self.unit_CLE[self.next] = self.own_LE / norm_L1
            self.last, self.next = self.next, (self.next + 1) % self.policy.capacity
            self.size = min(self.size + 1, self.policy.capacity)
        self.dots_C[:] = 0.0
        if self.last >= 0:
            first = slice(0, self.policy.distance)
            view.predicted_LE[first] = view.top_k * self.stored_CLE[self.last, first]

    def look(self, view: View) -> None:
        scores_E = view.scores_E.astype(np.float32)
        self.own_LE[view.layer] = scores_E / max(scores_E.sum(), 1e-9)
        target = view.layer + self.policy.distance
        if not self.size:
            return
        unit_E = scores_E / max(float(np.linalg.norm(scores_E)), 1e-9)
        self.dots_C[: self.size] += self.unit_CLE[: self.size, view.layer] @ unit_E
        if target < view.num_layers:
            best = int(self.dots_C[: self.size].argmax())
            view.confidence = float(self.dots_C[best]) / (view.layer + 1)
            view.predicted_LE[target] = view.top_k * self.stored_CLE[best, target]


PREDICTORS: Mapping[str, type[Any]] = {
    "none": NoPredictor,
    "popularity": Popularity,
    "next_layer_gate": NextLayerGate,
    "pre_gate": PreGate,
    "eam_match": EAMMatch,
    "map_search": MapSearch,
    "whole_path": WholePath,
    "oracle_stated": OracleStated,
    "oracle": Oracle,
}
