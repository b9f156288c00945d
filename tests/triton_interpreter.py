"""Runs a test in a process of its own where Triton is its interpreter, so that CPU tensors do.

TRITON_INTERPRET must be set before triton is first imported, and it stays for the process's life; transformers imports
triton too, and the ahead-of-time compiler needs the real one. One child serves all tests of a pytest process.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest

needs_triton = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("torch", "triton")),
    reason="kernels need torch and triton: moesim[kernels]",
)


def prepare() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("error")
    import torch

    torch.set_num_threads(1)


@functools.cache
def child() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=prepare)


def call(module: str, name: str, arguments: dict[str, Any]) -> None:
    getattr(importlib.import_module(module), name).__wrapped__(**arguments)


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Decorator: the test's body runs in the child; its arguments and its errors are pickled."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        child().submit(call, test.__module__, test.__name__, arguments).result()

    return needs_triton(run)
