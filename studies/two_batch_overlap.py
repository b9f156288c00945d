"""Two batches that overlap, in wide expert parallelism.

Question: when one half of a batch computes while the other one communicates, what is gained, and where is it a loss?

Setting: DeepSeek-V3 on H800, H100 and CloudMatrix384 as in `moesim validate wide-ep`, its two constants fitted to two
rows of DeepSeek's profile; routing is perfectly even, so that nothing but the overlap differs.

Lever: `policies.two_batch_overlap`, on against off.

Expected before the first run: a gain near what communication takes in prefill and in large decoding batches; a loss in
small ones, where the experts' weights are read twice and every kernel starts twice, so that a half costs as much as the
whole. Overlap is perfect here but for the cores that a collective holds, so gains should come out too large.

Cannot speak about: kernels that slow each other through memory, and hosts that cannot issue two batches in time.

Slow: a quarter of a minute of counting tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from moesim.files.models import load_model
from moesim.routing.synthetic import even_trace
from moesim.study import Claim
from moesim.validate.wide_ep import Prepared, fit
from moesim.validate.wide_ep_setups import SETUPS, Setup

SGLANG = "SGLang on 96 H100 (lmsys.org, May 2025)"
CLOUD = "CloudMatrix-Infer (arXiv 2506.12708), ablations"
BEYOND = "overlap is perfect here; attention cut by tokens and heads, whose exchanges do not hide, is not modelled"
"""Why CloudMatrix384's prefill gains more here than there."""
STARTS = (
    "here each half starts all its kernels one after the other, at an assumed 5 us and with the 4.2 fitted to H800 "
    "behind each; there attention and experts run side by side on cores of their own"
)
"""Why CloudMatrix384's decoding loses here."""


def gain_of() -> Callable[[str, int], float]:
    """Throughput of two batches over that of one, for a set-up by its name and so many requests of a rank."""
    model = load_model("deepseek-v3")
    ffn = model.experts
    even = even_trace(len(model.moe_layers), ffn.num_experts, ffn.top_k, ffn.num_groups, ffn.top_groups)
    known = {setup.name: replace(setup, routing="even", placement="contiguous") for setup in SETUPS}

    def prepared(setup: Setup) -> Prepared:
        return Prepared.of(setup, model, {"even": even})

    prefill, decode = (prepared(setup) for setup in SETUPS if setup.fitted)
    values = fit(prefill, decode)

    def gain(name: str, requests: int) -> float:
        base = replace(known[name], requests=requests)
        one, two = (prepared(replace(base, overlap=overlap)).price(values) for overlap in (False, True))
        return one / two

    return gain


def claims() -> list[Claim]:
    """Prefill, then decoding from large batches to small ones."""
    gain = gain_of()
    sglang, cloud = "SGLang, decode EP72, 256 at 2K", "CloudMatrix384, decode EP320, 96 at 4K"
    decoding = [(count, gain(sglang, count)) for count in (256, 128, 64, 32, 16)]
    return [
        Claim("prefill EP32 of 16,384 tokens a GPU, H100", SGLANG, "1.27 to 1.35",
              gain("SGLang, prefill EP32, 4K", 4), "ratio", 0.1),
        Claim("prefill EP32, CloudMatrix384", CLOUD, "1.23 to 1.31",
              gain("CloudMatrix384, prefill EP32, 4K", 2), "ratio", 0.1, because=BEYOND),
        *(
            Claim(f"decode EP320 of {count} an NPU, CloudMatrix384", CLOUD, paper,
                  gain(cloud, count // 2), "ratio", 0.1, because=because)
            for count, paper, because in ((64, 1.058, STARTS), (96, 1.094, STARTS), (128, 1.069, ""))
        ),
        Claim("decode EP72 of 256 a GPU gains, H100", SGLANG, "> 1", decoding[0][1], "ratio"),
        Claim("decode EP72 of 16 a GPU loses, H100", "what small batches lose is reported without a number", "< 1",
              decoding[-1][1], "ratio"),
        *(
            Claim(f"decode EP72 of {count} a GPU, H100", SGLANG, None, found, "ratio")
            for count, found in decoding[1:-1]
        ),
    ]  # fmt: skip
