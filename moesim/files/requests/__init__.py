"""Traffic from files: real logs, published lengths, client profiles, and moesim's own format."""
