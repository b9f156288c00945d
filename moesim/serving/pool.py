"""A pool: instances of one kind, what a router sees of them, and who gets a request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.policies.router import ROUTERS, Arrival, RouterView, expert_votes
from moesim.requests import Requests
from moesim.routing.streams import Streams, clusters
from moesim.routing.trace import RoutingTrace
from moesim.serving.advance import prefix_tokens, tokens_at
from moesim.serving.instance import Instance

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_NEED_TOKENS = ("least_tokens", "kv_aware", "oracle_least_work")


class Pool:
    """Instances that share a router, which sees each as it is.

    Args:
        votes_CD: pairs that a prompt of each cluster of the trace is believed to have at each data-parallel group;
            cluster_Q: of each request. Both None where no router asks.

    Attributes:
        coming_XID: what is on its way to each group: requests, tokens of their prompts, tokens of their answers.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        requests: Requests,
        router: str,
        random: np.random.Generator,
        votes_CD: Floats | None = None,
        cluster_Q: Ints | None = None,
    ) -> None:
        self.instances, self._requests, self._needs_tokens = instances, requests, router in _NEED_TOKENS
        rules, shape = instances[0].rules, (len(instances), instances[0].engine.data_parallel_size)
        self.view = RouterView.idle(*shape, rules.num_blocks * rules.block_size)
        self.view.work_tokens_ID = np.zeros(shape, np.int64)
        self.view.cached_tokens = self._cached_tokens
        self.coming_XID = np.zeros((3, *shape), np.int64)
        if votes_CD is not None and cluster_Q is not None:
            self.view.votes = lambda q: np.broadcast_to(votes_CD[cluster_Q[q]], shape)
        self._choose = ROUTERS[router]().start(self.view, random)

    def pick(self, q: int) -> tuple[Instance, int]:
        """Which instance of the pool, and which group of it, gets a request; some instance must be up."""
        arrival = Arrival(q, int(self._requests.prompt_Q[q]), int(self._requests.topic_Q[q]))
        i, group = divmod(self._choose(arrival), self.view.waiting_ID.shape[1])
        return self.instances[i], group

    def see(self, instance: Instance) -> None:
        """See an instance as it is."""
        i, view, groups = instance.number - self.instances[0].number, self.view, instance.groups
        view.waiting_ID[i], view.running_ID[i] = groups.waiting_D + self.coming_XID[0, i], groups.num_D
        if self._needs_tokens:
            tokens_at(instance.bundle, view.waiting_tokens_ID[i], view.kv_tokens_ID[i], view.work_tokens_ID[i])
            view.kv_tokens_ID[i] += self.coming_XID[1, i]
            view.work_tokens_ID[i] += self.coming_XID[2, i]

    def expect(self, q: int, instance: Instance, group: int, times: int = 1) -> None:
        """A request whose prompt was computed elsewhere is on its way to a group; -1 times: it no longer is."""
        i, view = instance.number - self.instances[0].number, self.view
        requests = self._requests
        one_X = np.array([1, int(requests.prompt_Q[q]), int(requests.output_Q[q])]) * times
        self.coming_XID[:, i, group] += one_X
        view.waiting_ID[i, group] += one_X[0]
        if self._needs_tokens:
            view.kv_tokens_ID[i, group] += one_X[1]
            view.work_tokens_ID[i, group] += one_X[2]

    def _cached_tokens(self, q: int) -> Ints:
        found_ID = np.zeros(self.view.waiting_ID.shape, np.int64)
        for i, instance in enumerate(self.instances):
            if instance.rules.has_prefixes:
                prefix_tokens(instance.bundle, q, found_ID[i])
        return found_ID


def cluster_votes(trace: RoutingTrace, streams: Streams, instance: Instance) -> tuple[Floats, Ints]:
    """History for `ExpertAware`: pairs of a mean token of each cluster of the trace at each group, and each request's.

    A group is where an expert's first copy lies, as the experts were placed at the start.
    """
    names, cluster_N = np.unique(trace.request_T), clusters(trace)
    prices, num_groups = instance.prices, instance.engine.data_parallel_size
    home_LE = (prices.place_LXE[:, 0] >> np.uint64(32)).astype(np.int64) // max(len(prices.base_R) // num_groups, 1)
    cluster_T = cluster_N[np.searchsorted(names, trace.request_T)]
    votes_CD = np.zeros((int(cluster_N.max()) + 1, num_groups))
    for cluster in range(len(votes_CD)):
        ids_TLK = trace.expert_ids_TLK[cluster_T == cluster]
        load_LE = np.stack(
            [np.bincount(ids_TLK[:, layer].ravel(), minlength=trace.num_experts) for layer in range(trace.num_layers)]
        )
        votes_CD[cluster] = expert_votes(load_LE / max(len(ids_TLK), 1), home_LE, num_groups)
    return votes_CD, cluster_T[streams.prompt_row_Q]
