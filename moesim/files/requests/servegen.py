"""ServeGen client profiles: requests sampled from what was fitted to each client of a real service.

Two files: NAME_rates.parquet has for each client and window of 600 s the rate, and the family and shape of the gaps;
NAME_datasets.jsonl (or .jsonl.gz) has for each client, in longer windows, the chances of prompt and answer lengths.
Answers of reasoning models have their reasoning in output_tokens; reason_ratio splits it and is not used.

Source: arXiv 2505.09999 and the code beside it. As there, the gaps of a client's window are drawn from its gamma or
Weibull law and scaled so that they fill the window, and the lengths from the window's probability mass functions.
Unlike there: the number in a window is rate x 600 s rounded up or down by chance (there always up, and the last falls
out), and the two lengths of a request are drawn apart (there one random number gives both, so that long prompts always
have long answers).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moesim.files.requests.columns import Columns
from moesim.files.requests.raw import PARQUET, read_bytes
from moesim.files.tables import raise_all
from moesim.requests import Requests

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
COLUMNS = ("client", "t_s", "rate", "dist", "p1")
WINDOW_S = 600.0
_ENDING = "_rates.parquet"


@dataclass(frozen=True)
class Lengths:
    """Lengths and the accumulated chances of them."""

    tokens: Ints
    chance: Floats

    def draw(self, rng: np.random.Generator, num: int) -> Ints:
        """Independent draws."""
        place = np.searchsorted(self.chance, rng.random(num) * self.chance[-1], side="right")
        return np.asarray(self.tokens[np.minimum(place, len(self.tokens) - 1)])


@dataclass(frozen=True, eq=False)
class Profiles:
    """Windows of all clients, [W] by (time, client), and lengths by client: (start of the window, prompt, answer)."""

    name: str
    client_W: Ints
    start_s_W: Floats
    rate_per_s_W: Floats
    is_weibull_W: NDArray[np.bool_]
    shape_W: Floats
    lengths: dict[int, list[tuple[float, Lengths, Lengths]]]

    def sample(
        self,
        rng: np.random.Generator,
        *,
        start_s: float = 0.0,
        duration_s: float | None = None,
        rate_scale: float = 1.0,
    ) -> Requests:
        """Requests from `start_s` of the profiles on, for `duration_s` (None: to their end); topic is the client.

        rate_scale: factor on all rates. Windows that the span cuts are drawn whole and cut.
        """
        end_s = np.inf if duration_s is None else start_s + duration_s
        used_W = np.flatnonzero(
            (self.start_s_W + WINDOW_S > start_s) & (self.start_s_W < end_s) & (self.rate_per_s_W > 0)
        )
        expected_W = self.rate_per_s_W[used_W] * rate_scale * WINDOW_S
        num_W = np.floor(expected_W + rng.random(len(used_W))).astype(np.int64)
        used_W, num_W = used_W[num_W > 0], num_W[num_W > 0]
        arrival_s_Q = np.repeat(self.start_s_W[used_W], num_W) + self._within(rng, used_W, num_W)
        prompt_Q, output_Q = np.empty(len(arrival_s_Q), np.int64), np.empty(len(arrival_s_Q), np.int64)
        first = 0
        for window, num in zip(used_W.tolist(), num_W.tolist(), strict=True):
            prompts, outputs = self._lengths(int(self.client_W[window]), float(self.start_s_W[window]))
            prompt_Q[first : first + num] = prompts.draw(rng, num)
            output_Q[first : first + num] = outputs.draw(rng, num)
            first += num
        requests = Requests.of(arrival_s_Q - start_s, prompt_Q, output_Q, f"{self.name} (ServeGen)")
        requests = replace(requests, topic_Q=np.repeat(self.client_W[used_W], num_W))
        inside = np.flatnonzero((arrival_s_Q >= start_s) & (arrival_s_Q < end_s))
        return requests.take(inside[np.argsort(arrival_s_Q[inside], kind="stable")])

    def _within(self, rng: np.random.Generator, used_W: Ints, num_W: Ints) -> Floats:
        """Seconds into the window of each request: num + 1 gaps of its law, scaled to fill it."""
        gaps_W = num_W + 1
        shape_G, is_weibull_G = np.repeat(self.shape_W[used_W], gaps_W), np.repeat(self.is_weibull_W[used_W], gaps_W)
        gap_G = np.empty(len(shape_G))
        gap_G[is_weibull_G] = rng.weibull(shape_G[is_weibull_G])
        gap_G[~is_weibull_G] = rng.standard_gamma(shape_G[~is_weibull_G])
        first_W = np.concatenate([[0], np.cumsum(gaps_W)[:-1]])
        total_W = np.add.reduceat(gap_G, first_W) if len(first_W) else np.zeros(0)
        share_G = gap_G / np.repeat(np.where(total_W > 0, total_W, 1.0), gaps_W)
        end_G = np.cumsum(share_G)
        end_G -= np.repeat(end_G[first_W] - share_G[first_W], gaps_W)
        is_last_G = np.zeros(len(gap_G), bool)
        is_last_G[first_W + num_W] = True
        return np.asarray(np.clip(end_G[~is_last_G], 0, np.nextafter(1.0, 0)) * WINDOW_S)

    def _lengths(self, client: int, time_s: float) -> tuple[Lengths, Lengths]:
        """Of the last window with lengths that had begun; of the first, before it."""
        windows = self.lengths[client]
        last = max((n for n, (start_s, *_) in enumerate(windows) if start_s <= time_s), default=0)
        return windows[last][1], windows[last][2]


def is_profiles(path: Path) -> bool:
    """Whether the file is the rates of client profiles."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if file.read(4) != PARQUET:
            return False
    try:
        return set(COLUMNS) <= set(pq.read_schema(path).names)
    except (OSError, pa.ArrowException):
        return False


def read_profiles(path: Path) -> Profiles:
    """The profiles whose rates are in `path` and whose lengths are beside it.

    Raises:
        ValueError: a file is missing or breaks rules; all mistakes in one message.
    """
    table = pq.read_table(path, columns=list(COLUMNS))
    mistakes: list[str] = []
    columns = Columns(table, mistakes)
    client_W, start_s_W, kind_W = columns.counts("client", 0), columns.numbers("t_s"), table["dist"].to_numpy()
    rate_W, shape_W = columns.numbers("rate"), columns.numbers("p1")
    is_busy_W = rate_W > 0
    columns.refuse("rate", rate_W < 0, "must not be negative")
    is_known_W = np.isin(kind_W.astype(str), ("Gamma", "Weibull"))
    columns.refuse("dist", is_busy_W & ~is_known_W, "must be Gamma or Weibull where rate is above 0")
    columns.refuse("p1", is_busy_W & (shape_W <= 0), "must be above 0, as a shape, where rate is")
    raise_all(str(path), mistakes)
    lengths_path, lengths = _read_lengths(path)
    lacking = sorted(set(client_W[is_busy_W].tolist()) - {key for key, found in lengths.items() if found})
    if lacking:
        said = f"clients {lacking[:5]} have rates, but no lengths in {lengths_path.name}; give both, or leave them out"
        raise_all(str(path), [said])
    order = np.lexsort((client_W, start_s_W))
    shape_W = np.where(shape_W > 0, shape_W, 1.0)
    return Profiles(
        path.name, client_W[order], start_s_W[order], rate_W[order], (kind_W == "Weibull")[order], shape_W[order],
        lengths,
    )  # fmt: skip


def _read_lengths(path: Path) -> tuple[Path, dict[int, list[tuple[float, Lengths, Lengths]]]]:
    stem = path.name.removesuffix(_ENDING)
    options = [path.with_name(f"{stem}_datasets.jsonl{end}") for end in ("", ".gz")]
    beside = next((option for option in options if option.is_file()), None)
    if not path.name.endswith(_ENDING) or beside is None:
        raise ValueError(f"{path}: its lengths must lie beside it as {options[0].name} or {options[1].name}")
    found: dict[int, list[tuple[float, Lengths, Lengths]]] = {}
    for number, line in enumerate(read_bytes(beside).splitlines(), 1):
        try:
            entry = json.loads(line)
            parts = [
                (float(start), _mass(window["input_tokens"]), _mass(window["output_tokens"]))
                for start, window in entry["windows"].items()
            ]
            full = [(start, a, b) for start, a, b in parts if a is not None and b is not None]
            found[int(entry["client"])] = sorted(full, key=lambda part: part[0])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{beside}: row {number}: must be {{"client": 0, "windows": {{"0": {{"input_tokens": '
                f'"{{45: 0.5, ...}}", "output_tokens": ...}}}}}} ({error!r})'
            ) from error
    return beside, found


def _mass(text: str) -> Lengths | None:
    """A probability mass function from text such as "{45: 0.25, 46: 0.75}"; None where it is empty."""
    if not text.strip(" {}"):
        return None
    pairs = np.array(text.strip(" {}").replace(":", ",").split(","), np.float64).reshape(-1, 2)
    tokens, chance = pairs[:, 0].astype(np.int64), pairs[:, 1]
    if not (tokens >= 1).all() or not (chance >= 0).all() or chance.sum() <= 0:
        raise ValueError("lengths must be at least 1, and chances 0 or more")
    return Lengths(tokens, np.cumsum(chance))
