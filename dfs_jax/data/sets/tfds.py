"""TFDS data sets with features `image` and `label`, read in streams: `data.name="tfds:NAME"`.

The data must have been prepared before, because that can take hours: `python -m
dfs_jax.data.prepare NAME`. As TFRECORD
files they are read by tf.data, as ARRAY_RECORD files by Grain.
"""

import difflib
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import ml_collections

from dfs_jax.config import ConfigError
from dfs_jax.data.augment import normalization
from dfs_jax.data.input import streamed
from dfs_jax.data.input.records import Files, Records, TFRecords, first_missing
from dfs_jax.data.pipeline import Data, DataError
from dfs_jax.data.sets import archives

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

log = logging.getLogger(__name__)

PREFIX = "tfds:"

FORMATS = {"tf": "tfrecord", "grain": "array_record"}  # that a backend reads


def load(config: ml_collections.ConfigDict) -> Data:
    """The TFDS data set that `config.data.name` names after "tfds:"."""
    streamed.check(config)
    name = config.data.name.removeprefix(PREFIX)
    builder = open_builder(name, config, lambda place: _how_to_prepare(name, place, config))
    labels = _check_features(builder)
    splits = builder.info.splits
    test = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test is None:
        raise ConfigError(
            f"data.name {config.data.name!r} needs a split 'train' and a split 'test' or "
            f"'validation'; it has {', '.join(splits) or 'none'}"
        )
    if builder.info.disable_shuffling and config.data.validation_size > 0:
        log.warning("%s is stored as it was made: held-out examples may be of few classes", name)
    own = "validation" if test == "test" and "validation" in splits else None
    return streamed.create(
        config,
        name=name,
        train=records_of(builder, "train", config),
        test=records_of(builder, test, config),
        own_validation=own and records_of(builder, own, config),
        class_names=labels.names,
        statistics=name if name in normalization.STATISTICS else None,
    )


def directory(config: ml_collections.ConfigDict) -> str:
    """`config.data.dir`, or the place that TFDS takes when that is None."""
    import tensorflow_datasets as tfds

    return os.path.expanduser(config.data.dir or tfds.core.constants.DATA_DIR)


def open_builder(
    name: str, config: ml_collections.ConfigDict, how_to_prepare: Callable[[str], str]
) -> "tfds.core.DatasetBuilder":
    """The builder of data that have been prepared in the format that `data.backend` reads.

    Raises DataError with `how_to_prepare(directory)` where there are none, at once and without a
    network; and one that names the directory where they cannot be read.
    """
    import tensorflow_datasets as tfds
    from etils import epath

    place = directory(config)
    if not (epath.Path(place) / name.split("/")[0].split(":")[0]).exists():
        raise DataError(how_to_prepare(place))  # before TFDS looks for the data elsewhere
    try:
        builder = tfds.builder(name, data_dir=place, try_gcs=False)
        found = builder.info.file_format.value if builder.data_path.exists() else None
    except Exception as error:  # TFDS, JSON and protocol buffers have no common class
        reason = next(iter(str(error).strip().splitlines()), "")
        raise DataError(
            f"the prepared data of {name} in {place} cannot be read "
            f"({type(error).__name__}: {reason})"
        ) from error
    if found is None:
        raise DataError(how_to_prepare(place))
    wanted = FORMATS[config.data.backend]
    if found != wanted:
        other = next((b for b, format_ in FORMATS.items() if format_ == found), None)
        raise DataError(
            f"data.backend {config.data.backend!r} reads {wanted} files, but {name} in {place} was "
            f"prepared as {found}; "
            + (f"take data.backend {other!r}, or " if other else "")
            + f"prepare it again in another data.dir with --file_format={wanted}"
        )
    return builder


def records_of(
    builder: "tfds.core.DatasetBuilder", split: str, config: ml_collections.ConfigDict
) -> Records:
    """The records of a split. Raises DataError, naming the file, when one is not there."""
    info = builder.info.splits[split]
    if not info.num_examples:
        raise DataError(f"split {split!r} of {builder.info.full_name} is empty")
    files = Files(tuple(os.fspath(path) for path in info.filepaths), tuple(info.shard_lengths))
    missing = first_missing(files.paths)
    if missing:
        raise DataError(f"{missing} is missing; prepare {builder.info.full_name} anew")
    if config.data.backend == "grain":
        from dfs_jax.data.input.array_records import ArrayRecords

        return ArrayRecords(files)
    return TFRecords(files, config.data.shuffle_buffer)


def _check_features(builder: "tfds.core.DatasetBuilder") -> "tfds.features.ClassLabel":
    import tensorflow_datasets as tfds

    features = builder.info.features
    kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    for key, kind in kinds.items():
        if key not in features or not isinstance(features[key], kind):
            raise ConfigError(
                f"data.name: {builder.info.full_name} has no feature {key!r} of type "
                f"{kind.__name__}; its features: {', '.join(features)}"
            )
    return features["label"]


def _how_to_prepare(name: str, place: str, config: ml_collections.ConfigDict) -> str:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=place, try_gcs=False)
    except tfds.core.registered.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see tfds.list_builders()"
        return f"config.data.name: TFDS has no data set {name!r}; {hint}"
    return archives.instructions(builder, FORMATS[config.data.backend])
