"""Compiling the kernels ahead of time, without a GPU: what the real compiler makes of each launch.

A launcher called inside `recording(capability)` compiles what it would launch, for that architecture, and launches
nothing; tensors may be on torch's "meta" device, so full-size weights take no memory. `python -m
moesim.kernels.compiled` prints the table for `moesim.kernels.launches`.

Registers and spills say whether a tile is reasonable. They say nothing of speed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

#: Shared memory one block may ask for (CUDA C++ programming guide, table of technical specifications).
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel."""

    launch: str
    kernel: str
    capability: int
    num_warps: int
    num_stages: int
    registers: int  # of one thread
    spill_bytes: int  # stores and loads of one thread, as ptxas counts them
    shared_bytes: int
    matrix_instructions: int  # mma, wgmma or tcgen05.mma in the PTX
    async_copies: int  # cp.async in the PTX, bulk copies included


class NoDevice:
    """Stands in for a GPU driver: says which architecture to compile for. The device's number is the capability."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        """The architecture that everything is compiled for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Kernels are cached by this number."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched."""
        return 0


@contextmanager
def recording(capability: int) -> Iterator[list[Any]]:
    """Within it, launches compile for `sm_<capability>` and are appended to the list instead of run.

    Raises:
        RuntimeError: triton was imported with TRITON_INTERPRET set, which leaves nothing to compile.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: unset it and start again, the interpreter compiles nothing")
    kernels: list[Any] = []
    launch, active = JITFunction.run, driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernels.append(launch(self, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    driver.set_active(NoDevice(capability))
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = launch
        driver.set_active(active)


def resources(ptx: str, capability: int) -> tuple[int, int]:
    """Registers of one thread, and bytes it spills (stores and loads), as ptxas reports them."""
    tool = get_ptxas(capability).path
    suffix = "a" if capability >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [tool, "-v", f"--gpu-name=sm_{capability}{suffix}", str(path), "-o", str(path.with_suffix(".o"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", said)]
    if registers is None or not spills:
        raise RuntimeError(f"ptxas reported neither registers nor spills: {said!r}")
    return int(registers[1]), sum(spills)


def describe(launch: str, capability: int, kernel: Any) -> Compiled:
    """Reads one compiled kernel's artefacts."""
    ptx = kernel.asm["ptx"]
    registers, spill_bytes = resources(ptx, capability)
    return Compiled(
        launch, kernel.metadata.name, capability, kernel.metadata.num_warps, kernel.metadata.num_stages,
        registers, spill_bytes, kernel.metadata.shared,
        len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.", ptx)),
        len(re.findall(r"\bcp\.async(?:\.bulk(?:\.tensor)?\.|\.c[ag]\.)", ptx)),
    )  # fmt: skip


def compile_launches(capability: int, names: list[str] | None = None) -> list[Compiled]:
    """Every kernel of `moesim.kernels.launches` that the architecture can run, or those of the launches named."""
    from moesim.kernels.launches import LAUNCHES

    table = []
    for launch in LAUNCHES:
        if capability < launch.min_capability or (names and launch.name not in names):
            continue
        with recording(capability) as kernels:
            launch.start()
        table += [describe(launch.name, capability, kernel) for kernel in dict.fromkeys(kernels)]
    return table


def main(arguments: list[str]) -> None:
    """Prints the table as JSON lines; arguments are capabilities (80 90 100) and names of launches."""
    capabilities = [int(word) for word in arguments if word.isdigit()] or sorted(SHARED_BYTES)
    names = [word for word in arguments if not word.isdigit()]
    print(json.dumps({"triton": triton.__version__}))
    for capability in capabilities:
        for row in compile_launches(capability, names):
            print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
