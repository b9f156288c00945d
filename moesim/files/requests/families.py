"""Which columns each published kind of traffic has, and what they mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One kind of file with a row for each request.

    Attributes:
        name: who writes it.
        prompt, output: columns of tokens.
        arrival: column of times, "" where there are none; unit_s: seconds of its unit; is_clock: whether it counts from
            somewhere else than the start, so that the first request is at 0; is_text: whether it holds dates.
        blocks: column of ids of prefix blocks, of block_tokens tokens each.
        optional: columns that may be there and are read.
        ignored: columns that are known and say nothing of the traffic; None for all others.
    """

    name: str
    prompt: str
    output: str
    arrival: str = ""
    unit_s: float = 1.0
    is_clock: bool = False
    is_text: bool = False
    blocks: str = ""
    block_tokens: int = 0
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] | None = None

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that must be there."""
        return tuple(name for name in (self.arrival, self.prompt, self.output, self.blocks) if name)


OWN = Family(
    "moesim", "prompt_tokens", "output_tokens", "arrival_s", ignored=(),
    optional=("priority", "topic", "prefix_blocks", "block_tokens"),
)  # fmt: skip
FAMILIES = (
    OWN,
    Family("Azure 2023", "ContextTokens", "GeneratedTokens", "TIMESTAMP", is_clock=True, is_text=True),
    Family(
        "Mooncake", "input_length", "output_length", "timestamp", 1e-3, blocks="hash_ids", block_tokens=512,
    ),
    Family("LLMServingSim", "input_toks", "output_toks", "arrival_time_ns", 1e-9),
    Family("LLMServingSim's vLLM runs", "input_toks", "output_toks", "arrival_time", is_clock=True),
    Family("Vidur", "num_prefill_tokens", "num_decode_tokens"),
    Family("lengths", "input_tokens", "output_tokens", ignored=()),
)  # fmt: skip
"""In the order in which they are tried."""


def family_of(columns: Iterable[str]) -> Family | None:
    """The kind of file that has these columns."""
    there = set(columns)
    return next((family for family in FAMILIES if there.issuperset(family.needed)), None)
