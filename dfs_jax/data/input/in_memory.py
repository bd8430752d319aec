"""Data sets that fit in memory: arrays resident on the devices, batches made there.

A batch is one compiled call that gathers the examples, augments and normalises them, and, where
images are mixed, a second one. Every random number comes from a key of (seed, step, place in the
batch), so that batches do not depend on the number of devices. Where the arrays come from is the
loaders' matter.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dfs_jax.config import ConfigError
from dfs_jax.data import pipeline
from dfs_jax.data.augment import chain, mixing, normalization
from dfs_jax.data.input import order
from dfs_jax.data.pipeline import Batch, Data, Spec

Arrays = tuple[np.ndarray, np.ndarray]  # images (N, H, W, C) uint8, labels (N,) integers


def create(
    config: ml_collections.ConfigDict,
    *,
    name: str,
    train: Arrays,
    validation: Arrays | None,
    test: Arrays,
    class_names: Sequence[str],
) -> Data:
    """Serve arrays as `config` says; needs neither TensorFlow nor its data sets.

    `name` is also the entry of `augment.STATISTICS` for `normalization="own"`. An empty split is
    refused, and so are fields of the configuration that do not fit: ConfigError.
    """
    pipeline.check_batch(config, devices=1)
    seed = pipeline.check_seed(config)
    if config.data.image_size < 0:
        raise ConfigError(f"data.image_size {config.data.image_size} is negative; 0: as they are")
    splits = {"train": train, "validation": validation, "test": test}
    arrays = {k: _checked(k, v, config.data.image_size) for k, v in splits.items() if v is not None}
    shape = arrays["train"][0].shape[1:]
    mean, std = normalization.statistics(config, own=name, channels=shape[-1])
    augmentation, mixed = chain.from_config(config, shape), mixing.from_config(config)

    def held_out(split: str) -> "InMemoryEval":
        return InMemoryEval(*arrays[split], config.train.eval_batch_size, mean, std)

    return Data(
        train=InMemoryTrain(
            *arrays["train"],
            config.train.batch_size,
            seed,
            augmentation,
            mean,
            std,
            mixed,
            len(class_names),
        ),
        validation=None if validation is None else held_out("validation"),
        test=held_out("test"),
        spec=Spec(
            name=name,
            image_shape=shape,
            num_classes=len(class_names),
            class_names=tuple(class_names),
            train_size=len(train[1]),
            validation_size=0 if validation is None else len(validation[1]),
            test_size=len(test[1]),
        ),
    )


def hold_out(arrays: Arrays, size: int) -> tuple[Arrays, Arrays | None]:
    """Training and validation arrays: validation is the last `size` examples, None for 0.

    Raises ConfigError when `size` leaves nothing to train on, or is negative.
    """
    images, labels = arrays
    if not 0 <= size < len(labels):
        raise ConfigError(
            f"data.validation_size {size} is out of range; give 0 (no validation split) to "
            f"{len(labels) - 1}, for there are {len(labels)} examples outside the test split"
        )
    if size == 0:
        return arrays, None
    return (images[:-size], labels[:-size]), (images[-size:], labels[-size:])


def resize(images: np.ndarray, side: int) -> np.ndarray:
    """`images` (N, H, W, C) uint8 as (N, side, side, C) uint8: bilinear, rounded; 0: unchanged."""
    if side == 0 or images.shape[1:3] == (side, side):
        return images

    @jax.jit
    def scaled(chunk):
        shape = (len(chunk), side, side, chunk.shape[-1])
        # The highest precision, for an accelerator's default one is off by whole grey levels.
        result = jax.image.resize(
            chunk.astype(jnp.float32), shape, "bilinear", precision=jax.lax.Precision.HIGHEST
        )
        return jnp.clip(jnp.round(result), 0, 255).astype(jnp.uint8)

    chunks = (images[i : i + 1024] for i in range(0, len(images), 1024))
    return np.concatenate([np.asarray(scaled(jax.device_put(chunk))) for chunk in chunks])


class InMemoryTrain:
    """A `pipeline.TrainSource` over arrays."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        seed: int,
        augmentation: chain.Augmentation,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        mixed: mixing.Mixing,
        num_classes: int,
    ):
        self.size = len(labels)
        self._batch_size = batch_size
        self._seed = seed
        self._augmentation, self._mean, self._std = augmentation, mean, std
        self._mixed, self._num_classes = mixed, num_classes
        self._resident = _Resident(images, labels, self._batch)

    def batches(self, start: int, sharding: NamedSharding | None = None) -> Iterator[Batch]:
        """See `pipeline.TrainSource`."""
        batch_of = self._resident.on(sharding)
        mix = mixing.compiled(self._mixed, self._seed, self._num_classes, sharding)

        def make(step: int) -> Batch:
            indices = order.train_indices(self.size, self._batch_size, self._seed, step)
            number = pipeline.place(np.uint32(step), _replicated(sharding))
            return mix(batch_of(pipeline.place(indices, sharding), number), number)

        return _one_ahead(make(step) for step in itertools.count(start))

    def _batch(self, images, labels, indices, step):
        key = jax.random.fold_in(jax.random.key(self._seed, impl="threefry2x32"), step)

        def example(place, image):
            return chain.apply(self._augmentation, jax.random.fold_in(key, place), image)

        augmented = jax.vmap(example)(jnp.arange(len(indices), dtype=jnp.uint32), images[indices])
        return {
            "image": normalization.normalise(augmented, self._mean, self._std),
            "label": labels[indices],
        }


class InMemoryEval:
    """A `pipeline.EvalSource` over arrays."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        self.size = len(labels)
        self.num_batches = -(-self.size // batch_size)
        self._batch_size = batch_size
        self._mean, self._std = mean, std
        self._resident = _Resident(images, labels, self._batch)

    def batches(self, sharding: NamedSharding | None = None) -> Iterator[Batch]:
        """See `pipeline.EvalSource`."""
        batch_of = self._resident.on(sharding)

        def make(number: int) -> Batch:
            positions = np.arange(self._batch_size, dtype=np.int32) + number * self._batch_size
            return batch_of(pipeline.place(positions, sharding))

        return _one_ahead(make(number) for number in range(self.num_batches))

    def _batch(self, images, labels, positions):
        indices = jnp.minimum(positions, self.size - 1)
        return {
            "image": normalization.normalise(images[indices], self._mean, self._std),
            "label": labels[indices],
            "mask": positions < self.size,
        }


class _Resident:
    """Arrays placed once for each sharding, with the compiled function that reads them."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch: Callable[..., Batch]):
        self._arrays = images, labels.astype(np.int32)
        self._batch = batch
        self._placed: dict[NamedSharding | None, Callable[..., Batch]] = {}

    def on(self, sharding: NamedSharding | None) -> Callable[..., Batch]:
        if sharding not in self._placed:
            everywhere = _replicated(sharding)
            images, labels = (pipeline.place(array, everywhere) for array in self._arrays)
            compiled = jax.jit(self._batch, out_shardings=sharding)
            self._placed[sharding] = lambda *choice: compiled(images, labels, *choice)
        return self._placed[sharding]


def _replicated(sharding: NamedSharding | None) -> NamedSharding | None:
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())


def _one_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each dispatched while its predecessor is in use."""
    # pairwise asks for the next batch before it hands out the present one.
    for ready, _ in itertools.pairwise(itertools.chain(batches, [None])):
        yield ready


def _checked(split: str, arrays: Arrays, side: int) -> Arrays:
    images, labels = arrays
    if images.ndim != 4 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{split}: images must be (N, H, W, C) uint8 with labels (N,), not "
            f"{images.shape} {images.dtype} with {labels.shape}"
        )
    if not len(labels):
        raise ConfigError(f"the {split} split is empty")
    return resize(images, side), labels
