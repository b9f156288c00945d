"""Collaborative compression (arXiv 2509.25689): DeepSeek-V3 pruned and quantized until it fits in 128 GB.

Question: does 103 GB of 1.3 TB come out of the parameters, why does no uniform width do, and how fast would it decode?

Setting: the packaged DeepSeek-V3; its plan of widths and pruned experts is not at hand, so it is taken by its size.
128 GB of memory hold the weights, a context of 4,096 tokens and 4 GiB for system and program. Decoding is bound by
memory: a token reads everything but the routed experts, and 8 experts of each layer, all as much compressed.

Lever: bits for each parameter; bandwidth of the memory.

Expected before the first run: sizes within a few percent. A uniform 1.56 bits does not fit beside cache and system.

Cannot speak about: quality; measured tokens a second, as none are published; which experts are pruned.
"""

from __future__ import annotations

from moesim.files.models import load_model
from moesim.study import Claim

MEMORY_BYTES, COMPRESSED_BYTES, UNIFORM_BITS = 128e9, 103e9, 1.56
CONTEXT, RUNTIME_BYTES = 4096, 4 * 2**30
MACHINES = {"two channels of DDR5-5600": 89.6e9, "256-bit LPDDR5X-8000": 256e9, "M-class Max, 546 GB/s": 546e9}
"""Machines with 128 GB that are sold -> bytes a second."""


def claims() -> list[Claim]:
    """Sizes, room, and decoding."""
    model = load_model("deepseek-v3")
    params = float(model.num_params)
    beside = model.kv_bytes_per_token * CONTEXT + RUNTIME_BYTES
    uniform = params * UNIFORM_BITS / 8
    bits = 8 * COMPRESSED_BYTES / params
    found = [
        Claim("in 16 bits", "sizes", 1.3e12, 2 * params, "bytes", 0.05),
        Claim("uniform 1.56 bits with cache and system over 128 GB", "uniform widths", "> 1",
              (uniform + beside) / MEMORY_BYTES, "ratio"),
        Claim("103 GB with cache and system over 128 GB", "sizes", "< 1", (COMPRESSED_BYTES + beside) / MEMORY_BYTES,
              "ratio"),
        Claim("bits for each parameter, pruned ones counted", "not at hand", None, bits, ""),
        Claim("widest uniform width that fits", "not at hand", None, 8 * (MEMORY_BYTES - beside) / params, ""),
    ]  # fmt: skip
    read = model.num_active_params * bits / 8 + model.kv_bytes_per_token * CONTEXT
    found += [
        Claim(f"decoding, {name}, three quarters of it reached", "not at hand", None, 0.75 * rate / read,
              "tokens_per_s")
        for name, rate in MACHINES.items()
    ]  # fmt: skip
    return found
