"""Plain data that `torch.save` wrote, read without torch: dicts, lists, numbers, strings and tensors, nothing else.

Such a file is a zip: `data.pkl` names the storages of its tensors, `data/<key>` holds their bytes (little endian
unless the entry `byteorder` says otherwise). The unpickler here knows the three functions that tensors need and
refuses every other name, so that a file can make no code run.
"""

from __future__ import annotations

import collections
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DTYPES = {
    "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1",
    "BoolStorage": "?", "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2",
}  # fmt: skip


def read_torch(path: Path) -> Any:
    """The data in a file that `torch.save` wrote, with NumPy arrays for tensors.

    Raises:
        ValueError: it is no such file, or holds more than plain data and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise ValueError("no data.pkl in it")
            with archive.open(names[0]) as file:
                return _Unpickler(file, archive, names[0].removesuffix("data.pkl")).load()
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError,
            zipfile.BadZipFile, pickle.UnpicklingError) as error:  # damage shows as any of them  # fmt: skip
        raise ValueError(
            f"{path}: not a file of plain data and tensors that torch.save wrote ({error}); save it again, or as .npz"
        ) from error


class _Unpickler(pickle.Unpickler):
    """Builds arrays from the storages of one archive."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder
        order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in archive.namelist() else b"little"
        self._is_big = order.strip() == b"big"
        self._storages: dict[str, NDArray[Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """One of the few names that plain data and tensors need."""
        if module == "torch" and name in _DTYPES:
            return np.dtype((">" if self._is_big else "<") + _DTYPES[name])
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is neither plain data nor a tensor")

    def persistent_load(self, pid: Any) -> NDArray[Any]:
        """The numbers of a storage."""
        _kind, dtype, key, _location, num_elements = pid
        if key not in self._storages:
            raw = self._archive.read(f"{self._folder}data/{key}")
            self._storages[key] = np.frombuffer(raw, dtype, num_elements)
        return self._storages[key]


def _tensor(
    storage: NDArray[Any], offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_flags: Any
) -> NDArray[Any]:
    """A copy of the part of a storage that a tensor shows."""
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if 0 not in shape else -1
    if offset < 0 or min(stride, default=0) < 0 or last >= len(storage):
        raise ValueError("a tensor reaches beyond its storage")
    if 0 in shape:
        return np.empty(shape, storage.dtype.newbyteorder("="))
    strides = [step * storage.itemsize for step in stride]
    shown = np.lib.stride_tricks.as_strided(storage[offset:], shape, strides, writeable=False)
    return shown.astype(storage.dtype.newbyteorder("="))
