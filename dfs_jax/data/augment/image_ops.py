"""The image operations of AutoAugment, on the device, with the pixels that Pillow gives.

A list of (operation, magnitude) pairs becomes a `Table`; `operate` carries out one row of it on
one uint8 image (H, W, 3). Under `jax.vmap` every image may take another row: instead of one
branch per operation, of which a mapped `lax.switch` would run all, each image passes through
three stages whose parameters come from its row, and those that its operation does not need
leave the image as it is:

    geometry   an integer source position, then four taps along one axis (bicubic shears)
    levels     a table of 256 grey levels for each channel (posterize, equalize, ...)
    blending   degenerate + factor * (image - degenerate), the image enhancements

Whatever Pillow computes in double precision and depends on the row alone is done here once, in
NumPy. Which operation is drawn with which probability is the business of `autoaugment.py`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_FILL = 128  # grey level outside the image, in every channel
_ONE = 1 << 16  # Pillow's fixed point, for nearest neighbours under a general affine map

# Ways to the degenerate image of an enhancement.
_BLACK, _MEAN, _GREY, _SMOOTH = range(4)


class Table(NamedTuple):
    """What the three stages do, row by row; one row per (operation, magnitude).

    Pixel (y, x) of the result comes from column (m0 x + m1 y + m2) >> 16 and row
    (m3 x + m4 y + m5) >> 16 of the image, m being `matrix`. A shear adds `shift[line]` to the
    position along its axis and interpolates at `fraction[line]` beyond it; `line` is the other
    coordinate.
    """

    matrix: np.ndarray  # (A, 6) int32, in units of 2**-16
    vertical: np.ndarray  # (A,) bool: the shear moves pixels within columns
    shift: np.ndarray  # (A, max(H, W)) int32
    fraction: np.ndarray  # (A, max(H, W)) float32, in [0, 1]
    mask: np.ndarray  # (A,) int32, bits of the grey level that are kept
    threshold: np.ndarray  # (A,) int32, levels from here on are inverted
    stretch: np.ndarray  # (A,) bool, autocontrast
    equalize: np.ndarray  # (A,) bool
    degenerate: np.ndarray  # (A,) int32, _BLACK to _SMOOTH
    factor: np.ndarray  # (A, 2) float32, its upper bits and the rest


# One row of a table before it is one: the fields above, without their leading axis.
_Row = dict[str, object]


def _shear(vertical: bool) -> Callable[..., _Row]:
    def row(magnitude: float, height: int, width: int) -> _Row:
        lines = np.arange(max(height, width))
        # The centre of pixel 0 of each line, mapped, less the half pixel of Pillow's filter.
        position = 0.5 + magnitude * (lines + 0.5) - 0.5
        shift = np.floor(position)
        return {"vertical": vertical, "shift": shift, "fraction": position - shift}

    return row


def _translate(vertical: bool) -> Callable[..., _Row]:
    def row(magnitude: float, height: int, width: int) -> _Row:
        # Rounded down, once: Pillow treats maps without rotation apart from the others.
        pixels = math.floor(0.5 + magnitude * (height if vertical else width)) * _ONE
        return {
            "matrix": (_ONE, 0, 0, 0, _ONE, pixels) if vertical else (_ONE, 0, pixels, 0, _ONE, 0)
        }

    return row


def _rotate(magnitude: float, height: int, width: int) -> _Row:
    if magnitude == 0:
        return {}
    radians = -math.radians(magnitude)
    cos, sin = round(math.cos(radians), 15), round(math.sin(radians), 15)
    x, y = width / 2, height / 2  # the centre stays where it is
    a, b, c, d, e, f = cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y
    to_fixed = (a, b, c + 0.5 * a + 0.5 * b, d, e, f + 0.5 * d + 0.5 * e)
    return {"matrix": tuple(math.floor(value * _ONE + 0.5) for value in to_fixed)}


def _enhance(degenerate: int) -> Callable[..., _Row]:
    def row(magnitude: float, height: int, width: int) -> _Row:
        factor = np.float32(1 + magnitude)
        # Twelve bits of it, so that products with differences of grey levels are exact.
        upper = (factor.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
        return {"degenerate": degenerate, "factor": (upper, factor - upper)}

    return row


# The names of the AutoAugment paper (arXiv 1805.09501, table 6), with what its magnitude is.
_OPERATIONS: dict[str, Callable[[float, int, int], _Row]] = {
    "identity": lambda magnitude, height, width: {},
    "shearX": _shear(vertical=False),  # columns per row
    "shearY": _shear(vertical=True),
    "translateX": _translate(vertical=False),  # share of the width
    "translateY": _translate(vertical=True),
    "rotate": _rotate,  # degrees counter-clockwise
    "color": _enhance(_GREY),  # enhancement factor - 1
    # Bits kept, 1 to 8.
    "posterize": lambda bits, height, width: {"mask": 256 - (1 << (8 - int(bits)))},
    # Grey levels from here on are inverted.
    "solarize": lambda level, height, width: {"threshold": math.ceil(level)},
    "contrast": _enhance(_MEAN),
    "sharpness": _enhance(_SMOOTH),
    "brightness": _enhance(_BLACK),
    "autocontrast": lambda magnitude, height, width: {"stretch": True},  # magnitude unused
    "equalize": lambda magnitude, height, width: {"equalize": True},
    "invert": lambda magnitude, height, width: {"threshold": 0},
}


def tabulate(actions: Sequence[tuple[str, float]], height: int, width: int) -> Table:
    """The table of `actions`, each an operation and its magnitude, for H x W images.

    Operations that have a direction (shears, translations, rotation, enhancements) take their
    sign with the magnitude. Raises ValueError for an unknown operation.
    """
    count, lines = len(actions), max(height, width)
    table = Table(
        matrix=np.tile(np.array([_ONE, 0, 0, 0, _ONE, 0], np.int32), (count, 1)),
        vertical=np.zeros(count, bool),
        shift=np.zeros((count, lines), np.int32),
        fraction=np.zeros((count, lines), np.float32),
        mask=np.full(count, 255, np.int32),
        threshold=np.full(count, 256, np.int32),
        stretch=np.zeros(count, bool),
        equalize=np.zeros(count, bool),
        degenerate=np.full(count, _BLACK, np.int32),
        factor=np.tile(np.array([1, 0], np.float32), (count, 1)),
    )
    for i, (name, magnitude) in enumerate(actions):
        if name not in _OPERATIONS:
            raise ValueError(f"unknown operation {name!r}; known: {', '.join(_OPERATIONS)}")
        for field, value in _OPERATIONS[name](magnitude, height, width).items():
            getattr(table, field)[i] = value
    return table


def operate(table: Table, row: jax.Array, image: jax.Array) -> jax.Array:
    """`image` (H, W, 3) uint8 under row `row` () int32 of `table`; the same shape and type.

    The pixels are those of Pillow 13, except that a shear may be off by one grey level where
    its interpolation falls on a whole number (it is done in single precision).
    """
    at = Table(*(jnp.asarray(field)[row] for field in table))
    planes = _stored(jnp.transpose(image, (2, 0, 1)))  # one channel after another
    for stage in (_geometry, _levels, _blend):
        planes = _stored(stage(at, planes.astype(jnp.int32)))
    return jnp.transpose(planes, (1, 2, 0))


def _stored(values: jax.Array) -> jax.Array:
    """`values` (..., n), computed once.

    XLA would otherwise fuse what is computed into each place that reads it, and do it again for
    every read; an optimization barrier is gone by then. A scatter is fused with its input alone.
    """
    lines = values.reshape(-1, values.shape[-1])
    places = jnp.arange(len(lines), dtype=jnp.int32)
    return jnp.zeros_like(lines).at[places].set(lines, unique_indices=True).reshape(values.shape)


def _geometry(at: Table, planes: jax.Array) -> jax.Array:
    _, height, width = planes.shape
    y = jnp.arange(height, dtype=jnp.int32)[:, None]
    x = jnp.arange(width, dtype=jnp.int32)[None, :]
    line = jnp.where(at.vertical, x, y)
    shift, d = at.shift[line], at.fraction[line]
    m = at.matrix
    column = ((m[0] * x + m[1] * y + m[2]) >> 16) + jnp.where(at.vertical, 0, shift)
    row = ((m[3] * x + m[4] * y + m[5]) >> 16) + jnp.where(at.vertical, shift, 0)
    right, down = jnp.where(at.vertical, 0, 1), jnp.where(at.vertical, 1, 0)
    # Pillow looks whether the nearest pixel is inside, whatever the filter.
    nearest = (d >= 0.5).astype(jnp.int32)
    near_row, near_column = row + nearest * down, column + nearest * right
    inside = (near_row >= 0) & (near_row < height) & (near_column >= 0) & (near_column < width)

    flat = planes.reshape(3, height * width)

    def tap(offset: int) -> jax.Array:
        r = jnp.clip(row + offset * down, 0, height - 1)
        c = jnp.clip(column + offset * right, 0, width - 1)
        return flat[:, r * width + c].astype(jnp.float32)

    v0, v1, v2, v3 = (tap(offset) for offset in (-1, 0, 1, 2))
    # Cubic convolution with a = -1. In this form equal taps give exactly their value.
    value = v1 + d * ((v2 - v0) + d * ((2 * (v0 - v1) + v2 - v3) + d * (v1 - v0 + v3 - v2)))
    value = jnp.clip(value, 0, 255).astype(jnp.uint8)  # rounded down, as Pillow does
    return jnp.where(inside, value, jnp.uint8(_FILL))


def _levels(at: Table, planes: jax.Array) -> jax.Array:
    level = jnp.arange(256, dtype=jnp.int32)
    lut = level & at.mask
    lut = jnp.where(level >= at.threshold, 255 - lut, lut)
    lut = jnp.where(at.stretch, _stretched(level, planes), lut)
    channel = 256 * jnp.arange(3, dtype=jnp.int32)[:, None, None]
    cells = planes + channel  # in a flattened (3, 256)
    counts = jnp.zeros(3 * 256, jnp.int32).at[cells.reshape(-1)].add(1).reshape(3, 256)
    lut = jnp.where(at.equalize, _equalized(level, counts), lut)
    return _stored(lut.astype(jnp.uint8)).reshape(-1)[cells]


def _equalized(level: jax.Array, counts: jax.Array) -> jax.Array:
    below = jnp.cumsum(counts, axis=1) - counts
    last = jnp.max(jnp.where(counts > 0, level, 0), axis=1, keepdims=True)
    pixels = jnp.sum(counts[0])
    step = (pixels - jnp.sum(jnp.where(level == last, counts, 0), axis=1, keepdims=True)) // 255
    lut = (step // 2 + below) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.minimum(lut, 255), level)


def _stretched(level: jax.Array, planes: jax.Array) -> jax.Array:
    low = jnp.min(planes, axis=(1, 2))[:, None]
    span = jnp.max(planes, axis=(1, 2))[:, None] - low
    numerator, divisor = 255 * (level - low), jnp.maximum(span, 1)
    lut = numerator // divisor
    first, parts, short = map(jnp.asarray, _short_by_one())
    number = first[span] + low * parts[span] + lut * parts[span] // 255 - 1
    exact = (lut * divisor == numerator) & (level > low)
    lut = jnp.clip(lut - (exact & short[jnp.clip(number, 0, len(short) - 1)]), 0, 255)
    return jnp.where(span > 0, lut, level)


@functools.cache
def _short_by_one() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where Pillow's autocontrast, in double precision, falls short of a whole number.

    Levels low to low + span go to 255 (level - low) / span, rounded down. Of the whole numbers
    among these, n = 255 j / parts[span] for j = 1 to parts[span], some come out just below and
    lose a level: those where element first[span] + low * parts[span] + j - 1 of the third array
    holds.
    """
    spans = range(1, 256)
    parts = np.array([1, *(math.gcd(255, span) for span in spans)], np.int32)
    first, short = [0], []
    for span in spans:
        first.append(sum(map(len, short)))
        low = np.arange(256 - span, dtype=np.float64)[:, None]
        j = np.arange(1, parts[span] + 1)
        scale = 255.0 / span
        levels = (low + j * (span // parts[span])) * scale + -low * scale
        short.append((levels.astype(np.int64) < 255 * j // parts[span]).reshape(-1))
    return np.array(first, np.int32), parts, np.concatenate(short)


def _blend(at: Table, planes: jax.Array) -> jax.Array:
    red, green, blue = planes
    # ITU-R 601-2 luma in Pillow's fixed point.
    grey = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
    mean = (2 * jnp.sum(grey) + grey.size) // (2 * grey.size)
    start = jnp.where(at.degenerate == _GREY, grey, jnp.where(at.degenerate == _MEAN, mean, 0))
    start = jnp.where(at.degenerate == _SMOOTH, _smooth(planes), start)
    difference = (planes - start).astype(jnp.float32)
    # Both products are exact, so that this is factor * difference rounded once, as Pillow has
    # it, whether or not the compiler contracts products and sums.
    scaled = at.factor[0] * difference + at.factor[1] * difference
    return jnp.clip(start.astype(jnp.float32) + scaled, 0, 255).astype(jnp.uint8)


def _smooth(planes: jax.Array) -> jax.Array:
    """Weights 1 around a 5, over 13; pixels of the border stay as they are."""
    rows = planes[:, :-2] + planes[:, 1:-1] + planes[:, 2:]
    around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = (2 * (around + 4 * planes[:, 1:-1, 1:-1]) + 13) // 26
    return planes.at[:, 1:-1, 1:-1].set(inner)
