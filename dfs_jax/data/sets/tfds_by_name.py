"""TFDS data sets with features `image` and `label`, read in streams: `data.name="tfds:NAME"`.

The data must have been prepared before, because that can take hours:
`python -m dfs_jax.data.prepare NAME`.
"""

import difflib
import functools
import logging
from typing import TYPE_CHECKING

import ml_collections

from dfs_jax.config import ConfigError
from dfs_jax.data.augment.normalization import STATISTICS
from dfs_jax.data.input import streamed
from dfs_jax.data.pipeline import Data
from dfs_jax.data.record import Record
from dfs_jax.data.sets import archives, builders

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

log = logging.getLogger(__name__)


def load(config: ml_collections.ConfigDict, known: Record | None = None) -> Data:
    """The TFDS data set that `config.data.name` names after "tfds:".

    `known` is what the run has noted of it.
    """
    streamed.check_config(config)
    name = config.data.name.removeprefix("tfds:")
    builder = builders.open_prepared(name, config, functools.partial(_how_to_prepare, name))
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
    return streamed.from_records(
        config,
        name=name,
        train=builders.records_of(builder, "train", config),
        test=builders.records_of(builder, test, config),
        own_validation=own and builders.records_of(builder, own, config),
        class_names=labels.names,
        statistics=name if name in STATISTICS else None,
        record=builders.record_of(builder, config, test=test, own_validation=own),
        known=known,
    )


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


def _how_to_prepare(name: str, place: str, file_format: str) -> str:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=place, try_gcs=False)
    except tfds.core.registered.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see tfds.list_builders()"
        return f"config.data.name: TFDS has no data set {name!r}; {hint}"
    return archives.instructions(builder, file_format)
