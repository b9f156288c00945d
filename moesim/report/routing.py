"""The statistics of a routing trace in the words of the field: tables for the terminal and the page, JSON, and notes.

`moesim.routing.statistics` measures; here each measure finds its heading and its label by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.report.tables import NONE, Cell, Row, Section, number
from moesim.routing.load import Floats, batches
from moesim.routing.reuse import decode_in_step, miss_ratios
from moesim.routing.trace import RoutingTrace

# heading, and what its last column holds
HEADINGS = {
    "Load balance": "shuffled tokens",
    "Distinct experts in a batch": "even routing",
    "From token to token": "by chance",
    "Expert cache, hit ratio": "shuffled tokens",
    "Within a token": "shuffled choices",
    "Between layers, top-1 experts": "shuffled tokens",
    "Prediction of later layers": "by popularity",
    "Topics and drift": "by chance",
}
_AHEAD = r"(?:_width_(?P<width>\d+))?(?:_horizon_(?P<horizon>\d+))?"
_LOAD, _DISTINCT, _TOKENS, _CACHE, _WITHIN, _BETWEEN, _PREDICTION, _TOPICS = HEADINGS
# pattern of a name -> heading, label; the groups of the pattern fill the label
MEASURES: Mapping[str, tuple[str, str]] = {
    r"load_skew_ratio": (_LOAD, "busiest expert / mean"),
    r"rank_imbalance_ratio_ep_(\d+)": (_LOAD, "busiest rank / mean, EP {0}, whole trace"),
    r"rank_imbalance_ratio_ep_(\d+)_batch_(\d+)": (_LOAD, "busiest rank / mean, EP {0}, batch {1}"),
    r"num_distinct_experts_batch_(\d+)": (_DISTINCT, "experts touched, batch {0}"),
    r"top1_repeat_rate": (_TOKENS, "top-1 repeats"),
    r"set_overlap_fraction": (_TOKENS, "experts shared with the previous token"),
    r"token_affinity_rate": (_TOKENS, "same top-1 for the same token elsewhere"),
    r"lru_hit_ratio_(\d+)_experts": (_CACHE, "LRU of {0} experts"),
    r"belady_hit_ratio_(\d+)_experts": (_CACHE, "Belady's MIN of {0} experts"),
    r"lru_hit_ratio_(\d+)_experts_batch_(\d+)": (_CACHE, "LRU of {0} experts, batch {1}"),
    r"belady_hit_ratio_(\d+)_experts_batch_(\d+)": (_CACHE, "Belady's MIN of {0} experts, batch {1}"),
    r"coactivation_information_bits": (_WITHIN, "co-activation, information per pair"),
    rf"layer_information_bits{_AHEAD}": (_BETWEEN, "mutual information, {horizon}"),
    rf"prediction_recall_fraction{_AHEAD}": (_PREDICTION, "gate on an earlier input, recall, {horizon}{width}"),
    rf"prediction_top1_hit_rate{_AHEAD}": (_PREDICTION, "gate on an earlier input, top-1, {horizon}"),
    rf"table_recall_fraction{_AHEAD}": (_PREDICTION, "transition table, recall, {horizon}{width}"),
    rf"table_top1_hit_rate{_AHEAD}": (_PREDICTION, "transition table, top-1, {horizon}"),
    r"request_information_bits": (_TOPICS, "mutual information, request and expert"),
    r"request_explained_fraction": (_TOPICS, "share of the choice that the request explains"),
    r"num_topics": (_TOPICS, "topics (groups of requests)"),
    r"topic_silhouette": (_TOPICS, "how well apart they are (silhouette)"),
    r"drift_within_requests_bits": (_TOPICS, "drift inside requests (Jensen-Shannon)"),
    r"drift_over_requests_bits": (_TOPICS, "drift from early to late requests"),
}
_PARTNER = re.compile(r"_by_(chance|popularity)$")


@dataclass(frozen=True, eq=False)
class Measured:
    """A trace, what was asked about it, and what `statistics` found."""

    trace: RoutingTrace
    measures: Mapping[str, Floats]
    ep: Sequence[int]
    batches: Sequence[int]

    @property
    def num_requests(self) -> int:
        """Requests of the trace."""
        return len(np.unique(self.trace.request_T))

    def cache_batches(self) -> Iterator[int | None]:
        """Ways to decode for which there is a cache curve: requests in turn (None), and the batches that fill."""
        yield None
        yield from (batch for batch in self.batches if batch > 1 and len(decode_in_step(self.trace, batch)))


def described(name: str) -> tuple[str, str]:
    """Heading and label of a measure.

    >>> described("lru_hit_ratio_8_experts_batch_4")
    ('Expert cache, hit ratio', 'LRU of 8 experts, batch 4')
    """
    for pattern, (heading, label) in MEASURES.items():
        match = re.fullmatch(pattern, name)
        if match:
            groups = match.groupdict()
            ahead = groups.get("horizon") or "1"
            words = "next layer" if ahead == "1" else f"{ahead} layers ahead"
            width = f", width {groups['width']}" if groups.get("width") else ""
            return heading, label.format(*match.groups(), horizon=words, width=width)
    raise KeyError(name)


def routing_sections(measured: Measured) -> list[Section]:
    """The measures under their headings: mean over layers, least, most, and the mean of the value beside."""
    rows: dict[str, list[Row]] = {heading: [] for heading in HEADINGS}
    for name, values in measured.measures.items():
        is_detail = "_width_" in name and "_horizon_" in name  # left to JSON and the page
        if _PARTNER.search(name) or is_detail or not np.isfinite(values).any():
            continue
        heading, label = described(name)
        beside = next((measured.measures[other] for other in _partners(name) if other in measured.measures), None)
        shown = [values.mean(), values.min(), values.max()] if len(values) > 1 else [values[0], math.nan, math.nan]
        shown.append(math.nan if beside is None else beside.mean())
        rows[heading].append(Row(label, tuple(Cell(_said(name, float(value))) for value in shown)))
    return [
        Section(heading, ("mean", "least", "most", beside), tuple(rows[heading]))
        for heading, beside in HEADINGS.items()
        if rows[heading]
    ]


def notes(measured: Measured) -> list[str]:
    """What the trace is too short for or does not hold, one sentence each."""
    trace, found = measured.trace, []
    if trace.origin != "trained":
        found.append(f"the router of this trace is {trace.origin}, not trained: its structure is not a model's")
    short = [batch for batch in measured.batches if not len(batches(trace, batch))]
    if short:
        sizes = ", ".join(map(str, short))
        found.append(f"no batch of {sizes}: the trace has {measured.num_requests} requests, one token of each per step")
    if not trace.is_decode_T.any():
        found.append(
            "no decode tokens: a batch is read from prompts, the n-th tokens together, and prompts of one template are "
            "more alike there than decoding is"
        )
    if trace.token_id_T is None:
        found.append("no token ids: whether a token decides its experts is not known")
    if measured.num_requests == 1:
        found.append("one request: no topics, no drift over requests, and no second request to judge a table on")
    lacking = [name for name in ("prediction_recall_fraction",) if np.isnan(measured.measures[name]).all()]
    if lacking and trace.num_layers > 1:
        found.append("no captured gate predictions: later layers are predicted from a transition table alone")
    return found


def routing_json(measured: Measured) -> dict[str, Any]:
    """Everything, complete per layer; null where the trace has not what a measure needs.

    `miss_ratio_curves` holds, for requests in turn and for each batch, the miss ratio by layer at 0, 1, ... E experts.
    """
    trace = measured.trace
    curves = {}
    for batch in measured.cache_batches():
        lru_LC, belady_LC = miss_ratios(trace, batch)
        name = "requests_in_turn" if batch is None else f"batch_{batch}"
        curves[name] = {"lru": _plain(lru_LC), "belady": _plain(belady_LC)}
    return {
        "trace": {
            "name": trace.name, "model": trace.model, "origin": trace.origin, "num_tokens": trace.num_tokens,
            "num_requests": measured.num_requests, "num_layers": trace.num_layers, "num_experts": trace.num_experts,
            "top_k": trace.top_k, "layers": list(trace.layers), "provenance": dict(trace.provenance),
        },
        "notes": notes(measured),
        "num_batches": {str(batch): len(batches(trace, batch)) for batch in measured.batches},
        "measures": {name: _plain(values) for name, values in measured.measures.items()},
        "miss_ratio_curves": curves,
    }  # fmt: skip


def title_of(trace: RoutingTrace) -> str:
    """One line about a trace."""
    shape = f"{trace.num_layers} MoE layers x {trace.num_experts} experts, top-{trace.top_k}"
    requests = len(np.unique(trace.request_T))
    return f"{trace.name}: {shape}; {trace.num_tokens:,} tokens of {requests:,} requests; router {trace.origin}"


def _partners(name: str) -> tuple[str, str]:
    return f"{name}_by_chance", f"{name}_by_popularity"


def _said(name: str, value: float) -> str:
    if math.isnan(value):
        return NONE
    if name.endswith(("_rate", "_fraction")) or "hit_ratio" in name or "_rate_" in name or "_fraction_" in name:
        return f"{100 * value:.1f} %"
    if "_bits" in name:
        return f"{value:.3f} bits"
    return f"{value:.0f}" if name == "num_topics" else number(value)


def _plain(values: NDArray[np.float64]) -> Any:
    """Nested lists; null for NaN."""
    plain = values.astype(object)
    plain[np.isnan(values)] = None
    return plain.tolist()
