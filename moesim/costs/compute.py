"""Seconds of computation on one device: rooflines with stated efficiencies.

Every function takes arrays and returns seconds as arrays. `bound` chooses the efficiency: "value", or the "low" or
"high" end of the range it is believed to lie in.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.hardware import SOURCES, Device, Efficiency
from moesim.model import BYTES_PER_PARAM

Floats = NDArray[np.float64]

UNKNOWN = Efficiency(0.6, 0.4, 0.8, "assumed", "nothing is known of this device")


def efficiency(device: Device, kind: str, bound: str) -> float:
    """Achieved fraction of the peak for one kind of work."""
    return float(getattr(device.efficiency.get(kind, UNKNOWN), bound))


def source(device: Device, *kinds: str) -> int:
    """Index in `SOURCES` of the weakest number behind a time made of those kinds of work."""
    return max(SOURCES.index(device.efficiency.get(kind, UNKNOWN).source) for kind in kinds)


def launch_s(device: Device, bound: str) -> float:
    """Seconds to start one kernel; believed within a factor of two where it was not measured."""
    factor = {"value": 1.0, "low": 2.0, "high": 0.5}[bound] if launch_source(device) else 1.0
    return device.launch_s * factor


def launch_source(device: Device) -> int:
    """Index in `SOURCES` of the device's launch time."""
    tag = device.sources.get("launch", "assumed").partition(":")[0]
    return SOURCES.index(tag)


def arithmetic_flops_per_s(device: Device, weight_dtype: str) -> float:
    """Peak of the arithmetic that runs on weights of that format.

    Weights in fp8 and int8 multiply in their own format where the device has it; 4-bit and ternary weights are
    widened first.

    Raises:
        ValueError: the device has no peak that would do.
    """
    native = {"fp8_block": "fp8", "fp8": "fp8", "int8": "int8", "fp32": "fp32"}.get(weight_dtype, "bf16")
    for dtype in (native, "bf16", "fp16", "fp32"):
        if dtype in device.flops_per_s:
            return device.flops_per_s[dtype]
    raise ValueError(
        f"device {device.name!r}: flops_per_s has no peak for {weight_dtype} weights (given: "
        f"{', '.join(device.flops_per_s) or 'none'}); add bf16, fp16 or fp32"
    )


def gemm_s(
    flops: Floats,
    num_bytes: Floats,
    device: Device,
    weight_dtype: str,
    kind: str = "gemm",
    bound: str = "value",
) -> Floats:
    """A matrix product: the slower of arithmetic and memory.

    seconds = max(flops / (peak x efficiency), num_bytes / (bandwidth x memory efficiency))

    Source: Williams, Waterman, Patterson, Roofline, CACM 2009.
    Holds for: products large enough to fill the device; smaller ones are in the efficiency's range.

    >>> from moesim.hardware import MemoryTier
    >>> one = Efficiency(1.0, 1.0, 1.0)
    >>> gpu = Device("x", "gpu", MemoryTier(1e9, 10.0), {"bf16": 100.0}, efficiency={"gemm": one, "memory": one})
    >>> gemm_s(np.array([200.0, 200.0]), np.array([10.0, 50.0]), gpu, "bf16").tolist()
    [2.0, 5.0]
    """
    compute = np.asarray(flops) / (arithmetic_flops_per_s(device, weight_dtype) * efficiency(device, kind, bound))
    memory = np.asarray(num_bytes) / (device.memory.bytes_per_s * efficiency(device, "memory", bound))
    return np.maximum(compute, memory)


_BLOCK = 32  # ranks whose slots are priced together, in vector instructions


@njit(cache=True)
def _grouped_s(load_NS, params_NS, weight_bytes, row_bytes, s_per_flop, s_per_byte, seconds_N):  # type: ignore[no-untyped-def]
    num_ranks, num_slots = load_NS.shape
    seconds_I = np.empty(_BLOCK * num_slots)
    for first in range(0, num_ranks, _BLOCK):
        last = min(first + _BLOCK, num_ranks)
        load_I, params_I = load_NS[first:last].ravel(), params_NS[first:last].ravel()
        for i in range(load_I.size):
            load, params = np.float64(load_I[i]), params_I[i]
            compute = 2.0 * params * load * s_per_flop
            memory = (params * weight_bytes + row_bytes * load) * s_per_byte
            slower = memory if memory > compute else compute
            seconds_I[i] = slower if (load > 0) & (params > 0) else 0.0
        for n in range(first, last):
            total = 0.0
            for s in range(num_slots):
                total += seconds_I[(n - first) * num_slots + s]
            seconds_N[n] = total


def experts_s(
    load_LRS: NDArray[np.int32],
    params_LRS: Floats | float,
    hidden_size: int,
    device: Device,
    weight_dtype: str,
    bound: str = "value",
) -> Floats:
    """Grouped GEMM of the experts on each rank, [L, R]: experts one after another, each on its own roofline.

    seconds = sum over slots of max(2 params n / peak, (bytes [n > 0] + 2 x 2 hidden n) / bandwidth), n tokens in it

    Args:
        load_LRS: tokens in each slot.
        params_LRS: parameters of the expert in each slot (its slice on the rank); 0 for one that computes nothing.
        hidden_size: width of the rows read and written, 2 bytes each.

    Source: the weight traffic of cold experts sets the time in decode (MegaBlocks, arXiv 2211.15841, section 5).
    Holds for: one kernel over all experts of a rank; tile padding is in the efficiency.
    """
    num_slots = load_LRS.shape[-1]
    params_LRS = np.broadcast_to(np.asarray(params_LRS, np.float64), load_LRS.shape)
    seconds_LR = np.empty(load_LRS.shape[:-1])
    _grouped_s(
        np.ascontiguousarray(load_LRS).reshape(-1, num_slots),
        np.ascontiguousarray(params_LRS).reshape(-1, num_slots),
        float(BYTES_PER_PARAM[weight_dtype]),
        4.0 * hidden_size,
        1 / (arithmetic_flops_per_s(device, weight_dtype) * efficiency(device, "grouped_gemm", bound)),
        1 / (device.memory.bytes_per_s * efficiency(device, "memory", bound)),
        seconds_LR.reshape(-1),
    )
    return seconds_LR


def attention_core_s(score_flops: Floats, num_bytes: Floats, device: Device, bound: str = "value") -> Floats:
    """Scores and weighted sum over the cache: the slower of arithmetic in 16 bits and reading keys and values.

    Source: FlashAttention (arXiv 2205.14135): nothing but q, k, v and the output moves.
    """
    return gemm_s(score_flops, num_bytes, device, "bf16", "attention", bound)
