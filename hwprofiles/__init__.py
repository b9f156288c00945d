"""Hardware as TOML: devices/ are single parts, nodes/ are boxes of them; README.md tells the format."""
