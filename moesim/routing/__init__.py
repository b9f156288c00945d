"""Routing: the trace noun, its statistics, and compiled counting over it."""

from moesim.routing.trace import ORIGINS, RoutingTrace

__all__ = ["ORIGINS", "RoutingTrace"]
