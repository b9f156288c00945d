"""Facts of a run that its table leaves out, from the published recipe it was made with (`recipes.toml`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from moesim.files.runs import Run
from moesim.files.tables import raise_all, read_toml

_POINT = (
    "prompt_tokens",
    "output_tokens",
    "concurrency",
    "num_draft_tokens",
    "num_instances",
    "is_dp",
    "max_requests_per_rank",
)
_WHEN = ("model", "system", "backend", "version", "mode", "measured_on", "source", "prompt_tokens", "output_tokens",
         "concurrency", "dp")  # fmt: skip
SAME_TIME = 1.12
"""Runs of one point whose times differ by less than this factor repeat each other: repeats differ by up to 3 %, points
of other drafts or loads by 27 % and more."""


def load_recipes(path: str | Path | None = None) -> list[dict[str, Any]]:
    """Read recipes; the packaged ones without a path.

    Raises:
        ValueError: one message with every mistake of the file.
    """
    if path is None:
        with resources.as_file(resources.files("moesim.calibrate") / "recipes.toml") as packaged:
            return load_recipes(packaged)
    recipes, mistakes = read_toml(Path(path)).get("recipe", []), []
    settable = {field.name for field in dataclasses.fields(Run)}
    for i, recipe in enumerate(recipes):
        where = f"recipe {i}"
        mistakes += [
            f"{where}: when.{key} is not known; one of {', '.join(_WHEN)}"
            for key in recipe.get("when", {})
            if key not in _WHEN
        ]
        mistakes += [f"{where}: set.{key} is no fact of a run" for key in recipe.get("set", {}) if key not in settable]
        if not ("set" in recipe) ^ ("points" in recipe):
            mistakes.append(f"{where}: must have either set or points")
        if any(len(point) != len(_POINT) for point in recipe.get("points", [])):
            mistakes.append(f"{where}: each point must be [{', '.join(_POINT)}]")
    raise_all(str(path), mistakes)
    return list(recipes)


def with_recipes(runs: Sequence[Run], recipes: Sequence[Mapping[str, Any]] | None = None) -> list[Run]:
    """The runs with the facts of the recipes they meet (the packaged ones by default), in the same order."""
    result = list(runs)
    for recipe in load_recipes() if recipes is None else recipes:
        met = [i for i, run in enumerate(result) if _meets(run, recipe.get("when", {}))]
        for i in met if "set" in recipe else ():
            result[i] = dataclasses.replace(result[i], **recipe["set"])
        if "points" in recipe:
            points = [dict(zip(_POINT, point, strict=True)) for point in recipe["points"]]
            for key in dict.fromkeys(_key(result[i]) for i in met):
                _settle([i for i in met if _key(result[i]) == key], [p for p in points if _point_key(p) == key], result)
    return result


def _meets(run: Run, when: Mapping[str, Any]) -> bool:
    mode = "disagg" if run.is_disaggregated else "agg"
    return all(
        value in run.source if key == "source" else (mode if key == "mode" else getattr(run, key)) == value
        for key, value in when.items()
    )


def _key(run: Run) -> tuple[float, ...]:
    return run.prompt_tokens, run.output_tokens, run.concurrency


def _point_key(point: Mapping[str, Any]) -> tuple[float, ...]:
    return point["prompt_tokens"], point["output_tokens"], point["concurrency"]


def _settle(members: Sequence[int], points: Sequence[Mapping[str, Any]], runs: list[Run]) -> None:
    """Give the runs of one concurrency their points; leave them as they are where that cannot be told."""
    by_time = sorted(members, key=lambda i: runs[i].tpot_s)
    clusters: list[list[int]] = []
    for i in by_time:
        if clusters and (len(points) == 1 or runs[i].tpot_s < SAME_TIME * runs[clusters[-1][0]].tpot_s):
            clusters[-1].append(i)
        else:
            clusters.append([i])
    if len(clusters) != len(points):
        return
    ordered = sorted(points, key=lambda p: (-p["num_draft_tokens"], p["concurrency"] / p["num_instances"]))
    for cluster, point in zip(clusters, ordered, strict=True):
        for i in cluster:
            run = runs[i]
            ranks = run.dp * run.tp
            runs[i] = dataclasses.replace(
                run,
                dp=ranks if point["is_dp"] else 1,
                tp=1 if point["is_dp"] else ranks,
                num_draft_tokens=point["num_draft_tokens"],
                num_instances=point["num_instances"],
                max_requests_per_rank=point["max_requests_per_rank"],
                is_told_by_time=len(points) > 1,
            )
