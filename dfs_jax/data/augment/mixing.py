"""Mixing the images of a batch, and their labels: mixup and CutMix.

Works on whole batches on the device, after the augmentation of single images. Labels become
distributions (B, K), which the losses of `objectives` take as they are.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

from dfs_jax.config import ConfigError
from dfs_jax.data.pipeline import Batch

# Folded into a step's key where single images fold in their place in the batch.
_WHOLE_BATCH = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How batches are mixed; the defaults leave them alone.

    With both methods on, each mixed batch takes one of them, by a fair coin.
    """

    mixup: float = 0.0  # a of the Beta(a, a) from which the images' shares come; 0: off
    cutmix: float = 0.0  # a of the Beta(a, a) from which the uncut area comes; 0: off
    probability: float = 1.0  # of mixing a batch at all

    def __bool__(self) -> bool:
        return bool(self.probability and (self.mixup or self.cutmix))

    @classmethod
    def from_config(cls, config: ml_collections.ConfigDict) -> "Mixing":
        """The choices of `config.data`; raises ConfigError for values out of range."""
        c = config.data
        for field in ("mixup", "cutmix"):
            if not 0 <= c[field] < float("inf"):
                raise ConfigError(f"data.{field} {c[field]} is not a number >= 0; 0 turns it off")
        if not 0 <= c.mix_probability <= 1:
            raise ConfigError(f"data.mix_probability {c.mix_probability} is not in [0, 1]")
        return cls(c.mixup, c.cutmix, c.mix_probability)

    def compiled(
        self, seed: int, num_classes: int, sharding: jax.sharding.NamedSharding | None
    ) -> Callable[[Batch, jax.Array], Batch]:
        """The function (batch, step) -> batch, step () uint32, whose draws depend on (seed, step).

        It is a compiled call of its own: in one with the augmentation, XLA would augment every
        image twice. `sharding` is that of the batch. Where nothing is to be mixed, batches come
        back as they are.
        """
        if not self:
            return lambda batch, step: batch

        def mix(batch: Batch, step: jax.Array) -> Batch:
            key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
            key = jax.random.fold_in(key, _WHOLE_BATCH)
            images, labels = self.apply(key, batch["image"], batch["label"], num_classes)
            return {"image": images, "label": labels}

        return jax.jit(mix, out_shardings=sharding)

    def apply(
        self, key: jax.Array, images: jax.Array, labels: jax.Array, num_classes: int
    ) -> tuple[jax.Array, jax.Array]:
        """Mixed images (B, H, W, C) float32 and distributions (B, K) over `num_classes`.

        `images` are normalised, `labels` (B,) classes. Each image is mixed with the next one of
        the batch, the last with the first. That is as random as a drawn partner, for the order
        within a batch is, and of a batch that is divided over devices only the edges have to move.
        """
        own = draw_shares(self, key, images.shape[1:3])
        share = jnp.mean(own)
        targets = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
        weights = own[..., None]
        return (
            weights * images + (1 - weights) * jnp.roll(images, -1, axis=0),
            share * targets + (1 - share) * jnp.roll(targets, -1, axis=0),
        )


def draw_shares(mixing: Mixing, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The share (H, W) float32 that each image of a batch keeps of its own at every pixel.

    Its mean is the share of its own label: what mixup draws from Beta(a, a), or what CutMix
    leaves uncovered by its rectangle (arXiv 1710.09412, equation 2; arXiv 1905.04899, section 3.1).
    """
    whether, which, share, place = jax.random.split(key, 4)
    chance = 0.5 if mixing.mixup and mixing.cutmix else float(mixing.cutmix > 0)  # of CutMix
    cut = jax.random.uniform(which, (), jnp.float32) < chance
    alpha = jnp.where(cut, mixing.cutmix or 1, mixing.mixup or 1)  # 1: never drawn from
    share = jax.random.beta(share, alpha, alpha, dtype=jnp.float32)
    kept = jnp.where(cut, _uncovered(place, share, shape), share)
    mixed = jax.random.uniform(whether, (), jnp.float32) < mixing.probability
    return jnp.where(mixed, kept, 1)


def _uncovered(key: jax.Array, share: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """1 (H, W) float32 outside a rectangle of area 1 - share about a uniform centre, 0 inside.

    Where the rectangle reaches over the edge, less is covered.
    """
    side = jnp.sqrt(1 - share)
    covered = []
    for length, where in zip(shape, jax.random.split(key), strict=True):
        half = (length * side).astype(jnp.int32) // 2
        centre = jax.random.randint(where, (), 0, length, dtype=jnp.int32)
        pixels = jnp.arange(length, dtype=jnp.int32)
        covered.append((pixels >= centre - half) & (pixels < centre + half))
    return 1 - (covered[0][:, None] & covered[1]).astype(jnp.float32)
