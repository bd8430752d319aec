"""The configuration: fields, presets, the command line, and how a request is refused."""

from dfs_jax.config.errors import ConfigError
from dfs_jax.config.fields import default, scale_learning_rate, set_gradients, set_network
from dfs_jax.config.loader import differences, from_json, load, load_module, to_json
from dfs_jax.config.presets import apply_preset

__all__ = [
    "ConfigError",
    "apply_preset",
    "default",
    "differences",
    "from_json",
    "load",
    "load_module",
    "scale_learning_rate",
    "set_gradients",
    "set_network",
    "to_json",
]
