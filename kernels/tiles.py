"""What all kernels share: the tile a launch is configured with, and what the interpreter needs to be told."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton import knobs

#: Kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this module was imported), on CPU tensors.
INTERPRETED = bool(knobs.runtime.interpret)

#: Widen operands before `tl.dot`: the interpreter would multiply the bit patterns of bf16 and fp8 as integers.
UPCAST = INTERPRETED


@dataclass(frozen=True)
class Tile:
    """Block sizes of one launch; what an autotuner chooses among.

    `group_m` blocks of rows are worked through before the next block of columns, so that weights stay in L2.
    `persistent` starts one program per multiprocessor that takes tile after tile, instead of one program per tile.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 8
    num_stages: int = 3
    persistent: bool = True

    def programs(self, num_tiles: int, device: torch.device) -> int:
        """Programs to start for that many tiles."""
        if self.persistent and device.type == "cuda":
            return max(1, min(num_tiles, int(torch.cuda.get_device_properties(device).multi_processor_count)))
        return max(1, num_tiles)


def check_contiguous(**tensors: torch.Tensor) -> None:
    """Kernels derive strides from shapes.

    Raises:
        ValueError: a tensor is not contiguous, or lies on another device than the first.
    """
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name}: kernels need a contiguous tensor, given strides {tensor.stride()}; call .contiguous()"
            )
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, the first tensor on {first.device}; move them together")


def ceil_div(a: int, b: int) -> int:
    """Quotient rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def capability(device: torch.device) -> int:
    """Compute capability of a GPU, such as 90; 90 for what is none."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
