"""Box files: one machine that models do not fit, and what is asked of it; read strictly, like scenarios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moesim.files.hardware import load_cluster
from moesim.files.keys import nearest
from moesim.files.models import load_model, preset_names
from moesim.files.scenarios import changed_toml, existing, made_up_trace
from moesim.files.structure import structure
from moesim.files.tables import raise_all
from moesim.hardware import Cluster, Link
from moesim.layout import AttentionGrid, ExpertGrid, Layout
from moesim.model import Dtypes, ModelSpec
from moesim.policies import EXPERT_DTYPES, SYSTEMS, Policies
from moesim.routing.trace import RoutingTrace
from moesim.scenario import Scenario
from moesim.workload import Workload

UPGRADES: Mapping[str, str] = {
    "vram": "twice the device memory",
    "link": "twice the host link (PCIe 5.0 for 4.0)",
    "dram": "twice the host's memory channels",
}


@dataclass(frozen=True)
class Asked:
    """The table [box].

    Attributes:
        hardware: a machine with one device and a host. host_memory_bytes: of its memory, where the profile has another.
        stickiness: share of a token's experts that it keeps from the token before; the routing is made up, see
            `moesim.routing.synthetic.sticky_trace`.
        models, systems: names; all mixture-of-experts presets that are decoders, where no models are given.
    """

    hardware: str
    stickiness: float
    host_memory_bytes: float | None = None
    models: list[str] = field(default_factory=list)
    systems: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Box:
    """What fits this machine? models: in their formats; systems: names of `moesim.policies.SYSTEMS`."""

    name: str
    cluster: Cluster
    models: Sequence[ModelSpec]
    systems: Sequence[str]
    workload: Workload
    stickiness: float
    plain: Mapping[str, Any]

    def trace(self, model: ModelSpec) -> RoutingTrace:
        """Made-up routing of a model."""
        return made_up_trace(model, f"sticky:{self.stickiness}")

    def scenario(self, model: ModelSpec, trace: RoutingTrace, system: str, upgrade: str = "") -> Scenario:
        """One model with one set of policies, as many experts on the device as fit, on the machine or a better one."""
        cluster = upgraded(self.cluster, upgrade)
        one = Scenario(
            name=f"{model.name}, {system}", model=model, cluster=cluster,
            layout=Layout(AttentionGrid(), ExpertGrid()), workload=self.workload,
            trace=trace,
            policies=Policies.of(SYSTEMS[system], 0.0), plain=self.plain,
        )  # fmt: skip
        fraction = one.fitting_expert_fraction()
        return replace(one, policies=replace(one.policies, device_expert_fraction=fraction))


def upgraded(cluster: Cluster, upgrade: str) -> Cluster:
    """The machine with one of `UPGRADES`; itself for ""."""
    if upgrade == "vram":
        memory = replace(cluster.device.memory, capacity_bytes=2 * cluster.device.memory.capacity_bytes)
        return replace(cluster, device=replace(cluster.device, memory=memory))
    if upgrade == "dram" and cluster.host is not None:
        memory = replace(cluster.host.memory, bytes_per_s=2 * cluster.host.memory.bytes_per_s)
        return replace(cluster, host=replace(cluster.host, memory=memory))
    if upgrade == "link":
        graph = cluster.topology.copy()
        for _, _, data in graph.edges(data=True):
            data["link"] = Link(2 * data["link"].bytes_per_s, data["link"].latency_s)
        return replace(cluster, topology=graph)
    return cluster


def is_box(values: Mapping[str, Any]) -> bool:
    """Whether the values of a file ask what fits a box."""
    return "box" in values


def load_box(path: str | Path, changes: Sequence[str] = ()) -> Box:
    """Read a box file.

    Raises:
        ValueError: one message with every mistake in the file.
    """
    path = Path(path)
    mistakes: list[str] = []
    values = changed_toml(path, changes, mistakes)
    known = ("name", "box", "workload", "dtypes")
    mistakes += [f"{key}: unknown key; {nearest(key, known)}" for key in values if key not in known]
    asked = structure(Asked, values.get("box", {}), "box", mistakes)
    workload = structure(Workload, values.get("workload", {}), "workload", mistakes)
    structure(Dtypes, values.get("dtypes", {}), "dtypes", mistakes)
    raise_all(str(path), mistakes)
    assert asked is not None and workload is not None
    mistakes += workload.mistakes()
    if not 0 <= asked.stickiness <= 1:
        mistakes.append(f"box.stickiness: must lie in 0..1, given {asked.stickiness}")
    for name in asked.systems:
        if name not in SYSTEMS:
            mistakes.append(f"box.systems: unknown {name!r}; {nearest(name, SYSTEMS)}")
        elif "batching" in SYSTEMS[name]:
            mistakes.append(f"box.systems: {name!r} streams weights for large batches; run it as a scenario of its own")
    cluster = None
    models: list[ModelSpec] = []
    try:
        cluster = load_cluster(existing(asked.hardware, path.parent))
        if cluster.num_ranks != 1 or cluster.host is None:
            mistakes.append(f"box.hardware: needs one device and a host, {asked.hardware!r} has {cluster.num_ranks}")
        elif asked.host_memory_bytes is not None:
            memory = replace(cluster.host.memory, capacity_bytes=asked.host_memory_bytes)
            cluster = replace(cluster, host=replace(cluster.host, memory=memory))
    except ValueError as error:
        mistakes.append(f"box.hardware: {error}")
    for name in asked.models or preset_names():
        try:
            model = load_model(existing(name, path.parent))
        except ValueError as error:
            mistakes.append(f"box.models: {error}")
            continue
        fits_asked = model.moe_layers and not any(layer.cross for layer in model.layers)
        if fits_asked:
            models.append(replace(model, dtypes=replace(model.dtypes, **values.get("dtypes", {}))))
        elif asked.models:
            mistakes.append(f"box.models: {name!r} is not a decoder with experts; leave it out")
    raise_all(str(path), mistakes)
    assert cluster is not None
    systems = asked.systems or [name for name in SYSTEMS if _runs_anywhere(name)]
    return Box(str(values.get("name", path.stem)), cluster, models, systems, workload, asked.stickiness, values)


def _runs_anywhere(name: str) -> bool:
    """With model and batch as they are (deferred experts change what is computed), without the future, on ordinary
    machines."""
    wants = set(SYSTEMS[name].values())
    changed = {"pre_gate", "whole_path", "ktransformers_deferred"}
    special = {"oracle_belady", "hot_cold", "op_per_byte", "look_up", "near_only", "near_attention"}
    return name not in EXPERT_DTYPES and "batching" not in SYSTEMS[name] and not wants & (changed | special)
