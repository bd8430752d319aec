"""From the pixels of an image of any size to what a network takes; numpy alone.

The same arithmetic as in the evaluation of `data/`: what was measured there holds for images that
come this way. Reading files is the caller's matter.
"""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input.

    Raises ValueError for statistics that do not fit the channels.
    """

    image_shape: tuple[int, int, int]  # (H, W, C) of the input
    mean: tuple[float, ...]  # (C,) on the scale [0, 1]
    std: tuple[float, ...]  # (C,)
    short_side: int = 0  # pixels it gets before the centre crop; 0: the whole image is stretched
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
        scale = self.short_side / min(image.shape[:2])
        rows, columns = (round(side * scale) for side in image.shape[:2])
        image = resize(image, (rows, columns), antialias=self.antialias)
        top, left = (rows - height) // 2, (columns - width) // 2
        return image[top : top + height, left : left + width]

    def normalise(self, images: np.ndarray) -> np.ndarray:
        """`images` (B, H, W, C) uint8 as float32: (images / 255 - mean) / std."""
        mean, std = np.asarray(self.mean, np.float64), np.asarray(self.std, np.float64)
        scale, shift = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
        return images.astype(np.float32) * scale + shift


def resize(image: np.ndarray, shape: tuple[int, int], *, antialias: bool = True) -> np.ndarray:
    """`image` (h, w, C) uint8 as (*shape, C) uint8: bilinear between pixel centres, rounded.

    With `antialias` an image that shrinks is averaged over as many pixels as go into one.
    """
    if image.shape[:2] == tuple(shape):
        return image
    rows = _weights(image.shape[0], shape[0], antialias)
    columns = _weights(image.shape[1], shape[1], antialias)
    channels_first = rows @ np.moveaxis(image.astype(np.float32), -1, 0) @ columns.T
    return np.moveaxis(np.clip(np.round(channels_first), 0, 255).astype(np.uint8), 0, -1)


@functools.lru_cache(maxsize=64)
def _weights(before: int, after: int, antialias: bool) -> np.ndarray:
    """The share (after, before) float32 of every old pixel in every new one, along one axis."""
    scale = before / after
    centre = (np.arange(after)[:, None] + 0.5) * scale - 0.5
    reach = max(scale, 1.0) if antialias else 1.0
    # Beyond the edge the nearest pixel goes on.
    centre = np.clip(centre, 0, before - 1) if reach == 1.0 else centre
    weights = np.maximum(0, 1 - np.abs(np.arange(before) - centre) / reach)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
