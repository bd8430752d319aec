"""Handwritten digits: 1,797 real images of 8x8 pixels that come with scikit-learn.

The smallest data set with all that the large ones have: a TFDS builder, three splits, ten
classes. It needs no network, so that it can try out everything else.
"""

import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from dfs_jax.data.input import in_memory, order
from dfs_jax.data.pipeline import Data
from dfs_jax.data.sets import builders

SIZES = {"train": 1197, "validation": 240, "test": 360}
_SPLIT_SEED = 0  # changing it needs a new VERSION


class Digits(tfds.core.GeneratorBasedBuilder):
    """The optical recognition of handwritten digits data (UCI, test part), as TFDS splits."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012, the base class fixes its type

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of scikit-learn in three fixed splits.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # the order in which examples are generated is a random one
        )

    def _split_generators(self, dl_manager):
        chosen = order.permutation(sum(SIZES.values()), _SPLIT_SEED, 0)
        parts = np.split(chosen, np.cumsum(list(SIZES.values()))[:-1])
        return {
            split: self._generate_examples(part) for split, part in zip(SIZES, parts, strict=True)
        }

    def _generate_examples(self, chosen: np.ndarray):
        from sklearn import datasets

        digits = datasets.load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        for key, index in enumerate(chosen):
            yield key, {"image": images[index], "label": int(digits.target[index])}


def load(config: ml_collections.ConfigDict) -> Data:
    """The digits as `config` says; at `data.validation_size=240` the splits are the stored ones.

    Any other number of validation examples is the last ones of both splits joined.
    """
    arrays = builders.read_splits(builders.open_or_prepare(Digits, config.data.dir), SIZES)
    joined = tuple(
        np.concatenate(pair) for pair in zip(arrays["train"], arrays["validation"], strict=True)
    )
    splits = {"train": joined, "test": arrays["test"]}
    return in_memory.from_splits(config, splits, [str(digit) for digit in range(10)])
