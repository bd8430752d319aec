"""From the pixels of an image of any size to what a network takes; numpy alone.

The same arithmetic as in the evaluation of `data/`: what was measured there holds for images that
come this way. How files become pixels is said in `data/input/pictures.py`.
"""

import dataclasses
import functools
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input.

    Raises ValueError for statistics that do not fit the channels.
    """

    image_shape: tuple[int, int, int]  # (H, W, C) of the input
    mean: tuple[float, ...]  # (C,) on the scale [0, 1]
    std: tuple[float, ...]  # (C,)
    # Pixels it gets before the centre crop, or height and width that the image then covers; 0: the
    # whole image is stretched.
    short_side: int | tuple[int, int] = 0
    antialias: bool = True  # when images are made smaller

    def __post_init__(self):
        if not len(self.mean) == len(self.std) == self.image_shape[-1]:
            raise ValueError(
                f"images {self.image_shape} need a mean and a deviation for each channel, "
                f"got {self.mean} and {self.std}"
            )

    def fit(self, image: np.ndarray) -> np.ndarray:
        """`image` (h, w, C) uint8 in the size of the input, (H, W, C) uint8."""
        height, width, channels = self.image_shape
        if image.ndim != 3 or image.shape[-1] != channels or not image.size:
            raise ValueError(
                f"an image must have shape (height, width, {channels}), got {image.shape}"
            )
        if not self.short_side:
            return resize(image, (height, width), antialias=self.antialias)
        covered = self.short_side if isinstance(self.short_side, tuple) else (self.short_side,) * 2
        scale = max(new / old for new, old in zip(covered, image.shape[:2], strict=True))
        rows, columns = (round(side * scale) for side in image.shape[:2])
        corner = (rows - height) // 2, (columns - width) // 2
        kept = tuple(map(slice, corner, (corner[0] + height, corner[1] + width)))
        return resize(image, (rows, columns), kept, antialias=self.antialias)

    def normalise(self, images: np.ndarray) -> np.ndarray:
        """`images` (B, H, W, C) uint8 as float32: (images / 255 - mean) / std."""
        mean, std = np.asarray(self.mean, np.float64), np.asarray(self.std, np.float64)
        scale, shift = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
        return images.astype(np.float32) * scale + shift


def resize(
    image: np.ndarray,
    shape: tuple[int, int],
    kept: tuple[slice, slice] = (slice(None), slice(None)),
    *,
    antialias: bool = True,
) -> np.ndarray:
    """`image` (h, w, C) uint8 as (*shape, C) uint8: bilinear between pixel centres, rounded.

    With `antialias` an image that shrinks is averaged over as many pixels as go into one. Of the
    result the rows and columns `kept` are computed, and nothing else.
    """
    if image.shape[:2] == tuple(shape):
        return image[kept]
    lengths = zip(image.shape, shape, kept, strict=False)
    (top, rows), (left, columns) = (
        _weights(before, after, *own.indices(after)[:2], antialias)
        for before, after, own in lengths
    )
    needed = image[top : top + rows.shape[1], left : left + columns.shape[1]]
    channels_first = rows @ np.moveaxis(needed.astype(np.float32), -1, 0) @ columns.T
    return np.moveaxis(np.clip(np.round(channels_first), 0, 255).astype(np.uint8), 0, -1)


@functools.lru_cache(maxsize=64)
def _weights(
    before: int, after: int, first: int, last: int, antialias: bool
) -> tuple[int, np.ndarray]:
    """What new pixels `first` to `last` - 1 of `after` take along an axis of `before` old ones.

    The first old pixel that they need, and the share (last - first, needed) float32 of every
    needed old pixel in every new one.
    """
    scale = before / after
    centre = (np.arange(first, last)[:, None] + 0.5) * scale - 0.5
    reach = max(scale, 1.0) if antialias else 1.0
    # Beyond the edge the nearest pixel goes on.
    centre = np.clip(centre, 0, before - 1) if reach == 1.0 else centre
    low = max(0, math.ceil(centre[0, 0] - reach))
    high = min(before, math.floor(centre[-1, 0] + reach) + 1)
    weights = np.maximum(0, 1 - np.abs(np.arange(low, high) - centre) / reach)
    return low, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
