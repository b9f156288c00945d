"""Points at which tables of an instance are priced, and their prices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.costs import network
from moesim.costs.attention import attention_core
from moesim.costs.operators import Operators, Timed, stacked
from moesim.hardware import Cluster
from moesim.mixers import LatentAttention, Mixer
from moesim.model import BYTES_PER_PARAM, Dense, ModelSpec

Floats = NDArray[np.float64]


def points(first: int, units: int, most: float, ratio: float) -> Floats:
    """Whole numbers from the first to `units` one by one, then each at most `ratio` times the last, to `most`."""
    ones = np.arange(first, max(units, first + 1) + 1, dtype=np.float64)
    if most <= ones[-1]:
        return ones
    steps = int(np.ceil(np.log(most / ones[-1]) / np.log(ratio)))
    return np.unique(np.concatenate([ones, np.ceil(np.geomspace(ones[-1], most, steps + 1))]))


class OneRank:
    """What a rank of an instance computes for its tokens, at grids of them.

    Args:
        is_spread: whether experts lie on all ranks, each of which has its share of its group's tokens.
        shared_cut: over how many ranks the shared experts are cut.
        group_ranks: ranks of a stage, over which the next one's first rank is reached.
    """

    def __init__(
        self, model: ModelSpec, cluster: Cluster, ops: Operators, tp: int, is_spread: bool, group_ranks: int
    ) -> None:
        self._model, self._cluster, self._ops, self._tp = model, cluster, ops, tp
        self._dealt, self._group_ranks = tp if is_spread else 1, group_ranks
        self._value_bytes = BYTES_PER_PARAM[model.dtypes.activation]

    def _matmuls(self, shapes: tuple[tuple[int, int], ...], rows: Floats, dtype: str, launches: float) -> Timed:
        return self._ops.matmuls(shapes, rows, dtype, self._value_bytes) + self._ops.launches(launches)

    def projections(self, mixer: Mixer, grid_N: Floats) -> Timed:
        """Of a mixer, by tokens of a group."""
        launches = 7.0 if isinstance(mixer, LatentAttention) else 4.0
        shapes = mixer.matmuls(self._model.hidden_size, self._tp)
        return self._matmuls(shapes, grid_N, self._model.dtypes.attention, launches)

    def dense(self, ffn: Dense, grid_N: Floats) -> Timed:
        """A dense network, by tokens of a group."""
        return self._matmuls(ffn.matmuls(self._model.hidden_size, self._tp), grid_N, self._model.dtypes.dense, 3.0)

    def router(self, grid_N: Floats) -> Timed:
        """The router, by tokens of a group."""
        shapes = ((self._model.experts.num_experts, self._model.hidden_size),)
        return self._matmuls(shapes, grid_N / self._dealt, self._model.dtypes.dense, 2.0)

    def shared_experts(self, grid_N: Floats) -> Timed:
        """Shared experts, by tokens of a group: whole for its share of them where experts are spread, else cut."""
        shapes = self._model.experts.shared_matmuls(self._model.hidden_size, self._tp // self._dealt)
        return self._matmuls(shapes, grid_N / self._dealt, self._model.dtypes.dense, 3.0)

    def head(self, grid_N: Floats) -> Timed:
        """The output head, by rows."""
        shape = (-(-self._model.vocab_size // self._tp), self._model.hidden_size)
        return self._matmuls((shape,), grid_N, self._model.dtypes.embedding, 2.0)

    def joined(self, grid_N: Floats) -> Timed:
        """What joins hidden state and embedding before a drafting layer, by tokens of a group."""
        h = self._model.hidden_size
        return self._matmuls(((h // self._tp, 2 * h),), grid_N, self._model.dtypes.dense, 3.0)

    def reduced(self, grid_N: Floats, halves: int) -> Timed:
        """One half of an all-reduce in a group, or both, by its tokens."""
        if self._tp == 1:
            return Timed.of(np.zeros_like(grid_N), 0)
        buffer_N = grid_N * self._model.hidden_size * self._value_bytes
        half_s = network.half_all_reduce_s(buffer_N, self._tp, self._cluster, self._ops.bound)
        return self._ops.collective(halves * half_s) + self._ops.collective_start(self._tp, self._cluster, halves)

    def sent(self, grid_N: Floats) -> Timed:
        """From each rank of a stage to its like in the next one, by tokens of a group."""
        span = self._group_ranks + 1
        moved_s = grid_N * self._model.hidden_size * self._value_bytes
        moved_s = moved_s / network.rate_bytes_per_s(span, self._cluster, self._ops.bound)
        return self._ops.collective(moved_s) + self._ops.collective_start(span, self._cluster)

    def decoded(self, mixers: tuple[Mixer, ...], queries: int, requests_A: Floats, context_C: Floats) -> Timed:
        """Attention of decoding requests, [V, A, C], without projections, with so many new tokens of each."""
        requests, each = np.meshgrid(requests_A, context_C, indexing="ij")
        flat, kept = requests.ravel(), (requests * each).ravel()
        works = (flat, queries * flat, kept, queries * kept)
        found = [attention_core(self._ops, self._model, mixer, self._tp, "decode", *works) for mixer in mixers]
        timed = stacked(found)
        return Timed(timed.seconds.reshape(len(mixers), *requests.shape), timed.rests_X)

    def prefilled(self, mixers: tuple[Mixer, ...], chunk_X: Floats, before_Y: Floats) -> Timed:
        """Attention of one chunk of a prompt, [V, X, Y], without projections."""
        chunk, before = np.meshgrid(chunk_X, before_Y, indexing="ij")
        timed = stacked([self._chunk(mixer, chunk.ravel(), before.ravel()) for mixer in mixers])
        return Timed(timed.seconds.reshape(len(mixers), *chunk.shape), timed.rests_X)

    def _chunk(self, mixer: Mixer, chunk: Floats, before: Floats) -> Timed:
        """Kernels are looked up by the prompt that has as many pairs; keys and values of what is before are made again.

        Source: for the latter, vLLM's chunked prefill of latent attention.
        """
        window = np.inf if mixer.window is None else float(mixer.window)
        pairs = _causal(before + chunk, window) - _causal(before, window)
        like = np.minimum(np.sqrt(2 * pairs + 0.25) - 0.5, window)
        like = np.where(before > 0, like, np.minimum(chunk, window))
        kept = np.minimum(before + chunk, window)
        core = attention_core(
            self._ops, self._model, mixer, self._tp, "prefill", np.ones_like(chunk), chunk, kept, pairs, like
        )
        if not isinstance(mixer, LatentAttention):
            return core
        up = (mixer.num_heads // self._tp * (mixer.qk_nope_head_dim + mixer.v_head_dim), mixer.kv_lora_rank)
        again = self._ops.matmuls((up,), before, self._model.dtypes.attention, self._value_bytes)
        return core + again


def _causal(length: Floats, window: float) -> Floats:
    """Pairs of queries and keys of a whole prompt."""
    seen = np.minimum(length, window)
    return np.asarray(length * seen - seen * (seen - 1) / 2)
