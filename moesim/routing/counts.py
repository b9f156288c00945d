"""Count traces: how often each expert was chosen, window by window, where a source tells no more than that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moesim.routing.trace import RoutingTrace

ORIGIN = "counts"
REQUEST_TOKENS = 128
_SWAPS = 4
"""Times that each expert of a token is offered for another token's."""
_MOST_TOKENS, _LEAST_TOKENS = 32_768, 32
_MOST_COUNTS, _MOST_ASSIGNMENTS = 1 << 40, 1 << 22
"""Bounds within which the scaling is exact in int64: counts of one layer and window, and assignments made of them."""


@dataclass(frozen=True, eq=False)
class CountTrace:
    """Expert counts of W windows (forward passes, training iterations, texts), L MoE layers and E experts.

    Attributes:
        name: short name, as in reports.
        model: name of the model whose router was counted.
        top_k: K, the experts each counted token was sent to.
        counts_WLE: int64 [W, L, E], assignments (a token counts once for each of its K experts).
        layers: indices, in the whole model, of the L MoE layers.
        provenance: where the counts come from.
    """

    name: str
    model: str
    top_k: int
    counts_WLE: NDArray[np.int64]
    layers: tuple[int, ...]
    provenance: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """E, the same in every layer."""
        return int(self.counts_WLE.shape[2])

    def mistakes(self) -> list[str]:
        """Every broken rule of the counts, one line each; an empty list where all is well."""
        counts = self.counts_WLE
        if counts.ndim != 3 or counts.dtype != np.int64 or 0 in counts.shape:
            return [f"counts must be int64 [windows, layers, experts], none of them 0; given {counts.dtype} "
                    f"{list(counts.shape)}"]  # fmt: skip
        _, L, E = counts.shape
        found = []
        if len(self.layers) != L or any(b <= a for a, b in zip((-1, *self.layers), self.layers, strict=False)):
            found.append(f"layer must name {L} layers, not negative and increasing; given {list(self.layers)}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or not 1 <= self.top_k <= E:
            found.append(f"top_k must be a whole number from 1 to the {E} experts; given {self.top_k!r}")
        total_WL = counts.sum(axis=2)
        for bad, rule in (
            ((counts < 0).any(axis=2), "a count must not be negative"),
            (total_WL == 0, "every layer needs at least one count in every window; drop the empty ones"),
            (
                (total_WL > _MOST_COUNTS) | (counts > _MOST_COUNTS).any(axis=2),
                f"a layer's counts of one window must stay below {_MOST_COUNTS}; scale them",
            ),
        ):
            if bad.any():
                w, i = np.unravel_index(int(bad.argmax()), bad.shape)
                found.append(f"window {w}, layer number {i}: {rule}; given {counts[w, i].tolist()} ({bad.sum()} rows)")
        return found or self._share_mistakes(total_WL)

    def _share_mistakes(self, total_WL: NDArray[np.int64]) -> list[str]:
        """No expert may have more than 1/K of its layer's counts, as a token's K experts are distinct."""
        over_WL = self.counts_WLE.max(axis=2) * self.top_k > total_WL
        if not over_WL.any():
            return []
        w, i = np.unravel_index(int(over_WL.argmax()), over_WL.shape)
        expert, most = int(self.counts_WLE[w, i].argmax()), int(self.counts_WLE[w, i].max())
        fits = int((total_WL // self.counts_WLE.max(axis=2)).min())
        return [
            f"window {w}, layer {self.layers[i]}: expert {expert} has {most} of {total_WL[w, i]} counts, more than "
            f"1/{self.top_k}; a token's {self.top_k} experts are distinct, so none can have that much; give top_k of "
            f"at most {fits}, or counts of all of a token's experts ({int(over_WL.sum())} rows)"
        ]

    def to_routing(self, num_tokens: int | None = None, seed: int = 0) -> RoutingTrace:
        """A routing trace, of origin "counts", whose expert loads are these counts, scaled to T x K a window and layer.

        Only the loads are the source's. Which experts a token has together, which tokens follow each other and what
        one layer tells of the next are left to chance. Loads are exact: shares are rounded by largest remainder, then
        every expert e is listed n_e times, in a random order of experts, and the list fills a [K, T] array row by
        row: as n_e <= T, no column holds an expert twice (the wrap-around rule of McNaughton, Management Science 6,
        1959). Columns are tokens, shuffled in every layer. Then tokens trade experts in random pairs, where both stay
        distinct: the list alone would make few sets of experts (4 pairs of 8 even experts, where 28 can be).

        A window is cut into requests of 128 tokens (the last one may be shorter); the first half of a request is
        labelled prefill, the other decode, as counts do not tell.

        Args:
            num_tokens: T, tokens of every window. By default what the window had (its largest layer total over K,
                rounded up), but at most 32,768 over the number of windows, or 32 where that is more.
            seed: of the shuffling.

        Raises:
            ValueError: the counts break a rule, or `num_tokens` is out of range.
        """
        if mistakes := self.mistakes():
            raise ValueError(f"count trace {self.name!r}:\n" + "\n".join(f"  {mistake}" for mistake in mistakes))
        W, L, E = self.counts_WLE.shape
        most = _MOST_ASSIGNMENTS // self.top_k
        if num_tokens is not None and not 1 <= num_tokens <= most:
            raise ValueError(f"num_tokens must be from 1 to {most}, tokens a window; given {num_tokens}")
        if num_tokens is None:
            own_W = -(-self.counts_WLE.sum(axis=2).max(axis=1) // self.top_k)
            tokens_W = np.minimum(own_W, max(_LEAST_TOKENS, _MOST_TOKENS // W))
        else:
            tokens_W = np.full(W, num_tokens)
        rng = np.random.default_rng(seed)
        ids_TLK = np.empty((int(tokens_W.sum()), L, self.top_k), np.uint8 if E <= 256 else np.uint16)
        start = 0
        for counts_LE, T in zip(self.counts_WLE, tokens_W.tolist(), strict=True):
            for layer, load_E in enumerate(scaled(counts_LE, T * self.top_k)):
                ids_TLK[start : start + T, layer] = _assigned(load_E, T, rng)
            start += T
        lengths = np.array([n for T in tokens_W.tolist() for n in _request_lengths(T)])
        position_T = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        return RoutingTrace(
            name=self.name,
            model=self.model,
            origin=ORIGIN,
            num_experts=E,
            expert_ids_TLK=ids_TLK,
            request_T=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
            position_T=position_T.astype(np.int32),
            is_decode_T=position_T >= np.repeat(lengths - lengths // 2, lengths),
            token_id_T=None,
            layers=self.layers,
            provenance={**self.provenance, "routing": f"made from counts of {W} windows, seed {seed}"},
        )


def scaled(counts_LE: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Each row scaled to the sum `total` by largest remainder, ties to the lower expert, int64 [L, E].

    Every entry is its exact share rounded down or up (Hamilton's method of apportionment).
    """
    sum_L = counts_LE.sum(axis=1, keepdims=True)
    load_LE, rest_LE = np.divmod(counts_LE * total, sum_L)
    missing_L = total - load_LE.sum(axis=1, keepdims=True)
    rank_LE = np.argsort(np.argsort(-rest_LE, axis=1, kind="stable"), axis=1, kind="stable")
    return np.asarray(load_LE + (rank_LE < missing_L))


def _assigned(load_E: NDArray[np.int64], num_tokens: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """K distinct experts for each token, [T, K], expert e in exactly load_E[e] <= T of them."""
    order_E = rng.permutation(len(load_E))
    listed_KT = np.repeat(order_E, load_E[order_E]).reshape(-1, num_tokens)
    ids_TK = listed_KT.T[rng.permutation(num_tokens)]
    top_k, half = ids_TK.shape[1], num_tokens // 2
    one, other = ids_TK[:half], ids_TK[half : 2 * half]
    row = np.arange(half)
    for _ in range(_SWAPS * top_k if half else 0):
        partner = (row + rng.integers(half)) % half
        i, j = rng.integers(top_k, size=(2, half))
        mine, theirs = one[row, i], other[partner, j]
        swap = (one != theirs[:, None]).all(axis=1) & (other[partner] != mine[:, None]).all(axis=1)
        one[row[swap], i[swap]] = theirs[swap]
        other[partner[swap], j[swap]] = mine[swap]
    return rng.permuted(ids_TK, axis=1)


def _request_lengths(num_tokens: int) -> list[int]:
    whole, rest = divmod(num_tokens, REQUEST_TOKENS)
    return [REQUEST_TOKENS] * whole + [rest] * (rest > 0)
