"""Prefetch: which experts of the next MoE layer should start to travel now? Decision: expert ids, best first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class NoPrefetch:
    """Experts travel when they are needed."""

    needs_predictions = False

    def choose(self, predicted_BK: NDArray[np.unsignedinteger] | None) -> Sequence[int]:
        """Nothing."""
        return ()


@dataclass(frozen=True)
class NextLayerGate:
    """The next layer's router, applied to this layer's hidden state, names the experts to fetch.

    The predictions are the trace's own, captured from the model, never the true choices of the next layer.
    Source: mixtral-offloading (arXiv 2312.17238), section 3.2, speculative loading.
    """

    needs_predictions = True

    def choose(self, predicted_BK: NDArray[np.unsignedinteger] | None) -> Sequence[int]:
        """Predicted experts of all tokens of the step, those named by most tokens first."""
        if predicted_BK is None:
            return ()
        expert, count = np.unique(predicted_BK, return_counts=True)
        return [int(e) for e in expert[np.lexsort((expert, -count))]]


PREFETCHERS = {"none": NoPrefetch, "next_layer_gate": NextLayerGate}
