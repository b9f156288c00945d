"""A generator of routing, fitted to a trace: new requests are mosaics of runs of fitted tokens.

What a trace knows is kept where it is known. Experts that go together in a token and from layer to layer (popularity,
co-activation, transitions, gate weights) are copied from fitted tokens. Stickiness is in the runs: a generated request
follows the tokens of a fitted one and, after `run_tokens` on average, jumps to another place where the trace holds a
token of the *same class* (classes are k-means clusters of tokens by the experts they choose in all layers). Topics: a
request jumps within its home request and the ones nearest to it. Drift: generated requests take their homes in the
order of the trace. New tokens come from crossovers: from some layer on, a run copies another run of the same class.

This is the copying model of population genetics (Li and Stephens, Genetics 165, 2003) with the runs of the stationary
bootstrap (Politis and Romano, JASA 89, 1994). It invents no set of experts that the trace has not got, and knows no
more topics than the trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing.clusters import k_means, nearest, squared_distances
from moesim.routing.mosaic import copy_experts, spread_experts, walk
from moesim.routing.trace import RoutingTrace

_Array = NDArray[Any]
_Walker = tuple[_Array, _Array, _Array, _Array, _Array, _Array]
_PART_TOKEN_LAYERS = 1 << 21
_PROJECTION = 96
_KMEANS_SAMPLE, _KMEANS_ROUNDS = 50_000, 12


@dataclass(frozen=True)
class Shape:
    """Routing shape: L MoE layers, E experts a layer, K experts a token."""

    num_layers: int
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, trace: RoutingTrace) -> Shape:
        """The shape of a trace."""
        return cls(trace.num_layers, trace.num_experts, trace.top_k)


@dataclass(frozen=True, eq=False)
class TraceGenerator:
    """A fitted trace and what the walks over it need.

    Attributes:
        trace: the fitted trace.
        class_T: int32 [T], class of each fitted token; odd for decode tokens, even for prefill.
        near_QN: int32 [Q, N], for each fitted request the N others whose choice of experts is most like its own.
        run_tokens: mean tokens of a run.
        crossover_rate: share of runs whose later layers follow a second run.
    """

    trace: RoutingTrace
    class_T: NDArray[np.int32]
    near_QN: NDArray[np.int32]
    run_tokens: float = 64.0
    crossover_rate: float = 0.5

    def sample(
        self,
        num_requests: int,
        *,
        prompt_tokens: tuple[int, int] | None = None,
        output_tokens: tuple[int, int] | None = None,
        shape: Shape | None = None,
        seed: int = 0,
    ) -> Iterator[RoutingTrace]:
        """New requests, in parts of whole requests that follow each other.

        Args:
            num_requests: requests to make.
            prompt_tokens, output_tokens: shortest and longest, drawn evenly; as in the fitted requests if None.
            shape: routing shape; the fitted one if None. See `spread_experts` for what another one keeps.
            seed: of every draw.

        Raises:
            ValueError: nothing to make, a length is negative, or the shape is none.
        """
        shape = shape or Shape.of(self.trace)
        _check(num_requests, prompt_tokens, output_tokens, shape)
        rng = np.random.default_rng(seed)
        first_Q, request_T = _requests(self.trace)
        num_fitted = len(first_Q)
        home_N = ((np.arange(num_requests) + rng.random(num_requests)) * num_fitted / num_requests).astype(np.int64)
        length_NP = self._lengths(home_N, request_T, (prompt_tokens, output_tokens), rng)
        last_N = np.cumsum(length_NP.sum(axis=1))
        part_N = (last_N - 1) * shape.num_layers // _PART_TOKEN_LAYERS
        walker = self._walker(first_Q, request_T)
        for part in np.unique(part_N):
            requests = np.flatnonzero(part_N == part)
            donor_BL = np.empty((int(length_NP[requests].sum()), shape.num_layers), np.int32)
            walk(
                home_N[requests], length_NP[requests], *walker, self.trace.num_layers, self.run_tokens,
                self.crossover_rate, rng, donor_BL,
            )  # fmt: skip
            yield self._copy(donor_BL, requests, length_NP[requests], shape, seed)

    def _lengths(
        self,
        home_N: NDArray[np.int64],
        request_T: NDArray[np.int64],
        ranges: tuple[tuple[int, int] | None, tuple[int, int] | None],
        rng: np.random.Generator,
    ) -> NDArray[np.int64]:
        """Prefill and decode tokens of each generated request, [N, 2]; at least one of them is not 0."""
        length_NP = np.empty((len(home_N), 2), np.int64)
        for phase, asked in enumerate(ranges):
            if asked is None:
                own = self.trace.is_decode_T if phase else ~self.trace.is_decode_T
                length_NP[:, phase] = np.bincount(request_T[own], minlength=int(request_T[-1]) + 1)[home_N]
            else:
                length_NP[:, phase] = rng.integers(asked[0], asked[1] + 1, len(home_N))
        if (length_NP.sum(axis=1) == 0).any():
            raise ValueError("a generated request would have no token; ask for prompt or output tokens")
        return length_NP

    def _walker(self, first_Q: NDArray[np.int64], request_T: NDArray[np.int64]) -> _Walker:
        """The fitted tokens as `walk` wants them; runs end where a request or its prompt does."""
        T, num_requests = self.trace.num_tokens, len(first_Q)
        is_decode_T = self.trace.is_decode_T
        next_T = np.arange(1, T + 1)
        next_T[np.append((np.diff(request_T) != 0) | (np.diff(is_decode_T)), True)] = -1
        enter_QP = np.stack([first_Q, first_Q], axis=1)
        begins = np.flatnonzero(is_decode_T & np.append(True, (np.diff(request_T) != 0) | np.diff(is_decode_T)))
        enter_QP[request_T[begins], 1] = begins
        key_T = self.class_T.astype(np.int64) * num_requests + request_T
        order_T = np.argsort(key_T, kind="stable")
        return enter_QP, self.class_T, self.near_QN, key_T[order_T], order_T, next_T

    def _copy(
        self,
        donor_BL: NDArray[np.int32],
        requests: NDArray[np.int64],
        length_NP: NDArray[np.int64],
        shape: Shape,
        seed: int,
    ) -> RoutingTrace:
        """The generated tokens of some requests, from the donors of their layers."""
        trace, fitted = self.trace, Shape.of(self.trace)
        B = len(donor_BL)
        ids_BLK = np.empty((B, shape.num_layers, shape.top_k), np.uint8 if shape.num_experts <= 256 else np.uint16)
        layers_L = np.arange(shape.num_layers)
        weights = scores = None
        predicted: tuple[NDArray[np.unsignedinteger], ...] = ()
        if shape == fitted:
            copy_experts(donor_BL, trace.expert_ids_TLK, ids_BLK)
            weights = None if trace.weights_TLK is None else trace.weights_TLK[donor_BL, layers_L]
            scores = None if trace.scores_TLE is None else trace.scores_TLE[donor_BL, layers_L]
            predicted = tuple(
                ids_TLW[donor_BL[:, : ids_TLW.shape[1]], layers_L[: ids_TLW.shape[1]]]
                for ids_TLW in trace.predicted_HTLW
            )
        else:
            weights_BLK = np.zeros(ids_BLK.shape, np.float32)
            even = np.broadcast_to(np.float32(1 / trace.top_k), trace.expert_ids_TLK.shape)
            fitted_weights = even if trace.weights_TLK is None else trace.weights_TLK.astype(np.float32)
            spread_experts(
                donor_BL, self.class_T, trace.expert_ids_TLK, fitted_weights, fitted.num_experts, shape.num_experts,
                ids_BLK, weights_BLK,
            )  # fmt: skip
            weights = None if trace.weights_TLK is None else weights_BLK.astype(np.float16)
        length_N = length_NP.sum(axis=1)
        position_B = (np.arange(B) - np.repeat(np.cumsum(length_N) - length_N, length_N)).astype(np.int32)
        said = "" if shape == fitted else f", fitted at {fitted.num_layers} x {fitted.num_experts} top-{fitted.top_k}"
        return RoutingTrace(
            name=f"{trace.name}-sampled",
            model=f"generator fitted to {trace.name}{said} ({trace.model})",
            origin="synthetic",
            num_experts=shape.num_experts,
            expert_ids_TLK=ids_BLK,
            request_T=np.repeat(requests, length_N).astype(np.int32),
            position_T=position_B,
            is_decode_T=position_B >= np.repeat(length_NP[:, 0], length_N),
            token_id_T=None if trace.token_id_T is None else trace.token_id_T[donor_BL[:, 0]],
            layers=trace.layers if shape.num_layers == fitted.num_layers else tuple(range(shape.num_layers)),
            weights_TLK=weights,
            predicted_HTLW=predicted,
            scores_TLE=scores,
            provenance={
                "generator": f"runs of {self.run_tokens:g} tokens, crossovers in {self.crossover_rate:g} of them",
                "seed": str(seed),
                **{f"fitted {key}": value for key, value in trace.provenance.items()},
            },
        )


def fit_generator(
    trace: RoutingTrace,
    *,
    num_classes: int = 256,
    num_near: int = 2,
    run_tokens: float = 64.0,
    crossover_rate: float = 0.5,
    seed: int = 0,
) -> TraceGenerator:
    """A generator of requests like those of `trace`.

    Args:
        num_classes: token classes, at most one for 32 tokens; more of them make jumps rarer and truer.
        num_near: requests, beside its own, among which a generated request jumps.
        run_tokens, crossover_rate: see `TraceGenerator`.
        seed: of the clustering.

    Raises:
        ValueError: a setting makes no sense.
    """
    if num_classes < 1 or num_near < 1 or run_tokens < 1 or not 0 <= crossover_rate <= 1:
        raise ValueError(
            f"classes, near requests and tokens of a run must be at least 1, the crossover rate in 0..1; given "
            f"{num_classes}, {num_near}, {run_tokens} and {crossover_rate}"
        )
    rng = np.random.default_rng(seed)
    vectors_TD = _projected(trace, rng)
    class_T = _classes(vectors_TD, min(num_classes, max(trace.num_tokens // 32, 1)), rng) * 2 + trace.is_decode_T
    first_Q, _request_T = _requests(trace)
    mean_QD = np.add.reduceat(vectors_TD, first_Q) / np.diff(np.append(first_Q, trace.num_tokens))[:, None]
    distance_QQ = squared_distances(mean_QD, mean_QD)
    np.fill_diagonal(distance_QQ, np.inf)
    others = min(num_near, len(first_Q) - 1)
    near_QN = np.argsort(distance_QQ, axis=1, kind="stable")[:, :others] if others else np.zeros((1, 1))
    return TraceGenerator(trace, class_T.astype(np.int32), near_QN.astype(np.int32), run_tokens, crossover_rate)


def _requests(trace: RoutingTrace) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First token of each request, and the number of each token's request counted from 0."""
    starts_T = np.diff(trace.request_T, prepend=trace.request_T[0] - 1) != 0
    return np.flatnonzero(starts_T), np.cumsum(starts_T) - 1


def _projected(trace: RoutingTrace, rng: np.random.Generator) -> NDArray[np.float32]:
    """Random projection of each token's chosen experts of all layers, [T, 96]; distances are kept (Johnson and
    Lindenstrauss).
    """
    vectors_TD = np.zeros((trace.num_tokens, _PROJECTION), np.float32)
    for layer in range(trace.num_layers):
        image_ED = rng.standard_normal((trace.num_experts, _PROJECTION), np.float32)
        for k in range(trace.top_k):
            vectors_TD += image_ED[trace.expert_ids_TLK[:, layer, k]]
    return vectors_TD


def _classes(vectors_TD: NDArray[np.float32], num: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Cluster of each vector: k-means on a sample, then the nearest centre."""
    T = len(vectors_TD)
    learned = vectors_TD[np.sort(rng.choice(T, min(T, _KMEANS_SAMPLE), replace=False))]
    return nearest(vectors_TD, k_means(learned, num, rng, most_rounds=_KMEANS_ROUNDS)[2])[0]


def _check(num_requests: int, prompts: tuple[int, int] | None, outputs: tuple[int, int] | None, shape: Shape) -> None:
    if num_requests < 1:
        raise ValueError(f"a sample needs at least 1 request; given {num_requests}")
    for what, asked in (("prompt", prompts), ("output", outputs)):
        if asked is not None and not 0 <= asked[0] <= asked[1]:
            raise ValueError(
                f"{what} tokens must be a range of at least 0, shortest first; given {asked[0]}-{asked[1]}"
            )
    if shape.num_layers < 1 or not 1 <= shape.top_k <= shape.num_experts <= 65_536:
        raise ValueError(
            f"a routing shape needs at least 1 layer and 1 <= top k <= experts <= 65536; given {shape.num_layers} "
            f"layers, {shape.num_experts} experts, top {shape.top_k}"
        )
