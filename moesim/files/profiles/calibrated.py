"""Calibrations as TOML files."""

from __future__ import annotations

import json
from pathlib import Path

from moesim.costs.calibration import CONSTANTS, NAMES, Calibration
from moesim.files.tables import raise_all, read_toml

FORMAT = 1


def write_calibration(calibration: Calibration, path: str | Path) -> None:
    """Write a calibration as TOML, under a temporary name first."""
    path = Path(path)
    plain = calibration.as_json()
    lines = ["# Constants of the serving model, written by moesim calibrate.", f"format = {FORMAT}"]
    lines += [f"kernels = {json.dumps(calibration.kernels)}", "", "[facts]"]
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


def load_calibration(path: str | Path) -> Calibration:
    """Read a calibration.

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
    return Calibration(
        {name: float(constants[name]["value"]) for name in NAMES},
        {name: constants[name]["source"] for name in NAMES},
        float(low), float(high), str(plain.get("kernels", "roofline")), plain.get("facts", {}),
    )  # fmt: skip
