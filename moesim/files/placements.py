"""Expert maps on disk: EPLB's JSON, as SGLang and vLLM know it, and ExFlow's CSV."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moesim.layout import Placement


def placement_json(placement: Placement, num_experts: int) -> str:
    """EPLB's three arrays, by layer, and `num_ranks`.

    physical_to_logical_map [L, P]: expert in each slot (SGLang's `--init-expert-location` reads this key);
    logical_to_physical_map [L, E, X]: slots of each expert, padded with -1; logical_replica_count [L, E].
    """
    slots_LEX, count_LE = placement.replicas(num_experts)
    shape = {
        "num_ranks": placement.ep,
        "physical_to_logical_map": placement.slot_expert_LP.tolist(),
        "logical_to_physical_map": slots_LEX.tolist(),
        "logical_replica_count": count_LE.tolist(),
    }
    return json.dumps(shape) + "\n"


def placement_csv(placement: Placement, num_experts: int) -> str:
    """ExFlow's table: a row for each expert of each layer, numbered through all layers, and its rank ("Node" there).

    An expert with copies has a row for each; slots that hold nothing have none.
    """
    size = placement.slot_expert_LP.shape[1] // placement.ep
    rows = [
        (layer * num_experts + int(expert), slot // size)
        for layer, expert_P in enumerate(placement.slot_expert_LP)
        for slot, expert in enumerate(expert_P)
        if expert >= 0
    ]
    return "Expert,Node\n" + "".join(f"{expert},{rank}\n" for expert, rank in sorted(rows))


def read_placement(path: Path, ep: int) -> Placement:
    """An expert map of `placement_json`, or of EPLB, SGLang or vLLM: any JSON object with physical_to_logical_map.

    Args:
        ep: ranks, where the file does not say; a file that says another number is wrong.

    Raises:
        ValueError: every mistake of the file.
    """
    try:
        values: Any = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no expert map can be read: {error}") from None
    key = "physical_to_logical_map"
    if not isinstance(values, dict) or key not in values:
        raise ValueError(f"{path}: {key}: is missing; an expert map has the expert of every slot of every layer there")
    try:
        slot_LP = np.array(values[key])
    except ValueError:
        slot_LP = np.zeros(0)
    if slot_LP.ndim != 2 or slot_LP.dtype.kind != "i" or not slot_LP.size:
        raise ValueError(f"{path}: {key}: must be a list of layers, each a list of as many experts")
    said = values.get("num_ranks", ep)
    if said != ep:
        raise ValueError(
            f"{path}: num_ranks: is {said!r}, the layout has {ep} expert-parallel ranks; use a map for {ep}"
        )
    if slot_LP.shape[1] % ep:
        raise ValueError(f"{path}: {key}: {slot_LP.shape[1]} slots do not divide evenly among {ep} ranks")
    return Placement(slot_LP.astype(np.int32), ep)
