"""Models that come with the package, one TOML file each: facts, published counts, sources."""
