"""Dispatch and combine: the seconds of a layer's all-to-alls, by each rank's ports or by flows on the topology."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moesim.costs import network
from moesim.hardware import Cluster
from moesim.network.routes import Fabric
from moesim.network.sends import Schedule, Sends, seconds
from moesim.policies.collective import ALL_TO_ALLS, Ranks, TokenTraffic, reverse
from moesim.routing.counting import Counts

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Exchange:
    """How tokens reach their experts and come back.

    Attributes:
        algorithm: a name of `ALL_TO_ALLS`.
        is_routed: whether messages are flows on the links of the topology, rather than bytes at each rank's ports.
        is_played: of flows: whether they share links until the last has arrived; else the fullest link decides.
        slowed: links that are slow or down, see `Fabric`.
    """

    cluster: Cluster
    algorithm: str = "flat"
    is_routed: bool = False
    is_played: bool = False
    slowed: Mapping[tuple[str, str] | str, float] = field(default_factory=dict)

    @cached_property
    def _fabric(self) -> Fabric:
        return Fabric(self.cluster, dict(self.slowed))

    @property
    def sm_fraction(self) -> float:
        """Share of the device's cores that are kept from computing while messages move."""
        return float(ALL_TO_ALLS[self.algorithm].sm_fraction)

    def seconds_LR(self, counts: Counts, token_bytes: float, bound: str, is_back: bool) -> Floats:
        """Seconds of each layer's dispatch, or combine, on each rank, without the time to start it.

        Args:
            token_bytes: of one token's row.
            is_back: whether it is the combine.
        """
        reached = ALL_TO_ALLS[self.algorithm].reached
        if not self.is_routed:
            return network.all_to_all_s(counts.traffic_CLR, token_bytes, self.cluster, bound, reached)
        near, far = network.reached_fractions(self.cluster, bound, reached)
        if counts.source_B is None or counts.target_LBK is None:
            raise ValueError("flows need the ranks of every token's choices; count with targets")
        ranks = Ranks(self.cluster.num_ranks, self.cluster.devices_per_node)
        source_B = counts.source_B.astype(np.int64)
        found_L = [
            self._flows_s(TokenTraffic.of(ranks, source_B, target_BK, token_bytes), near, far, is_back)
            for target_BK in counts.target_LBK
        ]
        return np.repeat(np.array(found_L)[:, None], ranks.num_ranks, axis=1)

    def _flows_s(self, traffic: TokenTraffic, near: float, far: float, is_back: bool) -> float:
        """A layer's rounds: one after another, or as long as the longest where they are pipelined."""
        algorithm = ALL_TO_ALLS[self.algorithm]()
        schedule: Schedule = algorithm.dispatch(traffic)
        node_R = np.append(traffic.ranks.node_R, np.arange(traffic.ranks.num_nodes))
        rounds = [
            Sends(s.source_F, s.target_F, s.bytes_F / np.where(node_R[s.source_F] == node_R[s.target_F], near, far))
            for s in (reverse(schedule) if is_back else schedule)
        ]
        taken = seconds(rounds, self._fabric, is_played=self.is_played)
        return max(taken) if getattr(algorithm, "is_pipelined", False) else sum(taken)
