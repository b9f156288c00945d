"""Executor: which unit computes each expert that a layer needs? Decision: a plan of the layer, when the router is done.

An expert that the GPU computes and has not got is copied first; the order of copies is part of the plan. Units: "gpu",
"cpu", and "near", logic beside the memory that holds the experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.policies.view import Floats, Ids

GPU, CPU, NEAR = 0, 1, 2
UNITS = ("gpu", "cpu", "near")


@dataclass
class Work:
    """The experts that one layer needs, most tokens first.

    Attributes:
        ids, load: experts and their tokens, [N].
        is_here: bool [N], on the device; is_coming: bool [N], on its way there.
        gpu_s, cpu_s, near_s: seconds of each on each unit, [N]; infinite where there is no such unit.
        flops_per_byte: of one token for each byte of weights.
        copy_s: seconds of a copy of one expert to the device.
        cold_s: what the CPU's first expert of a burst takes longer.
        gpu_free_s, cpu_free_s, link_free_s: seconds from now until each of them has done what it has.
    """

    ids: Ids
    load: Ids
    is_here: NDArray[np.bool_]
    is_coming: NDArray[np.bool_]
    gpu_s: Floats
    cpu_s: Floats
    near_s: Floats
    copy_s: float
    flops_per_byte: float = 1.0
    cold_s: float = 0.0
    gpu_free_s: float = 0.0
    cpu_free_s: float = 0.0
    link_free_s: float = 0.0


@dataclass
class Plan:
    """unit_N: index in `UNITS` for each expert; copies: positions of those to be copied, first things first;
    deferred: positions of experts that the next layer need not wait for; shares: of an expert's bytes that each copy
    moves, all of them where it is empty."""

    unit_N: NDArray[np.int64]
    copies: list[int] = field(default_factory=list)
    deferred: frozenset[int] = frozenset()
    shares: Sequence[float] = ()


class Executor(Protocol):
    """A policy of this kind has no state of its own."""

    needs: ClassVar[str]
    """Unit beside the GPU that it cannot do without, "" for none."""
    numa_aware: ClassVar[bool]
    """Whether each socket computes what lies in its own memory."""
    whole_layers: ClassVar[bool]
    """Whether all of a layer is computed where its experts are."""
    near_attention: ClassVar[bool]
    """Whether the near-data unit attends to the caches of what is decoded."""

    def plan(self, work: Work) -> Plan:
        """Who computes what."""


def _copied(work: Work) -> list[int]:
    return np.flatnonzero(~(work.is_here | work.is_coming)).tolist()


@dataclass(frozen=True)
class _Plain:
    needs: ClassVar[str] = ""
    numa_aware: ClassVar[bool] = False
    whole_layers: ClassVar[bool] = False
    near_attention: ClassVar[bool] = False


@dataclass(frozen=True)
class OnDemand(_Plain):
    """Every missing expert is copied to the GPU, most tokens first. Source: mixtral-offloading (arXiv 2312.17238)."""

    def plan(self, work: Work) -> Plan:
        """All on the GPU."""
        return Plan(np.zeros(len(work.ids), np.int64), _copied(work))


@dataclass(frozen=True)
class BitPlanes(OnDemand):
    """Every missing expert is copied at the width that its tokens need, the hottest first: a token needs each width
    with a stated share, and n tokens the widest of theirs. An expert in the cache serves any width.

    Args:
        widths_B, shares_B: bits, ascending, and the share of tokens that need them; experts are stored with the most.

    Source: D2MoE (arXiv 2504.15299): nested planes, its shares for 2 to 4 bits. In `moesim.policies.planes` planes of
    one layer travel singly.
    """

    widths_B: tuple[float, ...] = (2.0, 3.0, 4.0)
    shares_B: tuple[float, ...] = (0.3, 0.4, 0.3)

    def plan(self, work: Work) -> Plan:
        """All on the GPU; expected widest: sum over b of w_b (S_b^n - S_(b-1)^n), S the shares added up."""
        copies = _copied(work)
        upto_NB = np.cumsum((0.0, *self.shares_B)) ** work.load[copies][:, None]
        bits_N = np.diff(upto_NB, axis=1) @ np.array(self.widths_B)
        return Plan(np.zeros(len(work.ids), np.int64), copies, shares=(bits_N / self.widths_B[-1]).tolist())


@dataclass(frozen=True)
class NearAttention(OnDemand):
    """All experts on the GPU; the near-data unit attends to the caches. Source: AttAcc (ASPLOS 2024), as Duplex (arXiv
    2409.01141) says of it.
    """

    needs: ClassVar[str] = "near"
    near_attention: ClassVar[bool] = True


@dataclass(frozen=True)
class CPUOnly(_Plain):
    """Every missing expert is computed by the CPU; nothing is copied. Source: llama.cpp, experts in host memory."""

    needs: ClassVar[str] = "cpu"

    def plan(self, work: Work) -> Plan:
        """Misses on the CPU."""
        return Plan(np.where(work.is_here | work.is_coming, GPU, CPU))


@dataclass(frozen=True)
class CPULayers(CPUOnly):
    """Layers whose experts are not on the device are computed by the CPU whole. Source: llama.cpp, --n-gpu-layers."""

    whole_layers: ClassVar[bool] = True


@dataclass(frozen=True)
class Fiddler(_Plain):
    """A missing expert is copied if that and the GPU are faster than the CPU at its tokens.

    Source: Fiddler (arXiv 2402.07033), algorithm 1.
    """

    needs: ClassVar[str] = "cpu"

    def plan(self, work: Work) -> Plan:
        """Each expert by itself."""
        absent = ~(work.is_here | work.is_coming)
        on_cpu = absent & (work.cpu_s <= work.copy_s + work.gpu_s)
        return Plan(np.where(on_cpu, CPU, GPU), np.flatnonzero(absent & ~on_cpu).tolist())


@dataclass(frozen=True)
class KTransformers(CPUOnly):
    """Misses on the CPU, some of which the next layer does not wait for.

    deferred: share of the CPU's experts that end during the next layer, those with the least tokens; 0 for none.
    Source: kTransformers (SOSP 2025), expert deferral.
    """

    numa_aware: ClassVar[bool] = True
    deferred: float = 0.0

    def plan(self, work: Work) -> Plan:
        """The CPU's last experts are deferred."""
        plan = CPUOnly.plan(self, work)
        on_cpu = np.flatnonzero(plan.unit_N == CPU)
        kept = len(on_cpu) - int(self.deferred * len(on_cpu))
        return Plan(plan.unit_N, deferred=frozenset(on_cpu[kept:].tolist()))


@dataclass(frozen=True)
class KTransformersDeferred(KTransformers):
    """The same with half of them deferred."""

    deferred: float = 0.5


@dataclass(frozen=True)
class HybriMoE(_Plain):
    """GPU, CPU and link are played ahead, the one that is free first choosing: the GPU its expert with most tokens,
    the CPU the missing one with fewest and then the GPU's with fewest, the link the missing one with most.

    A choice of CPU or link that would end later than without it is not made.
    Source: HybriMoE (arXiv 2504.05897), section IV-B.
    """

    needs: ClassVar[str] = "cpu"

    def plan(self, work: Work) -> Plan:
        """As the play-ahead has it."""
        unit_N, copied_N, _ = schedule(
            work.is_here | work.is_coming, work.gpu_s, work.cpu_s, work.copy_s, work.cold_s,
            work.gpu_free_s, work.cpu_free_s, work.link_free_s,
        )  # fmt: skip
        order = np.argsort(copied_N, kind="stable")
        return Plan(unit_N, [int(n) for n in order if copied_N[n] < np.inf])


@njit(cache=True)
def schedule(is_here_N, gpu_N, cpu_N, copy_s, cold_s, gpu_free_s, cpu_free_s, link_free_s):  # type: ignore[no-untyped-def]
    """The play-ahead of `HybriMoE`, over experts in the order of their tokens, most first.

    Returns:
        the unit of each expert, when its copy begins (infinite for none), and when all have ended.
    """
    num = len(gpu_N)
    unit_N, copied_N = np.full(num, -1, np.int64), np.full(num, np.inf)
    arrives_N = np.where(is_here_N, 0.0, np.inf)
    gpu, cpu, link, cold = gpu_free_s, cpu_free_s, link_free_s, cold_s
    gpu_left, cpu_left = gpu_N[is_here_N].sum(), cpu_N[~is_here_N].sum()  # what each has to do if nobody helps it
    for _ in range(2 * num):
        missing, lightest, stolen, first, when = -1, -1, -1, -1, np.inf
        for n in range(num):
            if unit_N[n] >= 0:
                continue
            if arrives_N[n] == np.inf:
                lightest = n
                missing = n if missing < 0 else missing
            else:
                stolen = n if arrives_N[n] == 0.0 else stolen
                if max(arrives_N[n], gpu) < when:
                    first, when = n, max(arrives_N[n], gpu)
        link_at = cpu_at = np.inf
        if missing >= 0 and max(link + copy_s, gpu + gpu_left) + gpu_N[missing] < cpu + cold + cpu_left:
            link_at = link
        if lightest >= 0 or (stolen >= 0 and cpu + cold + cpu_N[stolen] <= gpu + gpu_left):
            cpu_at = cpu
        if cpu_at < np.inf and cpu_at <= min(link_at, when):
            taken = lightest if lightest >= 0 else stolen
            unit_N[taken] = 1
            cpu += cold + cpu_N[taken]
            cold = 0.0
            if lightest >= 0:
                cpu_left -= cpu_N[taken]
            else:
                gpu_left -= gpu_N[taken]
        elif link_at < np.inf and link_at <= when:
            copied_N[missing] = link
            link += copy_s
            arrives_N[missing] = link
            cpu_left -= cpu_N[missing]
            gpu_left += gpu_N[missing]
        elif first >= 0:
            unit_N[first] = 0
            gpu = when + gpu_N[first]
            gpu_left -= gpu_N[first]
        else:
            break
    return unit_N, copied_N, max(gpu, cpu if (unit_N == 1).any() else 0.0)


@njit(cache=True)
def savings(is_here_N, gpu_N, cpu_N, copy_s, cold_s, gpu_free_s, cpu_free_s, link_free_s):  # type: ignore[no-untyped-def]
    """Seconds that a layer would be shorter with one more expert on the device, for each missing one, [N]."""
    base = schedule(is_here_N, gpu_N, cpu_N, copy_s, cold_s, gpu_free_s, cpu_free_s, link_free_s)[2]
    saved_N = np.zeros(len(gpu_N))
    here_N = is_here_N.copy()
    for n in range(len(gpu_N)):
        if not is_here_N[n]:
            here_N[n] = True
            there = schedule(here_N, gpu_N, cpu_N, copy_s, cold_s, gpu_free_s, cpu_free_s, link_free_s)[2]
            saved_N[n] = base - there
            here_N[n] = False
    return saved_N


def look_up(gpu_N: Floats, near_N: Floats) -> NDArray[np.bool_]:
    """Which experts, most tokens first, move to the near-data unit: the last, as many as make the layer shortest.

    >>> look_up(np.array([3.0, 3.0, 3.0]), np.array([6.0, 2.0, 1.0])).tolist()
    [False, True, True]
    """
    on_gpu = np.concatenate([[0.0], np.cumsum(gpu_N)])  # with the first 0 ... N on the GPU
    on_near = np.concatenate([np.cumsum(near_N[::-1])[::-1], [0.0]])
    kept = len(gpu_N) - int(np.maximum(on_gpu, on_near)[::-1].argmin())
    return np.asarray(np.arange(len(gpu_N)) >= kept)


def _shared(unit_N: NDArray[np.int64], work: Work) -> Plan:
    """The units, and copies of what the GPU lacks (nothing, where both read one memory)."""
    return Plan(unit_N, np.flatnonzero((unit_N == GPU) & ~(work.is_here | work.is_coming)).tolist())


@dataclass(frozen=True)
class LookUp(_Plain):
    """GPU and near-data unit read one memory, and nothing is copied: experts with the fewest tokens go to the near-data
    unit, by a table of seconds. Source: Duplex (arXiv 2409.01141), section V-B, expert co-processing.
    """

    needs: ClassVar[str] = "near"
    near_attention: ClassVar[bool] = True

    def plan(self, work: Work) -> Plan:
        """See `look_up`."""
        return _shared(np.where(look_up(work.gpu_s, work.near_s), NEAR, GPU), work)


@dataclass(frozen=True)
class OpPerByte(_Plain):
    """A whole layer on the unit that fits its FLOP per byte: the near-data one up to `ridge`.

    Source: Duplex (arXiv 2409.01141), section IV.
    """

    needs: ClassVar[str] = "near"
    near_attention: ClassVar[bool] = True
    ridge: float = 16.0

    def plan(self, work: Work) -> Plan:
        """By the mean tokens of an expert."""
        is_near = work.load.mean() * work.flops_per_byte <= self.ridge
        return _shared(np.full(len(work.ids), NEAR if is_near else GPU), work)


@dataclass(frozen=True)
class NearOnly(OpPerByte):
    """All experts on the near-data unit. Source: Bank-PIM, as Duplex (arXiv 2409.01141) compares with."""

    ridge: float = np.inf


@dataclass(frozen=True)
class HotCold(_Plain):
    """Hot experts are copied to the GPU, cold ones are computed beside their memory, to which their tokens travel; as
    many are hot as make the layer shortest: max(sum of hot (copy), + the last on the GPU; sum of cold).

    Where both sides are bound by bandwidth, that is H = E B_link / (B_link + B_near) of E active experts.
    Source: MoNDE (arXiv 2405.18832), section 3; the rule itself could not be read, this is what balance asks for.
    """

    needs: ClassVar[str] = "near"

    def plan(self, work: Work) -> Plan:
        """Hottest first."""
        absent = np.flatnonzero(~(work.is_here | work.is_coming))
        copied = np.arange(len(absent) + 1) * work.copy_s
        copied[1:] += work.gpu_s[absent]
        cold = np.concatenate([np.cumsum(work.near_s[absent][::-1])[::-1], [0.0]])
        hot = int(np.maximum(copied, cold).argmin())
        unit_N = np.full(len(work.ids), GPU)
        unit_N[absent[hot:]] = NEAR
        return Plan(unit_N, absent[:hot].tolist())


EXECUTORS: Mapping[str, type[Any]] = {
    "on_demand": OnDemand,
    "bit_planes": BitPlanes,
    "cpu_only": CPUOnly,
    "cpu_layers": CPULayers,
    "fiddler": Fiddler,
    "ktransformers": KTransformers,
    "ktransformers_deferred": KTransformersDeferred,
    "hybrimoe": HybriMoE,
    "look_up": LookUp,
    "op_per_byte": OpPerByte,
    "near_only": NearOnly,
    "near_attention": NearAttention,
    "hot_cold": HotCold,
}
