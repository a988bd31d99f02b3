"""The sections of a configuration, one keyword-only dataclass each, by what they are about; `run_config.RunConfig` puts them together."""
