"""Data sets by name: `create(config)`, and what is known of each without preparing it.

The contract that every data set fulfils is in `pipeline.py`. Its file in `sets/` hands arrays to
`input/in_memory.py` or records to `input/streamed.py`; both augment by what is in `augment/`.
"""

import importlib
from collections.abc import Callable

import ml_collections

from dfs_jax.config import ConfigError
from dfs_jax.data import pipeline
from dfs_jax.data.pipeline import Data
from dfs_jax.data.record import Record


def _load(module: str) -> Callable[..., Data]:
    """`load` of a module of sets/, imported when called: most of them need TensorFlow Datasets."""
    return lambda *given: importlib.import_module(f"dfs_jax.data.sets.{module}").load(*given)


_LOADERS: dict[str, Callable[..., Data]] = {
    "cifar10": _load("cifar"),
    "cifar100": _load("cifar"),
    "digits": _load("digits"),
    "double_digits/clean": _load("double_digits"),
    "double_digits/hard": _load("double_digits"),
    "double_digits/units": _load("double_digits"),
    "fashion_mnist": _load("fashion_mnist"),
    "folder": _load("folder"),
    "imagenet2012": _load("imagenet"),
}
# Words before the name of any other data set of TFDS, and before a folder of IDX files.
_TFDS, _IDX = "tfds:", "idx:"
_RECORDED = (
    "folder",
    "imagenet2012",
)  # whose `load` also takes what the run has noted, as that of tfds:NAME

# Shape of the images, ImageNet's as they are usually cropped, and number of classes.
KNOWN: dict[str, tuple[tuple[int, int, int], int]] = {
    "digits": ((8, 8, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "double_digits/clean": ((32, 32, 3), 100),
    "double_digits/hard": ((32, 32, 3), 100),
    "double_digits/units": ((32, 32, 3), 10),
    "imagenet2012": ((224, 224, 3), 1000),
}


def names() -> tuple[str, ...]:
    """The data sets that `config.data.name` can choose, besides tfds:NAME and idx:DIR."""
    return tuple(sorted(_LOADERS))


def create(config: ml_collections.ConfigDict, known: Record | None = None) -> Data:
    """The splits of data set `config.data.name`; `config` is the whole configuration.

    Prepares the data in `config.data.dir` where that has not been done and takes little time.
    `known` is what the run has noted of them before: which files it holds out, what was measured;
    `record.OF_BEFORE` for a run that noted nothing. Whether the data are still those is for the
    caller to compare. Raises ConfigError for an unknown name and for fields of `config.data` that
    do not fit the data set, DataError for data that are not there or cannot be read.
    """
    name = config.data.name
    if name.startswith(_TFDS):
        return _load("tfds_by_name")(config, known)
    if name.startswith(_IDX):
        return _load("idx")(config)
    if name not in _LOADERS:
        raise ConfigError(
            f"config.data.name: there is no data set {name!r}; known: {', '.join(names())}, "
            f"{_TFDS}NAME for others of TFDS, and {_IDX}DIR for a folder of IDX files"
        )
    return _LOADERS[name](config, known) if name in _RECORDED else _LOADERS[name](config)


def place(config: ml_collections.ConfigDict) -> str | None:
    """The folder that the configured data are in; None: TFDS's own."""
    name = config.data.name
    return config.data.dir or (name.removeprefix(_IDX) if name.startswith(_IDX) else None)


def known_images(
    config: ml_collections.ConfigDict,
) -> tuple[tuple[int, int, int] | None, int | None]:
    """Image shape (H, W, C) and number of classes of the configured data, without preparing them.

    None stands for what only the data themselves can tell. Raises ConfigError for data.image_size.
    """
    size = pipeline.image_size(config)
    shape, num_classes = KNOWN.get(config.data.name, (None, None))
    if size:
        shape = (*size, config.data.channels or (shape[-1] if shape else 3))
    return shape, num_classes
