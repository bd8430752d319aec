"""Data sets that fit in memory: arrays resident on the devices, batches made there.

A batch is one compiled call that gathers the examples, augments and normalises them, and, where
images are mixed, a second one. Every random number comes from a key of (seed, step, place in the
batch), so that batches do not depend on the number of devices. Where the arrays come from is the
matter of `sets/`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import NamedSharding

from dfs_jax.config import ConfigError
from dfs_jax.data import pipeline
from dfs_jax.data.augment.augmentation import Augmentation
from dfs_jax.data.augment.mixing import Mixing
from dfs_jax.data.augment.normalization import Statistics, normalise, statistics
from dfs_jax.data.input import order
from dfs_jax.data.input.devices import one_ahead, place, replicated
from dfs_jax.data.pipeline import Batch, Data, Spec
from dfs_jax.data.record import Record, whole
from dfs_jax.models.inputs import images as image_inputs
from dfs_jax.ops import memory

_CHUNK_PIXELS = 2**26  # of images that are resized at once, as float32

Arrays = tuple[np.ndarray, np.ndarray]  # images (N, H, W, C) uint8, labels (N,) integers


def from_arrays(
    config: ml_collections.ConfigDict,
    *,
    name: str,
    train: Arrays,
    validation: Arrays | None,
    test: Arrays,
    class_names: Sequence[str],
    own: Statistics | None = None,
    record: Record | None = None,
) -> Data:
    """Arrays served as `config` says; needs neither TensorFlow nor its data sets.

    `own` are the statistics for `normalization="own"`, None: the entry `name` of
    `normalization.STATISTICS`. `record` is what a run notes of them, None: their numbers. An empty
    split is refused, and so are fields of the configuration that do not fit: ConfigError.
    """
    pipeline.check_batch(config, devices=1)
    seed = pipeline.check_seed(config)
    size = pipeline.image_size(config)
    splits = {"train": train, "validation": validation, "test": test}
    arrays = {k: _checked(k, v, size) for k, v in splits.items() if v is not None}
    shape, num_classes = arrays["train"][0].shape[1:], len(class_names)
    if config.data.channels not in (0, shape[-1]):
        raise ConfigError(
            f"data.channels {config.data.channels}: the images of {name} have {shape[-1]}; 0: as "
            "they are"
        )
    scale = statistics(config, own=own or name, channels=shape[-1])

    def held_out(split: str) -> "InMemoryEval":
        return InMemoryEval(*arrays[split], config.train.eval_batch_size, scale)

    return Data(
        train=InMemoryTrain(
            *arrays["train"],
            config.train.batch_size,
            seed,
            Augmentation.from_config(config, shape),
            scale,
            Mixing.from_config(config),
            num_classes,
        ),
        validation=None if validation is None else held_out("validation"),
        test=held_out("test"),
        spec=Spec(
            name=name,
            inputs=image_inputs(shape),
            num_classes=num_classes,
            class_names=tuple(class_names),
            train_size=len(train[1]),
            validation_size=0 if validation is None else len(validation[1]),
            test_size=len(test[1]),
            statistics=scale,
        ),
        record=record or whole({k: len(labels) for k, (_, labels) in arrays.items()}, class_names),
    )


def from_splits(
    config: ml_collections.ConfigDict,
    splits: Mapping[str, Arrays],
    class_names: Sequence[str],
    **rest: Any,
) -> Data:
    """`from_arrays` of splits `train`, whose end is held out for validation, and `test`."""
    train, validation = hold_out(splits["train"], config.data.validation_size)
    return from_arrays(
        config,
        name=config.data.name,
        train=train,
        validation=validation,
        test=splits["test"],
        class_names=class_names,
        **rest,
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


def resize(images: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """`images` (N, h, w, C) uint8 as (N, *size, C) uint8: bilinear, rounded; None: unchanged.

    Raises ConfigError where memory would not hold them.
    """
    if size is None or images.shape[1:3] == size:
        return images
    needed, free = len(images) * math.prod(size) * images.shape[-1], memory.of_machine()
    if free is not None and needed > free:
        raise ConfigError(
            f"data.image_size {size}: {len(images):,} images take {memory.in_words(needed)} of "
            f"memory, there are {memory.in_words(free)}"
        )

    @jax.jit
    def scaled(chunk):
        shape = (len(chunk), *size, chunk.shape[-1])
        # The highest precision, for an accelerator's default one is off by whole grey levels.
        result = jax.image.resize(
            chunk.astype(jnp.float32), shape, "bilinear", precision=jax.lax.Precision.HIGHEST
        )
        return jnp.clip(jnp.round(result), 0, 255).astype(jnp.uint8)

    together = max(1, min(1024, _CHUNK_PIXELS // math.prod(size)))
    chunks = (images[i : i + together] for i in range(0, len(images), together))
    return np.concatenate([np.asarray(scaled(jax.device_put(chunk))) for chunk in chunks])


class InMemoryTrain:
    """A `pipeline.TrainSource` over arrays."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        seed: int,
        augmentation: Augmentation,
        scale: Statistics,
        mixing: Mixing,
        num_classes: int,
    ):
        self.size = len(labels)
        self._batch_size, self._seed = batch_size, seed
        self._augmentation, self._scale = augmentation, scale
        self._mixing, self._num_classes = mixing, num_classes
        self._resident = _resident(images, labels, self._batch)

    def batches(self, start: int, sharding: NamedSharding | None = None) -> Iterator[Batch]:
        """See `pipeline.TrainSource`."""
        batch_of = self._resident(sharding)
        mix = self._mixing.compiled(self._seed, self._num_classes, sharding)

        def make(step: int) -> Batch:
            indices = order.train_indices(self.size, self._batch_size, self._seed, step)
            number = place(np.uint32(step), replicated(sharding))
            return mix(batch_of(place(indices, sharding), number), number)

        return one_ahead(make(step) for step in itertools.count(start))

    def _batch(self, images, labels, indices, step):
        images = self._augmentation.apply_to_batch(self._seed, step, images[indices])
        return {"image": normalise(images, *self._scale), "label": labels[indices]}


class InMemoryEval:
    """A `pipeline.EvalSource` over arrays."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch_size: int, scale: Statistics):
        self.size = len(labels)
        self.num_batches = -(-self.size // batch_size)
        self._batch_size, self._scale = batch_size, scale
        self._resident = _resident(images, labels, self._batch)

    def batches(self, sharding: NamedSharding | None = None) -> Iterator[Batch]:
        """See `pipeline.EvalSource`."""
        batch_of = self._resident(sharding)

        def make(number: int) -> Batch:
            positions = np.arange(self._batch_size, dtype=np.int32) + number * self._batch_size
            return batch_of(place(positions, sharding))

        return one_ahead(make(number) for number in range(self.num_batches))

    def _batch(self, images, labels, positions):
        indices = jnp.minimum(positions, self.size - 1)
        return {
            "image": normalise(images[indices], *self._scale),
            "label": labels[indices],
            "mask": positions < self.size,
        }


def _resident(
    images: np.ndarray, labels: np.ndarray, batch: Callable[..., Batch]
) -> Callable[[NamedSharding | None], Callable[..., Batch]]:
    """The compiled `batch` under a sharding, with the arrays that it reads placed there once."""
    arrays = images, labels.astype(np.int32)

    @functools.cache
    def on(sharding: NamedSharding | None) -> Callable[..., Batch]:
        placed = [place(array, replicated(sharding)) for array in arrays]
        return functools.partial(jax.jit(batch, out_shardings=sharding), *placed)

    return on


def _checked(split: str, arrays: Arrays, size: tuple[int, int] | None) -> Arrays:
    images, labels = arrays
    if images.ndim != 4 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{split}: images must be (N, H, W, C) uint8 with labels (N,), not "
            f"{images.shape} {images.dtype} with {labels.shape}"
        )
    if not len(labels):
        raise ConfigError(f"the {split} split is empty")
    return resize(images, size), labels
