"""Instances that serve: compiled scheduling, KV blocks and pricing, iteration by iteration."""
