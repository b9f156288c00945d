"""`moesim list`: what comes with moesim."""

from __future__ import annotations

import json
import sys
from importlib import resources
from typing import Any

import click

KINDS = ("models", "hardware", "policies", "methods", "traces", "studies")


@click.command("list")
@click.argument("kind", type=click.Choice(KINDS))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_command(kind: str, as_json: bool) -> None:
    """List models, hardware, policies, methods of placement, traces or studies."""
    rows = {
        "models": _models,
        "hardware": _hardware,
        "policies": _policies,
        "methods": _methods,
        "traces": _traces,
        "studies": _studies,
    }[kind]()
    print_rows(rows, as_json)


def print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Rows with the same keys as a table on stdout, numbers to the right, or as JSON."""
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column, name in enumerate(rows[0] if rows else ()):
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right", no_wrap=column == 0)
    for row in rows:
        table.add_row(*(f"{v:,.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    console = Console()
    if not console.is_terminal:  # a pipe has no width to fold to
        console = Console(width=160)
    console.print(table)


def _models() -> list[dict[str, Any]]:
    from moesim.files.models import load_model, preset_names

    rows = []
    for name in preset_names():
        m = load_model(name)
        e = m.experts if m.moe_layers else None
        rows.append(
            {
                "model": name,
                "params (B)": m.num_params / 1e9,
                "active (B)": m.num_active_params / 1e9,
                "layers": len(m.layers),
                "MoE layers": len(m.moe_layers),
                "experts": e.num_experts if e else 0,
                "top k": e.top_k if e else 0,
                "KV (KiB/token)": m.kv_bytes_per_token / 1024,
                "weights (GiB)": m.weight_bytes / 2**30,
            }
        )
    return rows


def _methods() -> list[dict[str, Any]]:
    from moesim.optimize.methods import METHODS
    from moesim.policies.placement import PLACEMENTS

    rows = []
    for name, method in METHODS.items():
        policy = getattr(method, "policy", None)
        says = type(policy) if name in PLACEMENTS else type(method) if policy else sys.modules[type(method).__module__]
        rows.append(
            {
                "method": name,
                "copies": "yes" if method.takes_copies else "no",
                "uneven ranks": "yes" if method.takes_uneven else "no",
                "what it does": (says.__doc__ or "").strip().partition("\n")[0],
            }
        )
    return rows


def _hardware() -> list[dict[str, Any]]:
    from moesim.files.hardware import device_names, hardware_names, load_cluster

    rows = []
    for name in [*hardware_names(), *(d for d in device_names() if d not in hardware_names())]:
        c = load_cluster(name)
        rows.append(
            {
                "hardware": name,
                "devices": c.num_ranks,
                "device": c.device.name,
                "memory (GiB)": c.device.memory.capacity_bytes / 2**30,
                "memory (TB/s)": c.device.memory.bytes_per_s / 1e12,
                "bf16 (TFLOP/s)": c.device.flops_per_s.get("bf16", c.device.flops_per_s.get("fp16", 0.0)) / 1e12,
            }
        )
    return rows


def _policies() -> list[dict[str, Any]]:
    from moesim.policies import REGISTRIES, SERVING_REGISTRIES, SYSTEMS

    systems = [
        {"kind": "system", "policy": name, "says": ", ".join(f"{kind} {policy}" for kind, policy in policies.items())}
        for name, policies in SYSTEMS.items()
    ]
    return systems + [
        {"kind": kind, "policy": name, "says": " ".join((cls.__doc__ or "").split())[:100]}
        for kind, registry in (*REGISTRIES.items(), *SERVING_REGISTRIES.items())
        for name, cls in registry.items()
    ]


def _traces() -> list[dict[str, Any]]:
    from moesim.files.scenarios import load_trace, trace_names

    rows = []
    for name in trace_names():
        t = load_trace(name)
        rows.append(
            {
                "trace": name, "origin": t.origin, "tokens": t.num_tokens, "MoE layers": t.num_layers,
                "experts": t.num_experts, "top k": t.top_k, "model": t.model,
            }
        )  # fmt: skip
    return rows


def study_rows() -> list[dict[str, Any]]:
    """Each study with what it asks."""
    from moesim.study import load_studies, study_names

    return [{"study": study.name, "asks": study.question} for study in load_studies(study_names())]


def _studies() -> list[dict[str, Any]]:
    scenarios = []
    for entry in sorted(resources.files("moesim.studies").iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".toml"):
            asks = entry.read_text("utf-8").partition("\n")[0].removeprefix("#").strip()
            scenarios.append({"study": f"studies/{entry.name}", "asks": asks})
    return scenarios + study_rows()
