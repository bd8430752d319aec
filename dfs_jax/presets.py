"""The words of `config/presets.py`, where configuration files written before it import them."""

from dfs_jax.config.presets import METHODS, SECOND_STAGES, Preset, imta, method, surgery

__all__ = ["METHODS", "SECOND_STAGES", "Preset", "imta", "method", "surgery"]
