"""Data sets by name: `create(config)` and the list of what there is.

The contract that every data set fulfils is in `pipeline`; sets that fit in memory are served
by `in_memory` and augmented by `augment`. A module that needs TensorFlow Datasets is imported
only when its data set is asked for.
"""

from collections.abc import Callable

import ml_collections

from dfs_jax.config import ConfigError
from dfs_jax.data.augment import STATISTICS
from dfs_jax.data.pipeline import Data

__all__ = ["STATISTICS", "create", "names"]


def _digits(config: ml_collections.ConfigDict) -> Data:
    from dfs_jax.data import digits

    return digits.load(config)


_LOADERS: dict[str, Callable[[ml_collections.ConfigDict], Data]] = {
    "digits": _digits,
}


def names() -> tuple[str, ...]:
    """The data sets that `config.data.name` can choose."""
    return tuple(sorted(_LOADERS))


def create(config: ml_collections.ConfigDict) -> Data:
    """The splits of data set `config.data.name`; `config` is the whole configuration.

    Prepares the data in `config.data.dir` where that has not been done. Raises ConfigError for
    an unknown name and for fields of `config.data` that do not fit the data set.
    """
    name = config.data.name
    if name not in _LOADERS:
        raise ConfigError(
            f"config.data.name: there is no data set {name!r}; known: {', '.join(names())}"
        )
    return _LOADERS[name](config)
