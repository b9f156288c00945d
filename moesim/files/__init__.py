"""Files: the only reader of TOML, Hugging Face config.json and Parquet."""
