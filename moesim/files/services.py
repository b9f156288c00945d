"""Service files: a scenario file with a table [requests] instead of [workload], read as strictly.

Top level: name, model, hardware, trace, profile, calibration, seed. Tables: [requests], [engine], [decode_engine] (what
differs from [engine] in instances that decode alone), [fleet], [slo], [dtypes], and further set-ups under [beside].
Engines may take their acceptance_length from a file of measured ones: acceptance_file, with acceptance_mode and
acceptance_model where it has several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from moesim.costs.measured import MeasuredTables
from moesim.files.acceptance import read_acceptance
from moesim.files.keys import nearest
from moesim.files.requests.build import build_requests
from moesim.files.requests.spec import RequestsSpec
from moesim.files.scenarios import PARTS, beside_file, load_parts, merged, read_setups
from moesim.files.structure import structure
from moesim.fleet import Fleet, Slo
from moesim.requests import Requests
from moesim.service import EngineConfig, Service

_TABLES: dict[str, type] = {"engine": EngineConfig, "fleet": Fleet, "slo": Slo}
_ACCEPTANCE = ("acceptance_file", "acceptance_mode", "acceptance_model")
_KNOWN = (*PARTS, *_TABLES, "decode_engine", "requests", "beside")


def is_service(values: Mapping[str, Any]) -> bool:
    """Whether the values of a scenario file describe a service, rather than a closed batch.

    Raises:
        ValueError: they describe both.
    """
    if "requests" in values and "workload" in values:
        raise ValueError(
            "requests, workload: a file has one of the two; [requests] is traffic that a service gets over time, "
            "[workload] a batch that starts together"
        )
    return "requests" in values


def load_services(path: str | Path, changes: Sequence[str] = ()) -> list[Service]:
    """Read a service file: the base first, then each set-up of `[beside]`.

    Args:
        changes: "path.to.key=value" each, as in `moesim.files.scenarios.load_scenarios`.

    Raises:
        ValueError: one message with every mistake in the file.
    """
    return read_setups(path, changes, _build)


def _build(
    values: dict[str, Any], prefix: str, folder: Path, loaded: dict[tuple[str, str], Any], mistakes: list[str]
) -> Service | None:
    """One service; None where anything is wrong with it (then `mistakes` says what)."""
    before = len(mistakes)
    try:
        is_service(values)
    except ValueError as error:
        mistakes.append(f"{prefix}{error}")
        return None
    mistakes += [f"{prefix}{key}: unknown key; {nearest(key, _KNOWN)}" for key in values if key not in _KNOWN]
    parts = load_parts(values, prefix, folder, loaded, mistakes)
    tables = values | _accepting(values, prefix, folder, mistakes)
    for key, cls in _TABLES.items():
        parts[key] = structure(cls, tables.get(key, {}), f"{prefix}{key}", mistakes)
    if "decode_engine" in values:
        parts["decode_engine"] = _decode_engine(tables, prefix, mistakes)
    parts["requests"] = _requests(values, prefix, folder, loaded, mistakes)
    if len(mistakes) > before:
        return None
    service = Service(
        name=str(values["name"]),
        model=parts["model"],
        cluster=parts["hardware"],
        trace=parts["trace"],
        requests=parts["requests"],
        engine=parts["engine"],
        decode_engine=parts.get("decode_engine"),
        fleet=parts["fleet"],
        slo=parts["slo"],
        tables=parts.get("profile", MeasuredTables()),
        calibration=parts.get("calibration"),
        seed=values.get("seed", 0),
        plain=values,
    )
    found = service.mistakes()
    mistakes += [f"{prefix}{mistake}" for mistake in found]
    return None if found else service


def _accepting(values: dict[str, Any], prefix: str, folder: Path, mistakes: list[str]) -> dict[str, dict[str, Any]]:
    """Tables of engines, with the acceptance length that a file gives them in place of its name."""
    found: dict[str, dict[str, Any]] = {}
    base = values["engine"] if isinstance(values.get("engine"), dict) else {}
    for key in ("engine", "decode_engine"):
        table = values.get(key, {})
        if not isinstance(table, dict) or not any(name in table for name in _ACCEPTANCE):
            continue
        where, given = f"{prefix}{key}", {name: table.get(name) for name in _ACCEPTANCE}
        found[key] = {name: value for name, value in table.items() if name not in _ACCEPTANCE}
        drafts = table.get("num_speculative_tokens", base.get("num_speculative_tokens", 0))
        wrong = [name for name, value in given.items() if value is not None and not isinstance(value, str)]
        mistakes += [f"{where}.{name}: must be a string, not {given[name]!r}" for name in wrong]
        if given["acceptance_file"] is None:
            mistakes.append(f"{where}.acceptance_file: is missing; acceptance_mode and acceptance_model choose in it")
        elif "acceptance_length" in table:
            mistakes.append(f"{where}.acceptance_length: acceptance_file gives it; leave one of the two out")
        elif isinstance(drafts, bool) or not isinstance(drafts, int) or drafts < 1:
            mistakes.append(f"{where}.acceptance_file: needs num_speculative_tokens of at least 1, given {drafts!r}")
        elif not wrong:
            try:
                curves = read_acceptance(beside_file(str(given["acceptance_file"]), folder))
                length = curves.find(drafts, given["acceptance_mode"], given["acceptance_model"])
                found[key]["acceptance_length"] = length
            except ValueError as error:
                mistakes.append(f"{where}.acceptance_file: " + str(error).replace("\n", "\n    "))
    return found


def _decode_engine(values: dict[str, Any], prefix: str, mistakes: list[str]) -> EngineConfig | None:
    """[engine] with what [decode_engine] changes of it."""
    changed, base = values["decode_engine"], values.get("engine", {})
    if structure(EngineConfig, changed, f"{prefix}decode_engine", mistakes) is None or not isinstance(base, dict):
        return None
    return structure(EngineConfig, merged(base, changed), f"{prefix}engine", [])


def _requests(
    values: dict[str, Any], prefix: str, folder: Path, loaded: dict[tuple[str, str], Any], mistakes: list[str]
) -> Requests | None:
    """The traffic; set-ups with the same table and seed have the same."""
    if "requests" not in values:
        mistakes.append(f"{prefix}requests: is missing; give a table [requests] with arrivals")
        return None
    spec = structure(RequestsSpec, values["requests"], f"{prefix}requests", mistakes)
    if spec is None:
        return None
    found = spec.mistakes()
    mistakes += [f"{prefix}requests.{mistake}" for mistake in found]
    seed = values.get("seed", 0)
    if found or isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        return None
    remembered = ("requests", f"{seed} {spec}")
    if remembered not in loaded:
        rng = np.random.default_rng([seed, crc32(b"requests")])
        path = beside_file(spec.file, folder) if spec.file is not None else None
        try:
            loaded[remembered] = build_requests(spec, path, rng)
        except ValueError as error:
            key = "requests.file" if spec.file is not None else "requests"
            loaded[remembered] = ValueError(f"{prefix}{key}: " + str(error).replace("\n", "\n    "))
    made: Requests | ValueError = loaded[remembered]
    if isinstance(made, ValueError):
        mistakes.append(str(made))
        return None
    return made
