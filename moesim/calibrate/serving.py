"""From runs to predicted seconds per output token: priced parts once, then arithmetic on the constants.

TPOT = (parts of a decode iteration, its drafts among them, times their factors + host overhead) / tokens per iteration
       + prefill factor x prefills per output token x parts of a prefill

The last term is for aggregated serving: in a closed loop every request that leaves makes room for one prompt, so that
a request sees as many prefills while it decodes as others decode beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesim.calibrate.parts import PARTS, Deployment, Kernels, Roofline, Step, iteration_parts
from moesim.costs.calibration import NAMES, Calibration, Floats
from moesim.files.hardware import load_cluster
from moesim.files.models import load_model
from moesim.files.runs import Run
from moesim.files.tables import raise_all
from moesim.hardware import Cluster
from moesim.model import BYTES_PER_PARAM, ModelSpec

SYSTEMS = {"a100_sxm": "dgx-a100", "h100_sxm": "hgx-h100", "h200_sxm": "hgx-h200", "b200_sxm": "hgx-b200",
           "gb200": "gb200-nvl72"}  # fmt: skip
"""Machines of runs, as presets; other names are taken for presets or paths themselves."""

MakeKernels = Callable[[Cluster, Run], Kernels]
_GAIN_TOKENS = 1024.0


@dataclass(frozen=True, eq=False)
class Priced:
    """Runs with the parts of their iterations, as arrays over N runs and P parts.

    Attributes:
        decode_NP, prefill_NP: seconds of the parts of a decode iteration (drafts included), and of one prefill.
        prefills_per_token_N: prefills that a request waits for, for each of its output tokens.
        num_drafts_N, output_tokens_N, spans_nodes_N, tpot_s_N: as in the runs; spans_nodes_N is 1.0 or 0.0.
    """

    runs: tuple[Run, ...]
    decode_NP: Floats
    prefill_NP: Floats
    prefills_per_token_N: Floats
    num_drafts_N: Floats
    output_tokens_N: Floats
    spans_nodes_N: Floats
    tpot_s_N: Floats

    def take(self, rows: Sequence[int] | np.ndarray) -> Priced:
        """Some of the runs."""
        rows = np.asarray(rows, np.int64)
        return Priced(
            tuple(self.runs[i] for i in rows), self.decode_NP[rows], self.prefill_NP[rows],
            self.prefills_per_token_N[rows], self.num_drafts_N[rows], self.output_tokens_N[rows],
            self.spans_nodes_N[rows], self.tpot_s_N[rows],
        )  # fmt: skip


def roofline_kernels(cluster: Cluster, run: Run) -> Kernels:
    """Kernels of the datasheet, whatever the run."""
    return Roofline(cluster)


def price_runs(runs: Sequence[Run], make_kernels: MakeKernels = roofline_kernels) -> Priced:
    """Price every run.

    Raises:
        ValueError: models or machines that are not known, or layouts that do not fit: all in one message.
    """
    models: dict[str, ModelSpec] = {}
    clusters: dict[tuple[str, int], Cluster] = {}
    mistakes: list[str] = []
    for run in runs:
        machine = run.system, run.dp * run.tp
        try:
            if run.model not in models:
                models[run.model] = load_model(run.model)
            if machine not in clusters:
                clusters[machine] = cluster_of(*machine)
        except ValueError as error:
            mistakes.append(str(error))
    raise_all("runs", list(dict.fromkeys(mistakes)))
    rows = []
    for run in runs:
        cluster = clusters[run.system, run.dp * run.tp]
        rows.append(_price(run, models[run.model], cluster, make_kernels(cluster, run)))
    decode, prefill, rate, spans = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Priced(
        tuple(runs), np.array(decode).reshape(-1, len(PARTS)), np.array(prefill).reshape(-1, len(PARTS)),
        np.array(rate),
        np.array([float(run.num_draft_tokens) for run in runs]),
        np.array([run.output_tokens * run.length_fraction for run in runs]), np.array(spans),
        np.array([run.tpot_s for run in runs]),
    )  # fmt: skip


def cluster_of(system: str, num_ranks: int) -> Cluster:
    """So many devices of a machine of `SYSTEMS`, or of a preset or path, on as many nodes as they take."""
    name = SYSTEMS.get(system, system)
    cluster = load_cluster(name)
    nodes = -(-num_ranks // cluster.devices_per_node)
    return cluster if nodes <= cluster.num_nodes else load_cluster(f"{nodes} x {name}")


def _price(run: Run, model: ModelSpec, cluster: Cluster, kernels: Kernels) -> tuple[Floats, Floats, float, float]:
    deployment = Deployment(quantised(model, run.expert_dtype), cluster, run.dp, run.tp, run.ep, run.etp, run.kv_dtype)
    prompt, output = run.prompt_tokens * run.length_fraction, run.output_tokens * run.length_fraction
    per_rank = run.concurrency / (run.num_instances * run.dp)
    if run.max_requests_per_rank is not None:
        per_rank = min(per_rank, float(run.max_requests_per_rank))
    per_rank = max(per_rank, 1.0)
    context, drafts = prompt + output / 2, run.num_draft_tokens
    decode = _array(iteration_parts(deployment, Step(per_rank * (1 + drafts), per_rank, context), kernels))
    if drafts:  # each draft is one pass of the small module: one layer, and the head
        decode += drafts * _array(iteration_parts(deployment, Step(per_rank, per_rank, context), kernels, num_layers=1))
    if run.is_disaggregated:
        return decode, np.zeros(len(PARTS)), 0.0, float(deployment.spans_nodes)
    prefill = _array(iteration_parts(deployment, Step(prompt, 1.0, prompt, is_prefill=True), kernels))
    return decode, prefill, (per_rank - 1 / run.dp) / output, float(deployment.spans_nodes)


def quantised(model: ModelSpec, expert_dtype: str) -> ModelSpec:
    """The model with its experts in another format; one of as many bits is a label for the model's own."""
    own = model.dtypes.experts
    if not expert_dtype or round(8 * BYTES_PER_PARAM[expert_dtype]) == round(8 * BYTES_PER_PARAM[own]):
        return model
    return replace(model, dtypes=replace(model.dtypes, experts=expert_dtype))


def _array(parts: dict[str, float]) -> Floats:
    return np.array([parts[name] for name in PARTS])


def predict_tpot_s(priced: Priced, values: Floats) -> Floats:
    """Predicted seconds per output token of each run, [N]; `values` in the order of `CONSTANTS`."""
    c = dict(zip(NAMES, values, strict=True))
    start_N = np.where(priced.spans_nodes_N > 0, c["internode_start_factor"], c["collective_start_factor"])
    factors = {
        "gemm": c["gemm_factor"], "attention": c["attention_factor"], "experts": c["experts_factor"],
        "collective": c["collective_factor"], "collective_start": start_N, "launch": c["launch_factor"],
    }  # fmt: skip
    decode_N, prefill_N = np.zeros(len(priced.runs)), np.zeros(len(priced.runs))
    for p, name in enumerate(PARTS):
        decode_N += factors[name] * priced.decode_NP[:, p]
        prefill_N += factors[name] * priced.prefill_NP[:, p]
    tokens_N = tokens_per_iteration(
        priced.num_drafts_N, priced.output_tokens_N, c["acceptance_rate"], c["acceptance_gain"]
    )
    waited_N = c["prefill_factor"] * priced.prefills_per_token_N * (prefill_N + c["iteration_overhead_s"])
    return np.asarray((decode_N + c["iteration_overhead_s"]) / tokens_N + waited_N)


def predict_with(calibration: Calibration, priced: Priced) -> tuple[Floats, Floats, Floats]:
    """Seconds per output token of runs, and the ends of their 90 % intervals, each [N]."""
    predicted_N = predict_tpot_s(priced, np.array([calibration.values[name] for name in NAMES]))
    return predicted_N, predicted_N * calibration.low_ratio, predicted_N * calibration.high_ratio


def tokens_per_iteration(num_drafts_N: Floats, output_tokens_N: Floats, rate: float, gain: float) -> Floats:
    """Mean tokens that an iteration brings: 1 + a + a^2 + ... + a^drafts, a the chance that a draft is accepted.

    Source: Leviathan, Kalman, Matias, arXiv 2211.17192, equation 1.

    >>> tokens_per_iteration(np.array([0.0, 1.0, 2.0]), np.array([1024.0]), 0.5, 0.1).tolist()
    [1.0, 1.5, 1.75]
    """
    doublings_N = np.maximum(np.log2(np.asarray(output_tokens_N) / _GAIN_TOKENS), 0.0)
    odds_N = rate / (1 - rate) * np.exp(gain * doublings_N / 3)
    accepted_N = odds_N / (1 + odds_N)
    return np.asarray((1 - accepted_N ** (np.asarray(num_drafts_N) + 1)) / (1 - accepted_N))
