"""CIFAR-10 and CIFAR-100: 60,000 colour images of 32x32 pixels, 10,000 of them for testing.

TFDS prepares them once from the published archives, verified by their checksums; then they are
arrays in memory. Validation examples come off the end of the training split as TFDS stores it,
which is in a fixed random order, so that they are the same in every run.
"""

import ml_collections
import tensorflow_datasets as tfds

from dfs_jax.data.input import in_memory
from dfs_jax.data.pipeline import Data
from dfs_jax.data.sets import builders


def load(config: ml_collections.ConfigDict) -> Data:
    """CIFAR-10 or CIFAR-100 as `config` says.

    Raises DataError, saying what to download and where to put it, where the data are not
    prepared and there is no network.
    """
    builder = builders.open_or_prepare(tfds.builder_cls(config.data.name), config.data.dir)
    sizes = {split: builder.info.splits[split].num_examples for split in ("train", "test")}
    arrays = builders.read_splits(builder, sizes)
    return in_memory.from_splits(config, arrays, builder.info.features["label"].names)
