"""Replay: which rows of a trace stand for the tokens of simulated requests.

Request i replays request i mod N of the trace, in an order drawn once. A prompt longer than the trace's starts it
again, and so does a longer answer; `Replay.repeats` says whether that happens. Where several requests replay the same
one, each further one begins elsewhere in it, so that they are not all at the same token at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.routing.trace import RoutingTrace

Rows = NDArray[np.int64]


GOLDEN = (5**0.5 - 1) / 2


def begins(turn: ArrayLike, length: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """Where in a request of `length` tokens its first, second, ... replay begins: far from all earlier ones.

    >>> begins([0, 1, 2], 100).tolist()
    [0, 61, 23]
    """
    return np.asarray(np.asarray(turn) * GOLDEN % 1.0 * length).astype(np.int64)


class Replay:
    """Rows of one trace by request.

    rng: draws which request of the trace comes first, second, ...
    keeps_history: whether the second half of them is not replayed, but known beforehand: rows `history`.
    """

    def __init__(self, trace: RoutingTrace, rng: np.random.Generator, keeps_history: bool = False) -> None:
        first = np.flatnonzero(np.diff(trace.request_T, prepend=trace.request_T[0] - 1))
        last = np.append(first[1:], trace.num_tokens)
        self.prompts: list[Rows] = []
        self.answers: list[Rows] = []
        spans = np.stack([first, last], axis=1)[rng.permutation(len(first))]
        num_replayed = -(-len(spans) // 2) if keeps_history else len(spans)
        history = [np.arange(*span) for span in spans[num_replayed:]]
        self.history = np.concatenate(history) if history else np.arange(0)
        for start, end in spans[:num_replayed]:
            rows = np.arange(start, end)
            is_decode = trace.is_decode_T[start:end]
            prompt, answer = rows[~is_decode], rows[is_decode]
            self.prompts.append(prompt if len(prompt) else answer)
            self.answers.append(answer if len(answer) else prompt)

    def prompt_lengths(self, num_requests: int, prompt_tokens: int | None) -> NDArray[np.int64]:
        """Prompt length of each request, in tokens, int64 [num_requests]."""
        own = np.array([len(rows) for rows in self.prompts])
        lengths = own[np.arange(num_requests) % len(own)]
        return lengths if prompt_tokens is None else np.full(num_requests, prompt_tokens)

    def prompt_rows(self, request: int, num_tokens: int) -> Rows:
        """Rows of the prompt tokens of one request."""
        rows = self.prompts[request % len(self.prompts)]
        place = begins(request // len(self.prompts), len(rows)) + np.arange(num_tokens)
        return np.asarray(rows[place % len(rows)])

    def decode_rows(self, num_requests: int, num_steps: int) -> NDArray[np.int64]:
        """Rows of the generated tokens, int64 [num_steps, num_requests]."""
        step, found_SQ = np.arange(num_steps)[:, None], np.empty((num_steps, num_requests), np.int64)
        for n, rows in enumerate(self.answers[:num_requests]):
            mine = np.arange(n, num_requests, len(self.answers))
            found_SQ[:, mine] = rows[(begins(mine // len(self.answers), len(rows)) + step) % len(rows)]
        return found_SQ

    def repeats(self, num_requests: int, prompt_tokens: int | None, output_tokens: int) -> list[str]:
        """What the trace was too short for, one sentence each."""
        found = []
        if num_requests > len(self.prompts):
            found.append(f"{num_requests} requests replay the {len(self.prompts)} requests of the trace more than once")
        shortest = min(len(rows) for rows in self.prompts)
        if prompt_tokens is not None and prompt_tokens > shortest:
            found.append(f"prompts of {prompt_tokens} tokens repeat the routing of traced ones (shortest: {shortest})")
        shortest = min(len(rows) for rows in self.answers)
        if output_tokens > shortest + 1:
            found.append(f"{output_tokens} output tokens repeat the routing of traced answers (shortest: {shortest})")
        return found
