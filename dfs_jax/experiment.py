"""The choices of a configuration made into objects: network, objective, gradient method.

Everything here is cheap and checks its values, so that a command can refuse a configuration
before it prepares data or compiles anything. The optimizer is made in `optim.py`, the data in
`data/`, the mesh in `sharding.py`.
"""

import ml_collections
import numpy as np

from dfs_jax import gradients, models
from dfs_jax.config import ConfigError
from dfs_jax.gradients import GradientMethod
from dfs_jax.models import MultiExit
from dfs_jax.objectives import Objective
from dfs_jax.surgery import Surgery

PRECISIONS = ("float32", "bfloat16", "float64")


def network(config: ml_collections.ConfigDict, num_classes: int) -> MultiExit:
    """The configured network. Raises ConfigError for an unknown name or bad values."""
    if config.train.precision not in PRECISIONS:
        raise ConfigError(
            f"train.precision must be one of {', '.join(PRECISIONS)}, "
            f"got {config.train.precision!r}"
        )
    options = config.model.options.to_dict()
    with _refusals():
        return models.create_model(
            config.model.name,
            num_classes=num_classes,
            surgery=Surgery(**config.surgery.to_dict()),
            dtype=np.dtype(_dtype(config.train.precision)),
            **options,
        )


def objective(config: ml_collections.ConfigDict, num_exits: int) -> Objective:
    """The configured losses for a network of `num_exits`. Raises ConfigError for bad values."""
    with _refusals():
        chosen = Objective(**config.objective.to_dict())
        chosen.check(num_exits)
    return chosen


def method(config: ml_collections.ConfigDict) -> GradientMethod:
    """The configured gradient method. Raises ConfigError for an unknown name or bad values."""
    with _refusals():
        return gradients.create(config.gradients.name, **config.gradients.options.to_dict())


def _dtype(precision: str):
    import ml_dtypes  # numpy's own types lack bfloat16

    return ml_dtypes.bfloat16 if precision == "bfloat16" else precision


class _refusals:
    """Turns the ValueErrors of the constructors into ConfigErrors."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, (ValueError, TypeError)) and not isinstance(error, ConfigError):
            raise ConfigError(str(error)) from error
