"""Routing traces that come with moesim; README.md says where each one is from."""
