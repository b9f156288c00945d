"""moesim: how long, how much, and why, when an MoE model runs on a machine, laid out one way, under one load.

`load` reads a scenario file, `run` runs a scenario. Names are loaded when they are first used, so that importing
moesim is cheap.
"""

from typing import Any

from moesim.version import __version__

_HOME = {
    "ModelSpec": "moesim.model",
    "Cluster": "moesim.hardware",
    "Layout": "moesim.layout",
    "Policies": "moesim.policies",
    "Result": "moesim.results",
    "RoutingTrace": "moesim.routing",
    "Scenario": "moesim.scenario",
    "Workload": "moesim.workload",
    "load": "moesim.verbs",
    "run": "moesim.verbs",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moesim' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
