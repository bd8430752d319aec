"""Random images in the place of data, for measurements that need none."""

import dataclasses
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np

from dfs_jax import data
from dfs_jax.config import ConfigError
from dfs_jax.data.input.devices import place
from dfs_jax.data.pipeline import Batch, Data, Spec
from dfs_jax.models import inputs
from dfs_jax.training.run import Run, prepare

# Nothing here depends on the length of an epoch, but schedules are made for one.
_STEPS_PER_EPOCH = 1000


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
        batch = {
            name: rng.standard_normal((count, *x.shape)).astype(x.dtype)
            for name, x in self.spec.inputs.items()
        }
        labels = rng.integers(0, classes, count).astype(np.int32)
        if self.config.data.mixup or self.config.data.cutmix:
            labels = np.eye(classes, dtype=np.float32)[labels]
        batch = {name: place(x, sharding) for name, x in {**batch, "label": labels}.items()}
        while True:
            yield batch


def random_run(config: ml_collections.ConfigDict, num_classes: int | None = None) -> Run:
    """`prepare` of `config` on random images, of the shape of the configured data.

    Needs no data. Raises ConfigError as `prepare` does, and where the shape of the images or
    the number of classes is not known.
    """
    name = config.data.name
    shape, classes = data.known_images(config)
    if shape is None:
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
    size = config.train.batch_size * _STEPS_PER_EPOCH
    spec = Spec(name, inputs.images(shape), num_classes or classes, (), size, 0, 0)
    images = RandomImages(config, spec, size)
    return prepare(config, source=Data(images, None, None, spec))
