"""Published deployments of wide expert parallelism: set-ups, and what was reported of them."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Setup:
    """One way of running DeepSeek-V3, and the throughput that was reported.

    Attributes:
        hardware: a machine, see `load_cluster`.
        phase: "prefill" or "decode".
        requests: of each rank.
        length: prompt tokens (prefill), or tokens in the cache (decode) of each request.
        routing: "even", or "routed": as in the trace.
        placement: a name of `PLACEMENTS`.
        redundant, shared_ranks: see `Layout`.
        overlap: whether two batches overlap.
        drafts, acceptance: see `Workload`.
        dtype: of weights and of what is sent to experts, where they are not the model's.
        per: ranks of one accelerator, as the throughput is reported.
        reported: tokens a second and accelerator; None where the value is not at hand.
        source: of the set-up and the value.
        fitted: whether the constants are fitted to this very value.
        note: what the set-up had that is not modelled.
    """

    name: str
    hardware: str
    phase: str
    requests: int
    length: int
    routing: str = "routed"
    placement: str = "eplb"
    redundant: int = 32
    shared_ranks: int = 0
    overlap: bool = True
    drafts: int = 0
    acceptance: float = 0.0
    dtype: str = ""
    per: int = 1
    reported: float | None = None
    source: str = ""
    fitted: bool = False
    note: str = ""


PROFILE = "DeepSeek's public profile data (github.com/deepseek-ai/profile-data)"
OVERVIEW = "DeepSeek-V3/R1 inference system overview (github.com/deepseek-ai/open-infra-index), a day's mean"
SGLANG = "SGLang on 96 H100 (lmsys.org, May 2025)"
CLOUD = "CloudMatrix-Infer (arXiv 2506.12708)"

_PREFILL_H800 = Setup(
    "DeepSeek profile, prefill EP32, 4K", "4 x hgx-h800", "prefill", 4, 4096, "even", "contiguous",
    reported=7839.0, source=PROFILE, fitted=True,
)  # fmt: skip
_DECODE_H800 = Setup(
    "DeepSeek profile, decode EP128, 128 at 4K", "16 x hgx-h800", "decode", 128, 4096, "even", "contiguous",
    redundant=0, reported=2324.0, source=PROFILE, fitted=True,
)  # fmt: skip
_SGLANG_PREFILL = Setup("SGLang, prefill EP32", "4 x hgx-h100", "prefill", 4, 4096, source=SGLANG)
_SGLANG_DECODE = Setup("SGLang, decode EP72, 256 at 2K", "9 x hgx-h100", "decode", 256, 2000, source=SGLANG)
_CLOUD_DECODE = Setup(
    "CloudMatrix384, decode EP320", "320 of cloudmatrix-384", "decode", 48, 4096, shared_ranks=32, drafts=1,
    acceptance=0.7, dtype="int8", per=2, source=CLOUD,
)  # fmt: skip
_CLOUD_PREFILL = Setup(
    "CloudMatrix384, prefill EP32, 4K", "32 of cloudmatrix-384", "prefill", 2, 4096, dtype="int8", per=2,
    source=CLOUD, note="there attention is cut by tokens and heads; here it is data-parallel",
)  # fmt: skip


def _sglang_prefills() -> list[Setup]:
    """16,384 tokens a rank in prompts of 1K, 2K and 4K; what each lever is worth is told at 4K."""
    base, found = _SGLANG_PREFILL, []
    for length, reported in ((1024, None), (2048, 52_300 / 8), (4096, 6288.0)):
        name = f"{base.name}, {length // 1024}K"
        found.append(replace(base, name=name, requests=16384 // length, length=length, reported=reported))
    last = found[-1]
    return [
        *found,
        replace(last, name=f"{last.name}, balanced", routing="even", placement="contiguous", reported=None),
        replace(last, name=f"{last.name}, not rebalanced", placement="contiguous", reported=None),
        replace(last, name=f"{last.name}, one batch", overlap=False, reported=None),
    ]


def _sglang_decodes() -> list[Setup]:
    base = _SGLANG_DECODE
    return [
        replace(base, reported=22_300 / 8),
        replace(base, name=f"{base.name}, balanced", routing="even", placement="contiguous"),
        replace(base, name=f"{base.name}, not rebalanced", placement="contiguous"),
        replace(base, name=f"{base.name}, one batch", overlap=False),
        replace(base, name="SGLang, decode EP72, 32 at 2K", requests=32),
        replace(base, name="SGLang, decode EP72, 32 at 2K, one batch", requests=32, overlap=False),
    ]


def _cloud() -> list[Setup]:
    prefill, decode = _CLOUD_PREFILL, _CLOUD_DECODE
    return [
        replace(prefill, reported=5655.0),
        replace(prefill, name=f"{prefill.name}, balanced", routing="even", placement="contiguous", reported=6688.0),
        replace(prefill, name=f"{prefill.name}, one batch", overlap=False),
        replace(prefill, name="CloudMatrix384, prefill EP32, 2K", requests=4, length=2048),
        replace(prefill, name="CloudMatrix384, prefill EP32, 1K", requests=8, length=1024),
        replace(decode, name=f"{decode.name}, 96 at 4K", reported=1943.0),
        replace(decode, name=f"{decode.name}, 96 at 4K, one batch", overlap=False),
        replace(decode, name=f"{decode.name}, 24 at 4K", requests=12),
        replace(decode, name=f"{decode.name}, 8 at 4K", requests=4, overlap=False, reported=538.0),
    ]


SETUPS = (
    _PREFILL_H800,
    _DECODE_H800,
    Setup(
        "DeepSeek production, prefill EP32, 4K", "4 x hgx-h800", "prefill", 4, 4096,
        reported=4026.0, source=OVERVIEW, note="full load here, a day's mean there",
    ),
    Setup(
        "DeepSeek production, decode EP144, 128 at 5K", "18 x hgx-h800", "decode", 128, 4989,
        reported=1850.0, source=OVERVIEW, note="full load here, a day's mean there",
    ),
    Setup(
        "DeepSeek-V3 report, decode EP320, 128 at 4K", "40 x hgx-h800", "decode", 128, 4096, shared_ranks=32,
        source="DeepSeek-V3 (arXiv 2412.19437), section 3.4.2: an expert a rank, 64 ranks of copies and shared experts",
    ),
    *_sglang_prefills(),
    *_sglang_decodes(),
    Setup(
        "SGLang GB200, decode EP48, 768 at 2K", "48 of gb200-nvl72", "decode", 768, 2000,
        reported=7583.0, source="SGLang on GB200 NVL72 (lmsys.org, June 2025)", note="the batch is not given there",
    ),
    *_cloud(),
)  # fmt: skip

BUS = (("dispatch", 7168 + 512, {8: 116e-6, 256: 152e-6}), ("combine", 2 * 7168, {8: 118e-6, 256: 149e-6}))
"""Operator, bytes of a row (int8 with its scales, bf16), and seconds reported on CloudMatrix384, by ranks."""

_PREFILL_4K, _DECODE_256, _DECODE_32 = (
    "SGLang, prefill EP32, 4K",
    "SGLang, decode EP72, 256 at 2K",
    "SGLang, decode EP72, 32 at 2K",
)
LEVERS = (
    ("rebalancing, prefill", _PREFILL_4K, "not rebalanced", "SGLang reports x1.49"),
    ("rebalancing, decode", _DECODE_256, "not rebalanced", "SGLang reports x2.54"),
    ("two batches, prefill", _PREFILL_4K, "one batch", "SGLang reports x1.27 to x1.35"),
    ("two batches, decode of 256", _DECODE_256, "one batch", ""),
    ("two batches, decode of 32", _DECODE_32, "one batch", ""),
    ("two batches, CloudMatrix384 prefill", "CloudMatrix384, prefill EP32, 4K", "one batch", "x1.23 to x1.31"),
    (
        "two batches, CloudMatrix384 decode of 96", "CloudMatrix384, decode EP320, 96 at 4K", "one batch",
        "x1.06 to x1.09",
    ),
)  # fmt: skip
"""What each lever is worth: the set-up with it, what is added to the name of the one without, and what was reported."""
