"""Means and deviations of the known data sets, and the normalisation by them."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dfs_jax.config import ConfigError

# Mean and standard deviation of each channel over all training pixels, on the scale [0, 1].
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # The usual values of the PyTorch recipes.
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # python -c "import tensorflow_datasets as tfds, dfs_jax.data.digits as d; b = d.Digits();
    # b.download_and_prepare(); x = tfds.as_numpy(b.as_dataset('train', batch_size=-1))['image'];
    # print((x / 255).mean(), (x / 255).std())"
    "digits": ((0.304425,), (0.375142,)),
}


def statistics(
    config: ml_collections.ConfigDict, own: str, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that `config.data.normalization` chooses, one per channel.

    `own` names the data set's entry in STATISTICS. Raises ConfigError for an unknown name and
    for statistics of another number of channels.
    """
    name = own if config.data.normalization == "own" else config.data.normalization
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


def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """`images` (..., C) uint8 as float32: (images / 255 - mean) / std for each channel."""
    mean64, std64 = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    scale = (1 / (255 * std64)).astype(np.float32)
    shift = (-mean64 / std64).astype(np.float32)
    return images.astype(jnp.float32) * scale + shift
