"""Means and deviations of the known data sets, and the normalisation by them."""

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
    # Printed by python -m dfs_jax.data.double_digits; "units" has the pictures of "clean".
    "double_digits/clean": ((0.500091, 0.499985, 0.499718), (0.137520, 0.123947, 0.137226)),
    "double_digits/hard": ((0.500253, 0.499963, 0.499535), (0.218908, 0.172702, 0.218059)),
    "double_digits/units": ((0.500091, 0.499985, 0.499718), (0.137520, 0.123947, 0.137226)),
}


def statistics(config: ml_collections.ConfigDict, own: str, channels: int) -> Statistics:
    """Mean and standard deviation that `config.data.normalization` chooses, one per channel.

    `own` names the data set's entry in STATISTICS. Raises ConfigError for an unknown name and
    for statistics of another number of channels.
    """
    name = own if config.data.normalization == "own" else config.data.normalization
    if name not in STATISTICS:
        if name == own:
            raise ConfigError(
                f"data.normalization 'own', but data set {own!r} has no entry in STATISTICS of "
                f"augment/normalization.py; take one of {', '.join(sorted(STATISTICS))}"
            )
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


def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """`images` (..., C) uint8 as float32: (images / 255 - mean) / std for each channel."""
    mean64, std64 = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    scale = (1 / (255 * std64)).astype(np.float32)
    shift = (-mean64 / std64).astype(np.float32)
    return images.astype(jnp.float32) * scale + shift
