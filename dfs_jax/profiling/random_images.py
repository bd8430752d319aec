"""Random images in the place of data, for measurements that need none."""

import dataclasses
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np

from dfs_jax import flops
from dfs_jax.config import ConfigError
from dfs_jax.data import Data
from dfs_jax.data.pipeline import Batch, Spec, place
from dfs_jax.training.run import Run, prepare

# Nothing here depends on the length of an epoch, but schedules are made for one.
_STEPS_PER_EPOCH = 1000


# Random images in the place of data.
@dataclasses.dataclass(frozen=True)
class RandomImages:
    """A training source of one batch of normal noise, again and again."""

    config: ml_collections.ConfigDict
    spec: Spec
    size: int

    def batches(
        self, start: int = 0, sharding: jax.sharding.NamedSharding | None = None
    ) -> Iterator[Batch]:
        """As `pipeline.TrainSource`; labels are distributions where the configuration mixes."""
        del start
        count, classes = self.config.train.batch_size, self.spec.num_classes
        rng = np.random.default_rng(0)
        images = rng.standard_normal((count, *self.spec.image_shape)).astype(np.float32)
        labels = rng.integers(0, classes, count).astype(np.int32)
        if self.config.data.mixup or self.config.data.cutmix:
            labels = np.eye(classes, dtype=np.float32)[labels]
        batch = {"image": place(images, sharding), "label": place(labels, sharding)}
        while True:
            yield batch


def random_run(config: ml_collections.ConfigDict, num_classes: int | None = None) -> Run:
    """`experiment.prepare` of `config` on random images, of the shape of the configured data.

    Needs no data. Raises ConfigError as `prepare` does, and where the shape of the images or
    the number of classes is not known.
    """
    name, side = config.data.name, config.data.image_size
    (height, width, channels), classes = flops.DATA_SETS.get(name, ((0, 0, 3), num_classes))
    if not side and not height:
        raise ConfigError(
            f"the size of the images of data set {name!r} is not known here; give "
            "--config.data.image_size=PIXELS"
        )
    if not (num_classes or classes):
        raise ConfigError(
            f"the number of classes of data set {name!r} is not known here; give --num_classes"
        )
    if config.train.accumulation != 1:
        raise ConfigError(
            "the parts of a step with accumulation cannot be told apart; train.accumulation must "
            f"be 1, got {config.train.accumulation}"
        )
    shape = (side, side, channels) if side else (height, width, channels)
    size = config.train.batch_size * _STEPS_PER_EPOCH
    spec = Spec(name, shape, num_classes or classes, (), size, 0, 0)
    images = RandomImages(config, spec, size)
    return prepare(config, source=Data(images, None, None, spec))
