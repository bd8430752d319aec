"""Means and deviations of data sets, known or measured, and the normalisation by them."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dfs_jax.config import ConfigError

# Mean and standard deviation of each channel over all training pixels, on the scale [0, 1].
Statistics = tuple[tuple[float, ...], tuple[float, ...]]

STATISTICS: dict[str, Statistics] = {
    # The usual values of the PyTorch recipes.
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # python -c "import tensorflow_datasets as tfds, dfs_jax.data.sets.digits as d; b = d.Digits();
    # b.download_and_prepare(); x = tfds.as_numpy(b.as_dataset('train', batch_size=-1))['image'];
    # print((x / 255).mean(), (x / 255).std())"
    "digits": ((0.304425,), (0.375142,)),
    # As usual for it, and as `measure` finds them.
    "fashion_mnist": ((0.2860,), (0.3530,)),
    # Printed by python -m dfs_jax.data.double_digits; "units" has the pictures of "clean".
    "double_digits/clean": ((0.500091, 0.499985, 0.499718), (0.137520, 0.123947, 0.137226)),
    "double_digits/hard": ((0.500253, 0.499963, 0.499535), (0.218908, 0.172702, 0.218059)),
    "double_digits/units": ((0.500091, 0.499985, 0.499718), (0.137520, 0.123947, 0.137226)),
}


MEASURED = 4096  # training images, at most, that statistics are measured on


def statistics(
    config: ml_collections.ConfigDict, own: str | Statistics, channels: int
) -> Statistics:
    """Mean and standard deviation that `config.data.normalization` chooses, one per channel.

    `own` is what "own" stands for: the data set's entry in STATISTICS, or what was measured.
    Raises ConfigError for an unknown name and for statistics of another number of channels.
    """
    name = config.data.normalization
    if name == "own" and not isinstance(own, str):
        return own
    if name == "own" and own not in STATISTICS:
        raise ConfigError(
            f"data.normalization 'own', but data set {own!r} has no entry in STATISTICS of "
            f"augment/normalization.py; take one of {', '.join(sorted(STATISTICS))}"
        )
    name = own if name == "own" else name
    if name not in STATISTICS:
        raise ConfigError(
            f"data.normalization: there are no statistics {name!r}; "
            f"known: own, {', '.join(sorted(STATISTICS))}"
        )
    mean, std = STATISTICS[name]
    if len(mean) != channels:
        raise ConfigError(
            f"data.normalization {name!r} is for {len(mean)} channels, but the images "
            f"have {channels}; take 'own'"
        )
    return mean, std


def knows(name: str | None, channels: int) -> bool:
    """Whether STATISTICS has the entry `name` for so many channels."""
    return name in STATISTICS and len(STATISTICS[name][0]) == channels


def measure(images: Iterable[np.ndarray]) -> Statistics:
    """Mean and standard deviation of each channel over arrays (n, H, W, C) uint8, in four decimals.

    Levels are counted, so that the result does not depend on any order. A channel that is the same
    everywhere gets the deviation 1. Raises ConfigError where there are no images.
    """
    counts = sum(
        np.stack([np.bincount(plane.ravel(), minlength=256) for plane in np.moveaxis(part, -1, 0)])
        for part in images
    )
    if not np.any(counts):
        raise ConfigError("data.normalization 'own': none of the training images can be read")
    levels, shares = np.arange(256) / 255, counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ levels
    std = np.sqrt(np.sum(shares * (levels - mean[:, None]) ** 2, axis=1))
    rounded = [tuple(np.round(values, 4).tolist()) for values in (mean, std)]
    return rounded[0], tuple(value or 1.0 for value in rounded[1])


def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """`images` (..., C) uint8 as float32: (images / 255 - mean) / std for each channel."""
    mean64, std64 = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    scale = (1 / (255 * std64)).astype(np.float32)
    shift = (-mean64 / std64).astype(np.float32)
    return images.astype(jnp.float32) * scale + shift
