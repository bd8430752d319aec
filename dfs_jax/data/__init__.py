"""Data sets by name: `create(config)` and the list of what there is.

The contract that every data set fulfils is in `pipeline`; sets that fit in memory are served
by `in_memory`, larger ones by `streaming`, and both are augmented by `augment`. A module that
needs TensorFlow Datasets is imported only when its data set is asked for.
"""

import functools
from collections.abc import Callable

import ml_collections

from dfs_jax.config import ConfigError
from dfs_jax.data.augment.normalization import STATISTICS
from dfs_jax.data.pipeline import Data

__all__ = ["STATISTICS", "create", "names"]


def _digits(config: ml_collections.ConfigDict) -> Data:
    from dfs_jax.data.sets import digits

    return digits.load(config)


def _cifar(name: str, config: ml_collections.ConfigDict) -> Data:
    from dfs_jax.data.sets import cifar

    return cifar.load(config, name)


def _double_digits(task: str, config: ml_collections.ConfigDict) -> Data:
    from dfs_jax.data.sets import double_digits

    return double_digits.load(config, task)


def _imagenet(config: ml_collections.ConfigDict) -> Data:
    from dfs_jax.data.sets import imagenet

    return imagenet.load(config)


def _folder(config: ml_collections.ConfigDict) -> Data:
    from dfs_jax.data.sets import folder

    return folder.load(config)


def _named(config: ml_collections.ConfigDict) -> Data:
    from dfs_jax.data.sets import tfds

    return tfds.load(config)


_LOADERS: dict[str, Callable[[ml_collections.ConfigDict], Data]] = {
    "cifar10": functools.partial(_cifar, "cifar10"),
    "cifar100": functools.partial(_cifar, "cifar100"),
    "digits": _digits,
    "double_digits/clean": functools.partial(_double_digits, "clean"),
    "double_digits/hard": functools.partial(_double_digits, "hard"),
    "double_digits/units": functools.partial(_double_digits, "units"),
    "folder": _folder,
    "imagenet2012": _imagenet,
}
_TFDS = "tfds:"  # before the name of any other data set of TFDS


def names() -> tuple[str, ...]:
    """The data sets that `config.data.name` can choose, besides tfds:NAME for any of TFDS."""
    return tuple(sorted(_LOADERS))


def create(config: ml_collections.ConfigDict) -> Data:
    """The splits of data set `config.data.name`; `config` is the whole configuration.

    Prepares the data in `config.data.dir` where that has not been done and takes little time.
    Raises ConfigError for an unknown name and for fields of `config.data` that do not fit the
    data set, DataError for data that are not there or cannot be read.
    """
    name = config.data.name
    if name.startswith(_TFDS):
        return _named(config)
    if name not in _LOADERS:
        raise ConfigError(
            f"config.data.name: there is no data set {name!r}; known: {', '.join(names())}, and "
            f"{_TFDS}NAME for others of TFDS"
        )
    return _LOADERS[name](config)
