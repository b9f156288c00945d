"""Decode rows in blocks: where all traced answers are equally long, neighbouring requests decode neighbouring rows.

Block p has token p of the answer of each of M traced requests, in the order in which they are replayed; T = P M rows.
Request i replays request i mod M from a token on that it shares with all of its *turn* i // M, so at any step a turn is
one block, and the requests of a rank are a few windows, each inside of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.routing.replay import begins

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Windows:
    """Requests of one iteration, W runs of neighbours: each of one group, in one turn.

    group_W: data-parallel group; block_W: block that it is in at step 0; first_W: traced request of the first one;
    requests_W: how many.
    """

    group_W: NDArray[np.int64]
    block_W: NDArray[np.int64]
    first_W: NDArray[np.int64]
    requests_W: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Blocks:
    """rows_PM: int64 [P, M], row of the trace of token p of the answer of traced request m."""

    rows_PM: Rows

    @property
    def num_traced(self) -> int:
        """M."""
        return int(self.rows_PM.shape[1])

    def turns(self, num_requests: int) -> NDArray[np.int64]:
        """Block that each turn is at before the first step."""
        return begins(np.arange(-(-num_requests // self.num_traced)), len(self.rows_PM))

    def rows(self, turns: NDArray[np.int64], num_requests: int, step: int) -> Rows:
        """Rows of the requests' tokens at a step: those of `Replay.decode_rows`."""
        return self.rows_PM[(turns + step) % len(self.rows_PM)].ravel()[:num_requests]

    def windows(self, request_Q: NDArray[np.int64], group_Q: NDArray[np.int64]) -> Windows:
        """Windows of requests in increasing order."""
        turn_Q, traced_Q = np.divmod(request_Q, self.num_traced)
        starts_Q = (np.diff(request_Q) != 1) | (np.diff(group_Q) != 0) | (np.diff(turn_Q) != 0)
        starts = np.flatnonzero(np.append(True, starts_Q))
        requests_W = np.diff(np.append(starts, len(request_Q)))
        return Windows(group_Q[starts], begins(turn_Q[starts], len(self.rows_PM)), traced_Q[starts], requests_W)

    def places(self, windows: Windows, step: int) -> NDArray[np.int64]:
        """Where each window begins at a step, in rows of all blocks."""
        return (windows.block_W + step) % len(self.rows_PM) * self.num_traced + windows.first_W

    def edges(self, windows: Windows) -> NDArray[np.int64]:
        """Places where the windows may begin or end at any step."""
        edges = np.union1d(windows.first_W, windows.first_W + windows.requests_W)
        return np.unique(np.arange(len(self.rows_PM))[:, None] * self.num_traced + edges)


def trimmed(
    answers: Sequence[Rows], num_requests: int, num_steps: int, pool_tokens: int, multiple: int
) -> list[Rows]:  # fmt: skip
    """Part of the answers, made equally long: at most `pool_tokens` tokens.

    As many traced requests as the run has, if there are as many (a multiple of `multiple`, if more than that), and as
    many first tokens of each as fit and the run decodes; an answer that is shorter starts again.
    """
    num_traced = min(len(answers), num_requests, pool_tokens)
    if num_traced > multiple:
        num_traced -= num_traced % multiple
    taken = answers[:num_traced]
    length = min(max(len(rows) for rows in taken), num_steps, pool_tokens // num_traced)
    return [rows[np.arange(length) % len(rows)] for rows in taken]
