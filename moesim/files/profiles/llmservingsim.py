"""LLMServingSim's profiles of vLLM's layers: DEVICE/MODEL/VARIANT/tpN/*.csv (or .csv.gz), beside them meta.yaml.

Each number is microseconds of one call on one rank, of a model of one layer, kernels launched one by one. Times of
kernels alone: no gap between them, no host. What the columns mean is not written down there; it follows from the data.
On an RTX PRO 6000 `qkv_proj` of 2,048 tokens reaches 64 % of the datasheet's FLOP rate and `lm_head` 83 % of its memory
rate, and the fastest `moe` of 128 experts reads them at the rate of `lm_head`: each is one layer's (Qwen3-30B-A3B;
`tests/test_layer_profiles.py` checks it).

attention.csv: prefill_chunk, kv_prefill, n_decode, kv_decode, time_us: one chunk of a prompt with so many tokens before
    it, together with so many decoding requests of so many cached tokens each; projections apart.
dense.csv: layer, tokens, time_us: one call. A decoder layer calls `layernorm` twice, the others once; `embedding` and
    `final_layernorm` are called once in an iteration.
per_sequence.csv: layer (lm_head, sampler), sequences, time_us.
moe.csv: tokens, activated_experts, time_us: one MoE layer with its router, all experts on one device, top-k choices of
    each token spread over so many experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from moesim.files.tables import raise_all

Floats = NDArray[np.float64]

ONCE = ("embedding", "final_layernorm")
"""Layers that an iteration calls once."""
CALLS = {"layernorm": 2, "qkv_proj": 1, "qk_norm": 1, "rotary_emb": 1, "o_proj": 1, "gate_up_proj": 1, "act_fn": 1,
         "down_proj": 1}  # fmt: skip
"""Layers that a decoder layer calls, and how often."""
PER_SEQUENCE = ("lm_head", "sampler")
ATTENTION = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
MOE = ("tokens", "activated_experts")

Line = tuple[Floats, Floats]
"""Increasing sizes, and seconds at each."""


@dataclass(frozen=True, eq=False)
class LayerProfile:
    """Seconds of vLLM's layers of one model on one rank of `tp`.

    Attributes:
        dense: layer -> tokens and seconds of a call; per_sequence: the same by sequences.
        attention_NX, attention_s_N: columns in the order of `ATTENTION`.
        moe_NX, moe_s_N: columns in the order of `MOE`; no rows where there is none.
        device, engine: in words.
        tp: ranks that the layers were cut for.
    """

    dense: Mapping[str, Line]
    per_sequence: Mapping[str, Line]
    attention_NX: Floats
    attention_s_N: Floats
    moe_NX: Floats
    moe_s_N: Floats
    device: str
    engine: str
    tp: int


def read_layer_profile(folder: str | Path, tp: int = 1) -> LayerProfile:
    """Read the profile of a variant (the folder with meta.yaml) at one tensor-parallel degree.

    Raises:
        ValueError: one message with every mistake: files or columns that lack, layers that are not known, numbers that
            are not positive, points that come twice.
    """
    folder = Path(folder)
    place, mistakes = folder / f"tp{tp}", list[str]()
    meta = _read_meta(folder / "meta.yaml", mistakes)
    attention_NX, attention_s_N, _ = _rows(place, "attention", ATTENTION, 0, mistakes)
    dense = _lines(place, "dense", "tokens", (*ONCE, *CALLS), (*ONCE, "layernorm", "qkv_proj", "o_proj"), mistakes)
    heads = _lines(place, "per_sequence", "sequences", PER_SEQUENCE, PER_SEQUENCE, mistakes)
    moe_NX, moe_s_N = np.zeros((0, 2)), np.zeros(0)
    if "gate_up_proj" not in dense:  # experts are the same on every rank of tensor parallelism alone
        at = place if _found(place, "moe") else folder / "tp1"
        moe_NX, moe_s_N, _ = _rows(at, "moe", MOE, 1, mistakes)
    raise_all(str(folder), mistakes)
    engine = f"vLLM {meta.get('vllm_version', '?')}, CUDA {meta.get('cuda_version', '?')}"
    return LayerProfile(dense, heads, attention_NX, attention_s_N, moe_NX, moe_s_N, meta.get("gpu", "?"), engine, tp)


def _read_meta(path: Path, mistakes: list[str]) -> dict[str, str]:
    """The keys at the first level that have a plain value."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        mistakes.append(f"{path.name} cannot be read; give the folder of a variant, DEVICE/MAKER/MODEL/VARIANT")
        return {}
    pairs = [line.split(":", 1) for line in lines if ":" in line and not line[:1].isspace()]
    return {key: value.strip().strip("'\"") for key, value in pairs if value.strip()}


def _found(place: Path, name: str) -> Path | None:
    return next((path for suffix in (".csv", ".csv.gz") if (path := place / f"{name}{suffix}").is_file()), None)


def _rows(
    place: Path, name: str, axes: tuple[str, ...], least: int, mistakes: list[str], label: str = ""
) -> tuple[Floats, Floats, list[str]]:
    """Coordinates [N, axes], seconds [N] and labels of a table; nothing, and mistakes, where it has any."""
    nothing = np.zeros((0, len(axes))), np.zeros(0), list[str]()
    path = _found(place, name)
    if path is None:
        mistakes.append(f"{place.name}/{name}.csv lacks (or {name}.csv.gz); copy the whole folder of the variant")
        return nothing
    where, columns = f"{place.name}/{path.name}", [*([label] if label else []), *axes, "time_us"]
    try:
        table = pyarrow.csv.read_csv(path)
    except (OSError, pa.ArrowException) as error:
        mistakes.append(f"{where}: not a whole CSV table ({error}); copy it again")
        return nothing
    lacking = [column for column in columns if column not in table.column_names]
    if lacking or not len(table):
        mistakes.append(f"{where}: " + (f"column {', '.join(lacking)} lacks" if lacking else "no rows"))
        return nothing
    try:
        points = np.stack([table[axis].to_numpy().astype(np.float64) for axis in axes], axis=1)
        micros_N = table["time_us"].to_numpy().astype(np.float64)
    except ValueError as error:
        mistakes.append(f"{where}: columns {', '.join(columns[-len(axes) - 1 :])} must be numbers ({error})")
        return nothing
    labels = [str(word) for word in table[label].to_pylist()] if label else [""] * len(points)
    wrong_N = ~((points >= least) & (points == np.round(points))).all(axis=1) | ~((micros_N > 0) & (micros_N < np.inf))
    mistakes += [
        f"{where}: row {row + 1}: {', '.join(axes)} must be whole numbers of at least {least} and time_us a positive "
        f"number, given {[*points[row].tolist(), float(micros_N[row])]}; profile that point again"
        for row in np.flatnonzero(wrong_N)[:5]
    ]
    keys = [(word, *point) for word, point in zip(labels, points.tolist(), strict=True)]
    twice = len(keys) - len(set(keys))
    if twice:
        mistakes.append(f"{where}: {twice} rows repeat the point of another; keep one of each")
    return points, micros_N * 1e-6, labels


def _lines(
    place: Path, name: str, axis: str, known: tuple[str, ...], needed: tuple[str, ...], mistakes: list[str]
) -> dict[str, Line]:
    """Each layer's sizes and seconds, by size."""
    points, seconds_N, labels = _rows(place, name, (axis,), 1, mistakes, "layer")
    found = list(dict.fromkeys(labels))
    if not found:
        return {}
    mistakes += [f"{place.name}/{name}.csv: layer {word!r} is not known; one of {', '.join(known)}"
                 for word in found if word not in known]  # fmt: skip
    mistakes += [f"{place.name}/{name}.csv: layer {word} lacks" for word in needed if word not in found]
    lines = {}
    for word in found:
        rows = np.array([label == word for label in labels])
        if rows.sum() < 2:
            mistakes.append(f"{place.name}/{name}.csv: layer {word}: one size is given; at least 2 would do")
            continue
        order = np.argsort(points[rows, 0])
        lines[word] = points[rows, 0][order], seconds_N[rows][order]
    return lines
