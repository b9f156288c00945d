"""Device files against a second reading of the datasheets: the system files of NVIDIA's aiconfigurator."""

import re
from pathlib import Path

import pytest

from moesim.files.hardware import load_device

SYSTEMS = Path(__file__).parents[2] / "shared" / "data" / "kernels_aiconfigurator" / "systems"
TWINS = {
    "a100-sxm-80gb": "a100_sxm",
    "h100-sxm-80gb": "h100_sxm",
    "h100-pcie-80gb": "h100_pcie",
    "h200-sxm-141gb": "h200_sxm",
    "b200-sxm-180gb": "b200_sxm",
    "gb200-186gb": "gb200",
    "l40s": "l40s",
    "l4": "l4",
    "rtx-pro-6000": "rtx_pro_6000_server",
}


@pytest.mark.skipif(not SYSTEMS.is_dir(), reason="the shared data folder is not beside the checkout")
@pytest.mark.parametrize("name", TWINS)
def test_numbers_agree_with_a_second_reading(name):
    text = (SYSTEMS / f"{TWINS[name]}.yaml").read_text()
    theirs = {key: float(value) for key, value in re.findall(r"^  (\w+): ([\d.e+]+)", text, re.M)}
    ours = load_device(name)
    # Theirs is the server edition, counted at the clock they saw; ours the workstation edition at its boost clock.
    clock = 2617 / 2430 if name == "rtx-pro-6000" else 1.0
    assert ours.memory.bytes_per_s == pytest.approx(theirs["mem_bw"], rel=0.03)
    assert ours.memory.capacity_bytes == pytest.approx(theirs["mem_capacity"], rel=0.08)
    assert ours.flops_per_s["bf16"] == pytest.approx(theirs["bfloat16_tc_flops"] * clock, rel=0.03)
    if "fp8" in ours.flops_per_s and theirs.get("fp8_tc_flops"):
        assert ours.flops_per_s["fp8"] == pytest.approx(theirs["fp8_tc_flops"] * clock, rel=0.03)
