"""Cases of predicted against measured seconds, and what they add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """One measurement and its prediction.

    Attributes:
        case: what was measured, in words; unique in its validation.
        measured, predicted: in `unit`; None where the measurement is not at hand, and nothing is judged.
        low, high: ends of the 90 % interval of the prediction.
        fitted: whether the prediction took anything from this very case's measurement; such cases count in no error.
        group: what the case is summed up under, such as a device and an operator; "" for none.
        baseline: what a plain roofline gives; None where it was not asked.
    """

    case: str
    measured: float | None
    predicted: float
    low: float
    high: float
    fitted: bool = False
    group: str = ""
    baseline: float | None = None
    unit: str = "s"

    @property
    def error(self) -> float | None:
        """Signed relative error of the prediction."""
        return None if self.measured is None else self.predicted / self.measured - 1

    @property
    def is_covered(self) -> bool:
        """Whether the measurement is known, and lies in the interval."""
        return self.measured is not None and self.low <= self.measured <= self.high


@dataclass(frozen=True)
class Validation:
    """The cases of one validation, and further facts of it.

    facts: name -> number or words, such as the run-to-run spread of the machine.
    aims: figure of `summary` -> the least and the most that each group should have.
    """

    name: str
    cases: tuple[Case, ...]
    facts: dict[str, Any]
    aims: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def groups(self) -> dict[str, list[Case]]:
        """Cases of each group, in order of appearance."""
        found: dict[str, list[Case]] = {}
        for case in self.cases:
            found.setdefault(case.group, []).append(case)
        return found

    def missed(self, found: Mapping[str, float]) -> list[str]:
        """Figures of a group's summary that are there and miss their aims."""
        return [name for name, (least, most) in self.aims.items() if name in found and not least <= found[name] <= most]

    def as_json(self) -> dict[str, Any]:
        """The machine-readable shape of `moesim validate NAME --json`."""
        table = [
            {
                key: getattr(case, key)
                for key in ("case", "measured", "predicted", "low", "high", "fitted", "group", "baseline", "unit")
            }
            for case in self.cases
        ]
        groups = {}
        for group, cases in self.groups().items():
            found = summary(cases)
            groups[group] = {**found, "aims_missed": self.missed(found)}
        said = {"facts": self.facts, "aims": {name: list(aim) for name, aim in self.aims.items()}, "groups": groups}
        return {"name": self.name, **summary(self.cases), **said, "table": table}


def summary(cases: Sequence[Case]) -> dict[str, float | int]:
    """Rows, errors and coverage of the cases that were measured and are not fitted.

    `median_abs_error`, `p75_abs_error` and `p90_abs_error` are of |predicted / measured - 1|; `bias` is the median of
    the signed error; `coverage_90` is the share of measurements inside their 90 % intervals. Those with `baseline_` are
    of the roofline beside it, over the cases that have one.
    """
    judged = [(case, case.measured) for case in cases if not case.fitted and case.measured is not None]
    found: dict[str, float | int] = {"rows": len(judged)}
    if not judged:
        return found
    errors = np.array([case.predicted / measured - 1 for case, measured in judged])
    for name, share in (("median", 50), ("p75", 75), ("p90", 90)):
        found[f"{name}_abs_error"] = float(np.percentile(np.abs(errors), share))
    found["bias"] = float(np.median(errors))
    found["coverage_90"] = float(np.mean([case.is_covered for case, _ in judged]))
    plain = [abs(case.baseline / measured - 1) for case, measured in judged if case.baseline is not None]
    if plain:
        for name, share in (("median", 50), ("p90", 90)):
            found[f"baseline_{name}_abs_error"] = float(np.percentile(plain, share))
    return found
