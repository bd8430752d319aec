"""The configuration: fields, files, presets, the command line, and how a request is refused.

What configuration files and most modules need is here by name; words for presets are in `presets`,
what the commands share in `command`.
"""

from dfs_jax.config.errors import ConfigError, refusals
from dfs_jax.config.fields import default, scale_learning_rate, set_gradients, set_network
from dfs_jax.config.loader import (
    differences,
    from_json,
    load,
    load_module,
    refusing_mistakes,
    to_json,
)
from dfs_jax.config.presets import apply_preset
