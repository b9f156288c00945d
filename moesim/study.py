"""Studies: what a paper says, what moesim makes of it, and whether the two agree.

A study is one file, `studies/NAME.py`: a docstring with the sections below, and a function `claims()` that computes
with moesim's own pieces and returns a list of `Claim`.
"""

from __future__ import annotations

import ast
import operator
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.files.imports import import_routing
from moesim.files.keys import nearest
from moesim.routing.trace import RoutingTrace

VERDICTS = ("agrees", "differs", "untestable")
SECTIONS: Mapping[str, str] = {
    "Question": "question",
    "Setting": "setting",
    "Lever": "lever",
    "Expected before the first run": "expected",
    "Cannot speak about": "silent_on",
}
"""Start of a paragraph of a study's docstring -> what it is called here. All are needed; "Slow" may stand beside."""
SLOW = "Slow"
NOT_AT_HAND = "the paper's value is not at hand"

DATA = Path(__file__).parents[2] / "shared" / "data"
"""Public captures, where they lie beside the project; studies do without where they do not."""

_BOUNDS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
_BOUND = re.compile(rf"(?P<sign><=|>=|<|>) (?P<number>{_NUMBER})|(?P<low>{_NUMBER}) to (?P<high>{_NUMBER})")


@dataclass(frozen=True)
class Claim:
    """One number of a paper and moesim's own.

    Attributes:
        says: what the number is, in words; unique in its study.
        where: the paper's table, figure or section; "recalled" where nobody could look it up.
        paper: a number; for a trend a bound such as "> 1" or "1.06 to 1.09"; None where the value is not at hand.
        ours: moesim's number, None where it has none.
        unit: how a metric's name would end: "s", "bytes_per_s", "tokens_per_s", "ratio", "fraction", "".
        tolerance: of a number, how far ours may be from it; of a bound, by how much it is loosened; both as a share.
        fitted: the constant that this cell was used for, with its value. Such a cell shows nothing, and is untestable.
        because: why it differs, or cannot be told. On a claim that could agree this commits it as differing.

    Raises:
        ValueError: a bound that cannot be read, a number without a tolerance, nothing of ours and no reason.

    >>> Claim("dispatch at EP8", "table 9", paper=116e-6, ours=120e-6, unit="s", tolerance=0.1).verdict
    'agrees'
    >>> Claim("leaders are faster", "figure 7", paper="> 1", ours=0.8, unit="ratio").verdict
    'differs'
    """

    says: str
    where: str
    paper: float | str | None
    ours: float | None
    unit: str = ""
    tolerance: float = 0.0
    fitted: str = ""
    because: str = ""

    def __post_init__(self) -> None:
        said = f"claim {self.says!r}"
        if isinstance(self.paper, str):
            if not _BOUND.fullmatch(self.paper):
                raise ValueError(f"{said}: paper must be a number, '> 1', '<= 2.5' or '1 to 2', not {self.paper!r}")
        elif self.paper is not None and not self.tolerance > 0:
            raise ValueError(f"{said}: a number needs a tolerance above 0, given {self.tolerance}; give 0.1 for 10 %")
        if self.ours is None and not self.because:
            raise ValueError(f"{said}: there is nothing of ours and no reason; say it in because")

    @property
    def is_testable(self) -> bool:
        """Whether there are two numbers to compare, and nothing was fitted to the paper's."""
        return self.paper is not None and self.ours is not None and not self.fitted

    @property
    def verdict(self) -> str:
        """agrees, differs or untestable."""
        if not self.is_testable:
            return "untestable"
        assert self.paper is not None and self.ours is not None
        return "agrees" if _holds(self.paper, self.ours, self.tolerance) else "differs"

    @property
    def committed(self) -> str:
        """The verdict that its author saw and committed."""
        return ("differs" if self.because else "agrees") if self.is_testable else "untestable"

    @property
    def has_changed(self) -> bool:
        """Whether the verdict is another one than was committed."""
        return self.verdict != self.committed

    @property
    def reason(self) -> str:
        """Why it is not plainly right, or "" where it is."""
        if self.has_changed:
            return f"the committed verdict is {self.committed}" + (f": {self.because}" if self.because else "")
        if self.fitted:
            return f"fitted to this cell: {self.fitted}"
        if self.paper is None and not self.because:
            return NOT_AT_HAND
        return self.because

    def as_json(self) -> dict[str, Any]:
        """The machine-readable shape."""
        shape = {key: getattr(self, key) for key in ("says", "where", "paper", "ours", "unit", "tolerance")}
        return {**shape, "fitted": bool(self.fitted), "verdict": self.verdict, "because": self.reason}


def _holds(paper: float | str, ours: float, tolerance: float) -> bool:
    """Whether ours is near a number, or keeps a bound."""
    if not isinstance(paper, str):
        return abs(ours - paper) <= tolerance * abs(paper)
    match = _BOUND.fullmatch(paper)
    assert match is not None
    if match["sign"]:
        bound = float(match["number"])
        slack = tolerance * abs(bound) * (1 if "<" in match["sign"] else -1)
        return _BOUNDS[match["sign"]](ours, bound + slack)
    low, high = float(match["low"]), float(match["high"])
    return low - tolerance * abs(low) <= ours <= high + tolerance * abs(high)


@dataclass(frozen=True)
class Study:
    """The page of one study.

    Attributes:
        title: first line of its docstring: the system and its paper.
        question, setting, lever: what is asked, of which machine and model, and what is turned.
        expected: what was expected before the first run.
        silent_on: what it cannot speak about.
        slow: what takes long in it, "" where nothing does.
    """

    name: str
    title: str
    question: str
    setting: str
    lever: str
    expected: str
    silent_on: str
    slow: str = ""


@dataclass(frozen=True)
class Judged:
    """A study that was run: its claims, and the seconds it took."""

    study: Study
    claims: tuple[Claim, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The machine-readable shape."""
        claims = [claim.as_json() for claim in self.claims]
        return {"name": self.study.name, "lever": self.study.lever, "seconds": self.seconds, "claims": claims}


def _pages() -> dict[str, Traversable]:
    found = {entry.name.removesuffix(".py"): entry for entry in files("moesim.studies").iterdir()}
    return {name: found[name] for name in sorted(found) if found[name].name.endswith(".py") and name != "__init__"}


def study_names() -> list[str]:
    """The studies that come with moesim."""
    return list(_pages())


def load_studies(names: Iterable[str]) -> list[Study]:
    """The pages of studies, without running any of their code.

    Raises:
        ValueError: names every study that there is not, with the nearest, and every section that a page lacks.
    """
    pages, found, mistakes = _pages(), [], []
    for name in dict.fromkeys(names):
        if name not in pages:
            mistakes.append(f"no study is called {name!r}; {nearest(name, pages)}")
            continue
        text = ast.get_docstring(ast.parse(pages[name].read_text("utf-8"))) or ""
        sections = _sections(text)
        missing = [section for section in SECTIONS if not sections.get(section)]
        if missing:
            mistakes.append(f"studies/{name}.py: its docstring has no {', '.join(map(repr, missing))}; add a paragraph")
            continue
        known = {attribute: sections[section] for section, attribute in SECTIONS.items()}
        found.append(Study(name, sections[""], slow=sections.get(SLOW, ""), **known))
    if mistakes:
        raise ValueError("; ".join(mistakes))
    return found


def _sections(docstring: str) -> dict[str, str]:
    """Section -> its text on one line; the title under ""."""
    parts = re.split(rf"^({'|'.join((*SECTIONS, SLOW))}):", docstring, flags=re.MULTILINE)
    return {head: " ".join(text.split()) for head, text in zip(("", *parts[1::2]), parts[::2], strict=True)}


def run_study(study: Study) -> Judged:
    """Compute every claim of a study.

    Raises:
        RuntimeError: its code raised a ValueError: that is no fault of the input.
        ValueError: it claims nothing, or the same twice.
    """
    began = time.perf_counter()
    try:
        claims: Sequence[Claim] = import_module(f"moesim.studies.{study.name}").claims()
    except ValueError as error:
        raise RuntimeError(f"study {study.name!r} broke: {error}") from error
    twice = [says for says, times in Counter(claim.says for claim in claims).items() if times > 1]
    if twice or not claims:
        wrong = f"says {', '.join(map(repr, twice))} twice" if twice else "claims nothing"
        raise ValueError(f"studies/{study.name}.py {wrong}; a study has claims, each with words of its own")
    return Judged(study, tuple(claims), time.perf_counter() - began)


def studies_json(judged: Sequence[Judged]) -> dict[str, Any]:
    """The machine-readable shape of several, with the number of each verdict and of those that have changed."""
    claims = [claim for found in judged for claim in found.claims]
    totals = {verdict: sum(claim.verdict == verdict for claim in claims) for verdict in VERDICTS}
    changed = sum(claim.has_changed for claim in claims)
    return {
        "studies": [found.as_json() for found in judged],
        "totals": {"claims": len(claims), **totals, "changed": changed},
    }


ESFT = tuple(f"routing_esft_deepseek_v2_lite/{task}.npz" for task in ("intent", "summary", "translation"))
"""Public captures of DeepSeek-V2-Lite's routing, of three tasks; and what a claim says where a capture is absent."""
ABSENT = "the public capture is not beside the project"


def split(trace: RoutingTrace, share: float = 0.5) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of a share of a trace's requests, drawn at random and always the same, and rows of the others."""
    requests = np.unique(trace.request_T)
    drawn = np.random.default_rng(0).permutation(requests)[: int(len(requests) * share)]
    is_drawn_T = np.isin(trace.request_T, drawn)
    return np.flatnonzero(is_drawn_T), np.flatnonzero(~is_drawn_T)


def bisected(is_low: Callable[[float], bool], low: float, high: float, steps: int) -> tuple[float, float]:
    """Halve low..high so many times, keeping what is_low at its lower end.

    >>> bisected(lambda x: x * x < 2, 1.0, 2.0, 3)
    (1.375, 1.5)
    """
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if is_low(middle) else (low, middle)
    return low, high


def public_trace(*paths: str) -> RoutingTrace | None:
    """A public capture of single tokens in `DATA`, files of one format; None where it is not there."""
    if not all((DATA / path).is_file() for path in paths):
        return None
    trace = import_routing([DATA / path for path in paths])
    assert isinstance(trace, RoutingTrace)
    return trace
