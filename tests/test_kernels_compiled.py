"""What the real compiler makes of the kernels, for architectures that are not at hand; in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from triton_interpreter import needs_triton

pytestmark = needs_triton

#: Kernels that must use the matrix unit and load ahead of it.
PRODUCTS = {
    "grouped_gemm_kernel", "stream_weights_kernel", "grouped_gemm_fp8_kernel", "grouped_gemm_int4_kernel",
    "decode_attention_kernel",
}  # fmt: skip


def compiled(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run(
        [sys.executable, "-W", "error", "-m", "moesim.kernels.compiled", *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    return [json.loads(line) for line in said.stdout.splitlines()[1:]]


def check(rows):
    from moesim.kernels.compiled import SHARED_BYTES

    assert rows
    wrong = [
        (row["launch"], row["kernel"], row["capability"], why)
        for row in rows
        for why, is_so in (
            (f"spills {row['spill_bytes']} bytes", row["spill_bytes"] > 0),
            (f"{row['shared_bytes']} bytes shared", row["shared_bytes"] > SHARED_BYTES[row["capability"]]),
            ("no matrix instruction", row["kernel"] in PRODUCTS and not row["matrix_instructions"]),
            ("no asynchronous copy", row["kernel"] in PRODUCTS and not row["async_copies"]),
        )
        if is_so
    ]
    assert not wrong


def test_default_tiles_fit_hopper():
    rows = compiled("90", "grouped_gemm/bf16/128x128x64w8s3", "grouped_gemm_decode/bf16/16x64x128w4s4")
    check(rows)
    assert {row["kernel"] for row in rows} >= {"grouped_gemm_kernel", "stream_weights_kernel", "combine_kernel"}


def test_a_spill_is_seen():
    """A tile whose accumulators cannot fit the registers: 128 x 256 twice, on four warps."""
    code = (
        "from moesim.kernels import compiled, launches\n"
        "from moesim.kernels.tiles import Tile\n"
        "import torch\n"
        "with compiled.recording(80) as kernels:\n"
        "    launches.products(torch.bfloat16, Tile(128, 256, 32, 8, 4, 2), *launches.QWEN)\n"
        "rows = [compiled.describe('', 80, k) for k in kernels if k.metadata.name == 'grouped_gemm_kernel']\n"
        "print(rows[0].spill_bytes)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(said.stdout) > 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_every_candidate_fits_every_architecture(capability):
    rows = compiled(capability)
    check(rows)
    # Everything is compiled everywhere, but fp8 and the largest tile, which want 8.9 and 9.0.
    assert {row["kernel"] for row in rows} >= PRODUCTS - ({"grouped_gemm_fp8_kernel"} if capability == "80" else set())


def test_recording_refuses_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    said = subprocess.run(
        [sys.executable, "-m", "moesim.kernels.compiled", "90", "permute"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode != 0
    assert "TRITON_INTERPRET is set" in said.stderr
