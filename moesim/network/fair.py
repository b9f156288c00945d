"""Max-min fair shares of links, and flows played until all have arrived. Compiled."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.network.routes import Routes

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def fair_rates(routes: Routes, bytes_per_s_K: Floats, active_F: NDArray[np.bool_] | None = None) -> Floats:
    """Max-min fair rate of each flow, bytes/s, [F]; 0 for flows that are not active, infinity for those without a link.

    No flow can have more without another that has as little or less having less still.

    Source: progressive filling (Bertsekas, Gallager, Data Networks, 1992, section 6.5.2).
    """
    active = np.ones(routes.num_flows, np.bool_) if active_F is None else active_F
    link_start_K, flow_X = routes.flows_of
    return _fill(routes.start_F, routes.link_X, link_start_K, flow_X, bytes_per_s_K, active)


@njit(cache=True)
def _fill(start_F: Ints, link_X: Ints, link_start_K: Ints, flow_X: Ints, bytes_per_s_K: Floats, active_F) -> Floats:  # type: ignore[no-untyped-def]
    """All links fill alike; those that are full first fix the rates of their flows, and so on."""
    num_flows, num_links = len(start_F) - 1, len(bytes_per_s_K)
    rate_F = np.zeros(num_flows)
    open_K = np.zeros(num_links, np.int64)
    left_K = bytes_per_s_K.copy()
    waits_F = active_F.copy()
    busy_J = np.empty(num_links, np.int64)  # links that still have flows without a rate
    num_busy = 0
    for link in range(num_links):
        for x in range(link_start_K[link], link_start_K[link + 1]):
            if waits_F[flow_X[x]]:
                open_K[link] += 1
        if open_K[link]:
            busy_J[num_busy] = link
            num_busy += 1
    for flow in range(num_flows):
        if waits_F[flow] and start_F[flow] == start_F[flow + 1]:
            rate_F[flow] = np.inf
            waits_F[flow] = False
    while num_busy:
        share = np.inf
        for j in range(num_busy):
            share = min(share, left_K[busy_J[j]] / open_K[busy_J[j]])
        limit = share * (1 + 1e-12)
        for j in range(num_busy):
            link = busy_J[j]
            if open_K[link] and left_K[link] <= limit * open_K[link]:
                for x in range(link_start_K[link], link_start_K[link + 1]):
                    flow = flow_X[x]
                    if waits_F[flow]:
                        waits_F[flow] = False
                        rate_F[flow] = share
                        for y in range(start_F[flow], start_F[flow + 1]):
                            open_K[link_X[y]] -= 1
                            left_K[link_X[y]] -= share
        kept = 0
        for j in range(num_busy):
            if open_K[busy_J[j]]:
                busy_J[kept] = busy_J[j]
                kept += 1
        num_busy = kept
    return rate_F


def play(routes: Routes, bytes_F: Floats, bytes_per_s_K: Floats, latency_s_K: Floats, tolerance: float = 0.0) -> Floats:
    """Seconds until each flow has arrived, all starting together, [F]: fair shares anew whenever flows end.

    A flow without bytes does not run, and takes no time.

    Args:
        tolerance: what ended flows leave is given to others only after so much of the time that the fullest link needs:
            0 is exact, 0.01 is at most so much too slow at each link, and far quicker for many sizes.
    """
    link_start_K, flow_X = routes.flows_of
    window_s = tolerance * link_bound_s(routes, bytes_F, bytes_per_s_K)
    done_F = _play(routes.start_F, routes.link_X, link_start_K, flow_X, bytes_per_s_K, bytes_F.astype(float), window_s)
    return np.where(bytes_F > 0, done_F + routes.sum_over(latency_s_K), 0.0)


def link_bound_s(routes: Routes, bytes_F: Floats, bytes_per_s_K: Floats) -> float:
    """Seconds that the fullest link needs for its bytes: no schedule of these flows ends before."""
    return float((routes.load(bytes_F) / bytes_per_s_K).max(initial=0.0))


@njit(cache=True)
def _play(start_F, link_X, link_start_K, flow_X, bytes_per_s_K, left_F, window_s: float):  # type: ignore[no-untyped-def]
    num_flows = len(left_F)
    done_F, now_s = np.zeros(num_flows), 0.0
    active_F = left_F > 0
    while active_F.any():
        rate_F = _fill(start_F, link_X, link_start_K, flow_X, bytes_per_s_K, active_F)
        soonest = np.inf
        for flow in range(num_flows):
            if active_F[flow]:
                soonest = min(soonest, left_F[flow] / rate_F[flow])
        step_s = max(soonest * (1 + 1e-12), window_s)
        for flow in range(num_flows):
            if active_F[flow]:
                needs_s = left_F[flow] / rate_F[flow]
                if needs_s <= step_s:
                    active_F[flow] = False
                    done_F[flow] = now_s + needs_s
                else:
                    left_F[flow] -= rate_F[flow] * step_s
        now_s += step_s
    return done_F
