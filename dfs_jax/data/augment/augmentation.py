"""Augmentation on the device, each image by itself: pure functions of a key and a uint8 image.

Each kind is a draw of its random numbers and a deterministic function of them; an `Augmentation`
chains those that are chosen. Policies of image operations are in `autoaugment.py`, what concerns
several images at once is in `mixing.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dfs_jax.config import ConfigError
from dfs_jax.data.augment import autoaugment


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is done to a training image: crop, flip, operations, cutout; the defaults do nothing."""

    crop_padding: int = 0  # pixels added on each side before a random crop to the old size
    crop_fill: int = 0  # grey level of that padding
    flip: bool = False  # left to right, for half of the images
    cutout: int = 0  # side of a black square at a random place, which may reach over the edge
    autoaugment: str = ""  # a name in autoaugment.POLICIES
    randaugment_layers: int = 0  # RandAugment's operations per image ...
    randaugment_magnitude: float = 9.0  # ... and how strong they are, up to RANDAUGMENT_MAX

    @classmethod
    def from_config(
        cls, config: ml_collections.ConfigDict, image_shape: tuple[int, int, int]
    ) -> "Augmentation":
        """The choices of `config.data` for images of `image_shape` (H, W, C).

        Raises ConfigError for values out of range and for what does not fit the images.
        """
        c, (height, width, channels) = config.data, image_shape
        side = min(height, width)
        if c.crop_padding < 0:
            raise ConfigError(
                f"data.crop_padding {c.crop_padding} is negative; 0 turns cropping off"
            )
        if c.crop_padding > side:
            raise ConfigError(
                f"data.crop_padding {c.crop_padding} moves images of {height}x{width} pixels out "
                f"of sight; give 0 (off) to {side}"
            )
        if not 0 <= c.crop_fill <= 255:
            raise ConfigError(f"data.crop_fill {c.crop_fill} is not a grey level between 0 and 255")
        if not 0 <= c.cutout <= side:
            raise ConfigError(
                f"data.cutout {c.cutout} does not fit images of {height}x{width} pixels; "
                f"give 0 (off) to {side}"
            )
        _check_operations(c, channels)
        return cls(**{field.name: c[field.name] for field in dataclasses.fields(cls)})

    def apply(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """`image` (H, W, C) uint8, augmented; the same shape and type.

        Each kind has a key of its own, so that turning one on leaves the draws of the others as
        they were.
        """
        shape = image.shape
        if self.crop_padding:
            offset = draw_crop(jax.random.fold_in(key, 0), self.crop_padding)
            image = crop(image, offset, self.crop_padding, self.crop_fill)
        if self.flip:
            image = flip(image, draw_flip(jax.random.fold_in(key, 1)))
        if self.autoaugment:
            rows = autoaugment.draw_policy(jax.random.fold_in(key, 3), self.autoaugment)
            image = autoaugment.policy(image, rows, self.autoaugment)
        if self.randaugment_layers:
            key_of_rows = jax.random.fold_in(key, 4)
            rows = autoaugment.draw_randaugment(key_of_rows, self.randaugment_layers)
            image = autoaugment.randaugment(image, rows, self.randaugment_magnitude)
        if self.cutout:
            image = cutout(image, draw_cutout(jax.random.fold_in(key, 2), shape), self.cutout)
        return image

    def apply_to_batch(self, seed: int, step: jax.Array, images: jax.Array) -> jax.Array:
        """`images` (B, H, W, C) uint8 of step `step` () uint32, each augmented by a key of its own.

        The keys are functions of (seed, step, row): they do not depend on the devices.
        """
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)

        def augmented(row, image):
            return self.apply(jax.random.fold_in(key, row), image)

        return jax.vmap(augmented)(jnp.arange(len(images), dtype=jnp.uint32), images)


def _check_operations(c: ml_collections.ConfigDict, channels: int) -> None:
    if c.autoaugment and c.autoaugment not in autoaugment.POLICIES:
        raise ConfigError(
            f"data.autoaugment: there is no policy {c.autoaugment!r}; "
            f"known: {', '.join(sorted(autoaugment.POLICIES))}, or '' for none"
        )
    if c.randaugment_layers < 0:
        raise ConfigError(f"data.randaugment_layers {c.randaugment_layers} is negative; 0: off")
    if not 0 <= c.randaugment_magnitude <= autoaugment.RANDAUGMENT_MAX:
        raise ConfigError(
            f"data.randaugment_magnitude {c.randaugment_magnitude} is not between 0 and "
            f"{autoaugment.RANDAUGMENT_MAX:g}"
        )
    if c.autoaugment and c.randaugment_layers:
        raise ConfigError(
            "data.autoaugment and data.randaugment_layers are both set; choose one of the two"
        )
    if (c.autoaugment or c.randaugment_layers) and channels != 3:
        field = "autoaugment" if c.autoaugment else "randaugment_layers"
        raise ConfigError(f"data.{field} is for images of 3 channels, but these have {channels}")


def draw_crop(key: jax.Array, padding: int) -> jax.Array:
    """Row and column (2,) int32 of a crop's corner in the padded image, uniform."""
    return jax.random.randint(key, (2,), 0, 2 * padding + 1, dtype=jnp.int32)


def crop(image: jax.Array, offset: jax.Array, padding: int, fill: int) -> jax.Array:
    """The window of `image`'s own size at `offset` of the image padded with grey level `fill`."""
    height, width, _ = image.shape
    # Reading by index is twice as fast on a CPU as padding and a dynamic slice.
    rows = jnp.arange(height, dtype=jnp.int32) + (offset[0] - padding)
    columns = jnp.arange(width, dtype=jnp.int32) + (offset[1] - padding)
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
    window = image[jnp.clip(rows, 0, height - 1)][:, jnp.clip(columns, 0, width - 1)]
    return jnp.where(inside[..., None], window, jnp.asarray(fill, image.dtype))


def draw_flip(key: jax.Array) -> jax.Array:
    """Whether to flip: () bool, True half of the time."""
    return jax.random.randint(key, (), 0, 2, dtype=jnp.int32) == 1


def flip(image: jax.Array, flipped: jax.Array) -> jax.Array:
    """`image` mirrored left to right where `flipped` () bool holds."""
    columns = jnp.arange(image.shape[1], dtype=jnp.int32)
    # By index, like the crop: both then become one pass over the pixels.
    return image[:, jnp.where(flipped, columns[::-1], columns)]


def draw_cutout(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Row and column (2,) int32 of the square's centre, uniform over the pixels of `shape`."""
    return jax.random.randint(key, (2,), 0, np.array(shape[:2]), dtype=jnp.int32)


def cutout(image: jax.Array, centre: jax.Array, size: int) -> jax.Array:
    """`image` with a black square of `size` pixels a side.

    It covers rows y - size // 2 to y - size // 2 + size - 1 around centre (y, x), and columns
    likewise, as far as these are in the image.
    """
    height, width, _ = image.shape
    low = centre - size // 2
    rows = jnp.arange(height, dtype=jnp.int32) - low[0]
    columns = jnp.arange(width, dtype=jnp.int32) - low[1]
    hole = ((rows >= 0) & (rows < size))[:, None] & ((columns >= 0) & (columns < size))
    return jnp.where(hole[..., None], jnp.zeros((), image.dtype), image)
