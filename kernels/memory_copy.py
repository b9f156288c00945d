"""Memory copy: the ceiling of memory bandwidth that the other kernels are measured against."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from moesim.kernels.tiles import ceil_div, check_contiguous

#: (block of values, num_warps) worth timing; none has been timed.
CANDIDATES = ((4096, 8), (2048, 4), (8192, 8), (1024, 4))


@triton.jit
def copy_kernel(x_ptr, y_ptr, num_values, BLOCK: tl.constexpr):
    """One block of values; evict_first keeps a stream that is used once out of the way in L2."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + at, mask=at < num_values, eviction_policy="evict_first")
    tl.store(y_ptr + at, value, mask=at < num_values, eviction_policy="evict_first")


def copy(x: torch.Tensor, y: torch.Tensor, block: int = 4096, num_warps: int = 8) -> torch.Tensor:
    """Copies x into y of the same shape and dtype."""
    if x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(
            f"copy needs one shape and dtype, given {tuple(x.shape)} {x.dtype}, {tuple(y.shape)} {y.dtype}"
        )
    check_contiguous(x=x, y=y)
    if x.numel():
        copy_kernel[(ceil_div(x.numel(), block),)](x, y, x.numel(), BLOCK=block, num_warps=num_warps)
    return y


def reference(x: torch.Tensor) -> torch.Tensor:
    """torch's own copy."""
    return x.clone()


def num_bytes(num_values: int, bytes_per_value: int) -> int:
    """Every value read once and written once."""
    return 2 * num_values * bytes_per_value


def flops(num_values: int) -> int:
    """None."""
    return 0


#: Values of fp32: 1 MiB (in L2 of every GPU of today) to 4 GiB.
CASES = tuple(1 << n for n in (18, 22, 26, 28, 30))
