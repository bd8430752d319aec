"""The networks. `create_model` makes one by name; `multi_exit.py` is the contract they share."""

from dfs_jax.models.multi_exit import ExitOutputs, MultiExit
from dfs_jax.models.registry import create_model, names, options
