"""The method words, for configuration files that import them from here; see `config/presets.py`."""

from dfs_jax.config.presets import METHODS, SECOND_STAGES, Preset, imta, method, surgery

__all__ = ["METHODS", "SECOND_STAGES", "Preset", "imta", "method", "surgery"]
