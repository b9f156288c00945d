"""Bytes on links: routes through a topology, fair shares of its links, and flows played until the last has arrived."""
