"""Scenario files: one TOML with a base set-up and others beside it, read strictly.

Every mistake of a file is found before anything is reported: unknown keys, wrong types, names that do not exist, and
rules that the parts break together.
"""

from __future__ import annotations

import copy
import dataclasses
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, TypeVar

from moesim.costs.measured import MeasuredTables
from moesim.faults import Faults
from moesim.files.counts import is_count_file, read_counts
from moesim.files.hardware import load_cluster
from moesim.files.keys import nearest
from moesim.files.models import load_model
from moesim.files.placements import read_placement
from moesim.files.profiles.calibrated import load_calibration
from moesim.files.profiles.tables import load_profile
from moesim.files.structure import structure
from moesim.files.tables import raise_all, read_toml
from moesim.files.traces import read_trace
from moesim.layout import AttentionGrid, ExpertGrid, Layout
from moesim.model import BYTES_PER_PARAM, Dtypes, ModelSpec
from moesim.policies import EXPERT_DTYPES, SYSTEMS, Policies
from moesim.routing.synthetic import even_trace, sticky_trace, zipf_trace
from moesim.routing.trace import RoutingTrace
from moesim.scenario import Scenario
from moesim.workload import Workload

B = TypeVar("B", covariant=True)
PARTS = ("name", "model", "hardware", "profile", "calibration", "trace", "seed", "dtypes")
"""Keys that every kind of set-up has, see `load_parts`."""
_TABLES: dict[str, type] = {"layout": Layout, "workload": Workload, "policies": Policies, "faults": Faults}


def trace_names() -> tuple[str, ...]:
    """Names of the traces that come with moesim."""
    files = [item.name for item in resources.files("moesim.traces").iterdir()]
    return tuple(sorted(name.removesuffix(".parquet") for name in files if name.endswith(".parquet")))


def load_trace(name_or_path: str, folder: Path | None = None) -> RoutingTrace:
    """A packaged trace by name, or a trace file (looked for in `folder` first, where one is given).

    A count trace becomes routing of origin "counts" (`CountTrace.to_routing` with its defaults).

    Raises:
        ValueError: neither exists, or the file has mistakes: all of them in one message.
    """
    if name_or_path in trace_names():
        with resources.as_file(resources.files("moesim.traces") / f"{name_or_path}.parquet") as path:
            return read_trace(path)
    path = beside_file(name_or_path, folder)
    if not path.exists() and path.suffix not in (".parquet", ".arrow"):
        known = nearest(name_or_path, trace_names())
        raise ValueError(f"no trace {name_or_path!r}; give a .parquet file, or a packaged one; {known}")
    return read_counts(path).to_routing() if is_count_file(path) else read_trace(path)


def load_scenarios(path: str | Path, changes: Sequence[str] = ()) -> list[Scenario]:
    """Read a scenario file: the base first, then each set-up of `[beside]`.

    Args:
        changes: "path.to.key=value" each, TOML values, applied to the base before the others are derived from it.

    Raises:
        ValueError: one message with every mistake in the file.
    """
    return read_setups(path, changes, _build)


class Build(Protocol[B]):
    """Makes one set-up of its values; None where anything is wrong with it (then `mistakes` says what).

    prefix: of the keys in mistakes; loaded: what other set-ups of the file have loaded, to be added to.
    """

    def __call__(
        self, values: dict[str, Any], prefix: str, folder: Path, loaded: dict[tuple[str, str], Any], mistakes: list[str]
    ) -> B | None:
        """One set-up."""


def read_setups(path: str | Path, changes: Sequence[str], build: Build[B]) -> list[B]:
    """The base of a file and each set-up of its `[beside]`, all made by `build`.

    Raises:
        ValueError: one message with every mistake in the file.
    """
    path = Path(path)
    mistakes: list[str] = []
    values = changed_toml(path, changes, mistakes)
    beside = values.pop("beside", {})
    values.setdefault("name", path.stem)
    variants: list[tuple[str, dict[str, Any]]] = [("", values)]
    if not isinstance(beside, dict):
        mistakes.append(f"beside: must hold tables, one for each further set-up, not {beside!r}")
        beside = {}
    for name, override in beside.items():
        if not isinstance(override, dict):
            mistakes.append(f"beside.{name}: must be a table, not {override!r}")
            continue
        variants.append((f"beside.{name}.", merged(values, {"name": name, **override})))
    loaded: dict[tuple[str, str], Any] = {}
    setups = []
    for prefix, variant in variants:
        found: list[str] = []
        setups.append(build(variant, prefix, path.parent, loaded, found))
        # What a set-up inherited from the base has been told of the base.
        mistakes += [mistake for mistake in found if mistake.removeprefix(prefix) not in mistakes]
    raise_all(str(path), mistakes)
    return [setup for setup in setups if setup is not None]


def changed_toml(path: Path, changes: Sequence[str], mistakes: list[str]) -> dict[str, Any]:
    """The values of a file after every --set."""
    values = read_toml(path)
    for change in changes:
        _apply(values, change, mistakes)
    return values


def _apply(values: dict[str, Any], change: str, mistakes: list[str]) -> None:
    """Carry out one --set."""
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        mistakes.append(f"--set {change}: must be path=value, as in workload.num_requests=64")
        return
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, last = key.strip().split(".")
    for name in tables:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            mistakes.append(f"--set {change}: {name} is not a table")
            return
        values = inner
    values[last] = value


def merged(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """A table with what another one changes of it, tables inside it included."""
    result = copy.deepcopy(dict(base))
    for key, value in override.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


def _build(
    values: dict[str, Any], prefix: str, folder: Path, loaded: dict[tuple[str, str], Any], mistakes: list[str]
) -> Scenario | None:
    """One set-up; None where anything is wrong with it (then `mistakes` says what)."""
    before = len(mistakes)
    known = [*PARTS, *_TABLES, "engine", "beside"]
    mistakes += [f"{prefix}{key}: unknown key; {nearest(key, known)}" for key in values if key not in known]
    wants_fit = _spell_out_policies(values, prefix, mistakes)
    parts = load_parts(values, prefix, folder, loaded, mistakes)
    for key, cls in _TABLES.items():
        if key in values or key == "workload":
            parts[key] = structure(cls, values.get(key, {}), f"{prefix}{key}", mistakes)
    policies, placement = parts.get("policies", Policies()), None
    if policies is not None and policies.placement.endswith(".json") and "layout" in parts and parts["layout"]:
        layout: Layout = parts["layout"]
        try:
            path = beside_file(policies.placement, folder)
            placement = read_placement(path, layout.experts.ep - layout.num_shared_expert_ranks)
        except ValueError as error:
            mistakes.append(f"{prefix}policies.placement: {error}")
    if len(mistakes) > before:
        return None
    scenario = Scenario(
        name=str(values["name"]),
        model=parts["model"],
        cluster=parts["hardware"],
        layout=parts.get("layout", Layout(AttentionGrid(), ExpertGrid())),
        workload=parts["workload"],
        trace=parts["trace"],
        policies=policies,
        faults=parts.get("faults", Faults()),
        tables=parts.get("profile", MeasuredTables()),
        calibration=parts.get("calibration"),
        engine=values.get("engine", "simulate"),
        seed=values.get("seed", 0),
        plain=values,
        placement=placement,
    )
    if wants_fit:
        policies = dataclasses.replace(scenario.policies, device_expert_fraction=scenario.fitting_expert_fraction())
        scenario = dataclasses.replace(scenario, policies=policies)
    found = scenario.mistakes()
    mistakes += [f"{prefix}{mistake}" for mistake in found]
    return None if found else scenario


def _spell_out_policies(values: dict[str, Any], prefix: str, mistakes: list[str]) -> bool:
    """Put the policies of a named system in place of its name; whether the share on the device is to be what fits."""
    given = values.get("policies", {})
    given = {"system": given} if isinstance(given, str) else given
    if not isinstance(given, dict):
        return False
    given = dict(given)
    name = given.pop("system", None)
    streams = "batching" in SYSTEMS.get(str(name), {})
    wants_fit = given.get("device_expert_fraction", "fit" if name is not None and not streams else None) == "fit"
    if wants_fit:
        given["device_expert_fraction"] = 0.0
    if name is not None and name not in SYSTEMS:
        mistakes.append(f"{prefix}policies.system: unknown {name!r}; {nearest(str(name), SYSTEMS)}")
    elif name is not None:
        given = {**SYSTEMS[name], **given}
        dtypes = values.get("dtypes", {})
        if name in EXPERT_DTYPES and isinstance(dtypes, dict):
            values["dtypes"] = {"experts": EXPERT_DTYPES[name], **dtypes}
    if given:
        values["policies"] = given
    return wants_fit


def load_parts(
    values: dict[str, Any], prefix: str, folder: Path, loaded: dict[tuple[str, str], Any], mistakes: list[str]
) -> dict[str, Any]:
    """What the names in a set-up stand for: model (in its dtypes), hardware, trace, profile and calibration.

    Also checks the seed. What cannot be loaded lacks, and `mistakes` says why.
    """
    parts: dict[str, Any] = {}
    loaders: dict[str, Callable[[str], Any]] = {
        "model": lambda text: load_model(existing(text, folder)),
        "hardware": lambda text: load_cluster(existing(text, folder)),
        "trace": lambda text: load_trace(text, folder),
        "profile": lambda text: load_profile(beside_file(text, folder)),
        "calibration": lambda text: load_calibration(beside_file(text, folder)),
    }
    for key, load in loaders.items():
        text = values.get(key)
        if key in ("profile", "calibration") and text is None:
            continue
        if not isinstance(text, str) or not text:
            given = "is missing" if text is None else f"must be a name or a path, not {text!r}"
            mistakes.append(f"{prefix}{key}: {given}; see `moesim list`")
            continue
        remembered = (key, text)
        if key == "trace" and _is_made_up(text):
            if "model" not in parts:
                continue  # its shape is the model's, which is wrong itself
            model: ModelSpec = parts["model"]
            remembered, load = (f"trace for {model.name}", text), partial(made_up_trace, model)
        if remembered not in loaded:
            try:
                loaded[remembered] = load(text)
            except ValueError as error:
                loaded[remembered] = ValueError(f"{prefix}{key}: " + str(error).replace("\n", "\n    "))
        if isinstance(loaded[remembered], ValueError):
            mistakes.append(str(loaded[remembered]))
        else:
            parts[key] = loaded[remembered]
    seed = values.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        mistakes.append(f"{prefix}seed: must be a whole number of 0 or more, not {seed!r}")
    given = values.get("dtypes", {})
    if structure(Dtypes, given, f"{prefix}dtypes", mistakes) is not None:
        unknown = [
            f"{prefix}dtypes.{part}: unknown format {dtype!r}; {nearest(dtype, BYTES_PER_PARAM)}"
            for part, dtype in given.items()
            if dtype not in BYTES_PER_PARAM
        ]
        mistakes += unknown
        if "model" in parts and not unknown:
            model = parts["model"]
            parts["model"] = dataclasses.replace(model, dtypes=dataclasses.replace(model.dtypes, **given))
    return parts


def _is_made_up(trace: str) -> bool:
    return trace == "even" or trace.partition(":")[0] in ("zipf", "sticky")


def made_up_trace(model: ModelSpec, text: str) -> RoutingTrace:
    """A synthetic trace of the model's routing shape: "even", "zipf", "zipf:EXPONENT", or "sticky:SHARE"."""
    if text == "even":
        ffn = model.experts
        groups = ffn.num_groups, ffn.top_groups
        return even_trace(len(model.moe_layers), ffn.num_experts, ffn.top_k, *groups)
    if text.startswith("sticky"):
        return _sticky(model, text)
    try:
        exponent = float(text.partition(":")[2] or 0.5)
    except ValueError:
        exponent = -1.0
    if not 0 <= exponent <= 3:
        raise ValueError(f"{text!r} must be zipf:EXPONENT with an exponent in 0..3, such as zipf:0.5")
    num_experts, top_k = (model.experts.num_experts, model.experts.top_k) if model.moe_layers else (1, 1)
    return zipf_trace(
        len(model.moe_layers), num_experts, top_k, num_requests=32, prompt_tokens=96, output_tokens=32,
        exponent=exponent,
    )  # fmt: skip


def _sticky(model: ModelSpec, text: str) -> RoutingTrace:
    try:
        share = float(text.partition(":")[2])
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"{text!r} must be sticky:SHARE, the share of experts kept from token to token: sticky:0.33")
    num_experts, top_k = (model.experts.num_experts, model.experts.top_k) if model.moe_layers else (1, 1)
    return sticky_trace(len(model.moe_layers), num_experts, top_k, stickiness=share, num_tokens=512)


def beside_file(text: str, folder: Path | None) -> Path:
    """A path next to the scenario file, where there is something of that name; the path itself otherwise."""
    path = Path(text)
    return folder / path if folder is not None and not path.is_absolute() and (folder / path).exists() else path


def existing(text: str, folder: Path) -> str:
    """A path next to the scenario file, where there is one of that name with a suffix; the text itself otherwise."""
    looks_like_path = "/" in text or text.endswith((".toml", ".json"))
    return str(beside_file(text, folder)) if looks_like_path else text
