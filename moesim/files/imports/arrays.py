"""NumPy archives: opening them, and the layout of arrays that holds one row for each token."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.files.imports.facts import Facts
from moesim.files.imports.tokens import concatenated, routing_trace
from moesim.files.tables import raise_all
from moesim.routing.trace import RoutingTrace

_WEIGHTS = {"gate_weight": 1.0, "prob_u8": 1 / 255}
"""Arrays of weights, and the factor that makes them weights."""


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file, or of an .npy file under the name "".

    Raises:
        ValueError: it is not a whole NumPy file, or holds Python objects.
    """
    with _opened(path) as arrays:
        return {name: arrays[name] for name in arrays}


def array_names(path: Path) -> list[str]:
    """Names of the arrays of an .npz file, which are not read.

    Raises:
        ValueError: it is not a whole NumPy file.
    """
    with _opened(path) as arrays:
        return list(arrays)


@contextmanager
def _opened(path: Path) -> Iterator[Mapping[str, NDArray[Any]]]:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            yield {"": loaded} if isinstance(loaded, np.ndarray) else loaded
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a whole NumPy file of numbers ({error}); write it again") from error


def read_npz(paths: Sequence[Path], facts: Facts) -> RoutingTrace:
    """NumPy archive (.npz) of arrays with one row for each token.

    expert_ids [token, layer, K]; sample [token] and position [token], request and place in it; and where there are any
    gate_weight [token, layer, K] (or prob_u8, the weight times 255), layer [layer], num_experts. Several files make
    one trace.
    """
    return concatenated(paths, [_read(path, facts) for path in paths], facts)


def _read(path: Path, facts: Facts) -> RoutingTrace:
    arrays = read_arrays(path)
    ids = arrays.get("expert_ids")
    if ids is None or ids.ndim != 3:
        raise ValueError(f"{path}: needs an array expert_ids [token, layer, K]; it has {_shapes(arrays)}")
    T, L, K = ids.shape
    weights = next((name for name in _WEIGHTS if name in arrays), None)
    wanted: dict[str, tuple[tuple[int, ...], str]] = {
        "expert_ids": ((T, L, K), "iu"),
        "sample": ((T,), "iu"),
        "position": ((T,), "iu"),
        **({"layer": ((L,), "iu")} if "layer" in arrays else {}),
        **({"num_experts": ((), "iu")} if "num_experts" in arrays else {}),
        **({weights: ((T, L, K), "fiu")} if weights else {}),
    }
    mistakes = [
        f"array {name} must be of {'numbers' if 'f' in kinds else 'whole numbers'} {list(shape)}; "
        + (f"given {arrays[name].dtype} {list(arrays[name].shape)}" if name in arrays else "there is none")
        for name, (shape, kinds) in wanted.items()
        if name not in arrays or arrays[name].shape != shape or arrays[name].dtype.kind not in kinds
    ]
    raise_all(str(path), mistakes)
    return routing_trace(
        path,
        facts,
        ids_TLK=ids,
        request_T=arrays["sample"].astype(np.int64),
        position_T=arrays["position"].astype(np.int64),
        is_decode_T=None,
        num_experts=int(arrays["num_experts"]) if "num_experts" in arrays else None,
        layers=arrays.get("layer", np.arange(L)).tolist(),
        weights_TLK=arrays[weights] * np.float32(_WEIGHTS[weights]) if weights else None,
    )


def _shapes(arrays: Mapping[str, NDArray[Any]]) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()) or "none"
