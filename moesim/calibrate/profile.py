"""A calibrated profile: constants fitted to runs, where, and how far predictions with them were off; kept as TOML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.calibrate.constants import CONSTANTS, NAMES, Constant, Floats
from moesim.calibrate.folds import LEVEL, HeldOut, fit_runs, hold_out, quantiles, shuffled_folds
from moesim.calibrate.serving import Priced, predict_tpot_s
from moesim.files.runs import groups_of
from moesim.files.tables import raise_all, read_toml

FORMAT = 1


@dataclass(frozen=True)
class CalibratedProfile:
    """Fitted constants and the residuals of predictions made without the runs they were made for.

    Attributes:
        values: name of a constant -> its value.
        sources: name -> "fitted: ..." or "assumed: ..." where no run speaks of it.
        low_ratio, high_ratio: ends of the 90 % interval of measured over predicted.
        kernels: what priced the kernels; predictions must use the same.
        facts: how many runs, which groups, errors.
    """

    values: Mapping[str, float]
    sources: Mapping[str, str]
    low_ratio: float
    high_ratio: float
    kernels: str
    facts: Mapping[str, Any]

    def predict(self, priced: Priced) -> tuple[Floats, Floats, Floats]:
        """Seconds per output token of runs, and the ends of their 90 % intervals, each [N]."""
        predicted_N = predict_tpot_s(priced, np.array([self.values[name] for name in NAMES]))
        return predicted_N, predicted_N * self.low_ratio, predicted_N * self.high_ratio

    def as_json(self) -> dict[str, Any]:
        """The machine-readable shape of `moesim calibrate --json`, without the runs."""
        constants = {
            c.name: {
                "value": self.values[c.name], "low": c.low, "high": c.high, "unit": c.unit,
                "source": self.sources[c.name], "meaning": c.meaning,
            }
            for c in CONSTANTS
        }  # fmt: skip
        residuals = {"level": LEVEL, "low_ratio": self.low_ratio, "high_ratio": self.high_ratio}
        return {"kernels": self.kernels, "constants": constants, "residuals": residuals, "facts": dict(self.facts)}


def calibrate(
    priced: Priced, kernels: str, constants: Sequence[Constant] = CONSTANTS
) -> tuple[CalibratedProfile, HeldOut]:
    """Fit the constants to runs, and judge them by cross-validation.

    Runs are held out by group where there are three groups or more, else by configuration; the residuals of those
    predictions, every fold of equal weight, are the interval of later ones.

    Raises:
        ValueError: fewer than three groups and fewer than three configurations.
    """
    groups = groups_of(priced.runs)
    by_group = len(groups) >= 3
    folds = [run.group for run in priced.runs] if by_group else shuffled_folds([r.configuration for r in priced.runs])
    held = hold_out(priced, folds, constants)
    values = fit_runs(priced, constants)
    errors_N = held.log_errors(priced)
    low, high = quantiles(errors_N, np.array([1.0 / folds.count(fold) for fold in folds]))
    absolute_N = np.abs(np.expm1(-errors_N))
    said = f"fitted: {len(priced.runs)} runs of {', '.join(groups)}"
    sources = {
        c.name: said if _matters(priced, values, i) else "assumed: no run speaks of it" for i, c in enumerate(constants)
    }
    fit_errors_N = np.abs(predict_tpot_s(priced, values) / priced.tpot_s_N - 1)
    facts = {
        "runs": len(priced.runs),
        "groups": groups,
        "held_out_by": "group" if by_group else "configuration",
        "median_abs_error": float(np.median(absolute_N)),
        "p75_abs_error": float(np.percentile(absolute_N, 75)),
        "fit_median_abs_error": float(np.median(fit_errors_N)),
        "at_a_bound": [
            c.name for c, v in zip(constants, values, strict=True) if min(v / c.low, c.high / v) < 1.001
        ],
    }  # fmt: skip
    named = dict(zip(NAMES, map(float, values), strict=True))
    return CalibratedProfile(named, sources, float(np.exp(low)), float(np.exp(high)), kernels, facts), held


def _matters(priced: Priced, values: Floats, index: int) -> bool:
    """Whether any prediction moves with a constant."""
    moved = values.copy()
    moved[index] *= 0.9
    return bool(np.abs(predict_tpot_s(priced, moved) / predict_tpot_s(priced, values) - 1).max() > 1e-6)


def write_profile(profile: CalibratedProfile, path: str | Path) -> None:
    """Write a profile as TOML, under a temporary name first."""
    path = Path(path)
    plain = profile.as_json()
    lines = ["# Constants of the serving model, written by moesim calibrate.", f"format = {FORMAT}"]
    lines += [f"kernels = {json.dumps(profile.kernels)}", "", "[facts]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in plain["facts"].items()]
    lines += ["", "[residuals]  # ends of measured / predicted, of predictions held out"]
    lines += [f"{key} = {value!r}" for key, value in plain["residuals"].items()]
    for name, constant in plain["constants"].items():
        lines += ["", f"[constants.{name}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in constant.items() if value != ""]
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text("\n".join(lines) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error}); give a file in a folder that exists") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_profile(path: str | Path) -> CalibratedProfile:
    """Read a profile.

    Raises:
        ValueError: one message with every mistake.
    """
    plain = read_toml(Path(path))
    constants, residuals = plain.get("constants", {}), plain.get("residuals", {})
    mistakes = [] if plain.get("format") == FORMAT else [f"format must be {FORMAT}, not {plain.get('format')!r}"]
    for c in CONSTANTS:
        value = constants.get(c.name, {}).get("value")
        if not isinstance(value, int | float) or not c.low <= value <= c.high:
            mistakes.append(f"constants.{c.name}.value must lie in {c.low:g} to {c.high:g}, not {value!r}")
        if not isinstance(constants.get(c.name, {}).get("source"), str):
            mistakes.append(f"constants.{c.name}.source is missing; say where the value is from")
    mistakes += [f"constants.{name} is not known; one of {', '.join(NAMES)}" for name in constants if name not in NAMES]
    low, high = residuals.get("low_ratio"), residuals.get("high_ratio")
    if not (isinstance(low, float) and isinstance(high, float) and 0 < low <= 1 <= high):
        mistakes.append(f"residuals: low_ratio and high_ratio must lie around 1, not {low!r} and {high!r}")
    raise_all(str(path), mistakes)
    return CalibratedProfile(
        {name: float(constants[name]["value"]) for name in NAMES},
        {name: constants[name]["source"] for name in NAMES},
        float(low), float(high), str(plain.get("kernels", "roofline")), plain.get("facts", {}),
    )  # fmt: skip
