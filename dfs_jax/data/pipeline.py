"""What a data set offers to training and evaluation.

Here are the types, and the checks that all data sets share. How batches are made is in `input/`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import ml_collections

from dfs_jax.config import ConfigError
from dfs_jax.data.augment.normalization import Statistics
from dfs_jax.data.record import Record
from dfs_jax.models.inputs import Inputs, abstract

Batch = dict[str, jax.Array]


class DataError(ConfigError):
    """Data that the configuration names and that cannot be read; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a network and a report need to know about a data set."""

    name: str
    inputs: Inputs  # of one example, by the names that batches have them under
    num_classes: int
    class_names: tuple[str, ...]
    train_size: int
    validation_size: int
    test_size: int
    statistics: Statistics | None = None  # mean and deviation that images are normalised by

    def batch(self, count: int) -> Any:
        """What a network takes for `count` examples, as shapes and types."""
        return abstract(self.inputs, count)

    @property
    def side(self) -> int:
        """Length of an example's first axis: an image's height in pixels, a sentence's tokens."""
        return max((*x.shape, 1)[0] for x in self.inputs.values())

    def __str__(self) -> str:
        shapes = ", ".join(f"{k}s of {'x'.join(map(str, x.shape))}" for k, x in self.inputs.items())
        return (
            f"{self.name}: {self.train_size} training, {self.validation_size} validation, "
            f"{self.test_size} test {shapes}, {self.num_classes} classes"
        )


class TrainSource(Protocol):
    """Training examples: an endless stream, any step of which can be had without those before."""

    size: int  # examples in an epoch

    def batches(
        self, start: int, sharding: jax.sharding.NamedSharding | None = None
    ) -> Iterator[Batch]:
        """Batches of steps start, start + 1, ...: the inputs of `Spec`, and `label` (B,) int32.

        B is `config.train.batch_size`, over all devices and processes. Images (B, H, W, C) are
        augmented and normalised; where they are also mixed, `label` is a distribution (B, K)
        float32 over the classes. The batch of step s is a pure function of (`config.data.seed`,
        s). `sharding` divides the leading axis over devices; None: the default device.
        """


class EvalSource(Protocol):
    """Examples to be counted: each exactly once, in the order in which they are stored."""

    size: int  # examples
    num_batches: int

    def batches(self, sharding: jax.sharding.NamedSharding | None = None) -> Iterator[Batch]:
        """All batches: the inputs of `Spec`, `label` (B,) int32, `mask` (B,) bool.

        B is `config.train.eval_batch_size`, over all devices and processes. The last batch is
        filled up with repeated examples whose mask is False. `sharding` as in `TrainSource`.
        """


@dataclasses.dataclass(frozen=True)
class Data:
    """The splits of a data set; `validation` is None when `config.data.validation_size` is 0."""

    train: TrainSource
    validation: EvalSource | None
    test: EvalSource
    spec: Spec
    record: Record | None = None  # what a run notes of them; None: nothing


def check_batch(config: ml_collections.ConfigDict, devices: int) -> None:
    """Raises ConfigError unless `devices` divides both (positive) batch sizes of `config.train`."""
    for field in ("batch_size", "eval_batch_size"):
        size = config.train[field]
        if size < 1:
            raise ConfigError(f"train.{field} {size} is not positive; give at least {devices}")
        if size % devices:
            raise ConfigError(
                f"train.{field} {size} is not divisible by the {devices} devices of the mesh; "
                f"take {-(-size // devices) * devices}, or set mesh.data to a divisor of {size}"
            )


def image_size(config: ml_collections.ConfigDict) -> tuple[int, int] | None:
    """(H, W) that `config.data.image_size` asks for; None where images stay as they are.

    Raises ConfigError where it is neither a number of pixels nor a pair of them.
    """
    size = config.data.image_size
    pair = (size, size) if isinstance(size, int) else size
    whole = isinstance(pair, tuple) and [type(side) for side in pair] == [int, int]
    if size == 0 and whole:
        return None
    if not whole or min(pair) < 1:
        raise ConfigError(
            f"data.image_size {size!r} is neither a positive number of pixels nor a pair "
            "(height, width) of them; 0: as they are"
        )
    return pair


def check_seed(config: ml_collections.ConfigDict) -> int:
    """`config.data.seed`; raises ConfigError where it is not in [0, 2**32), as keys require."""
    seed = config.data.seed
    if not 0 <= seed < 2**32:
        raise ConfigError(f"data.seed {seed} is not between 0 and 2**32 - 1")
    return seed
