"""Drawing two digits on a textured ground: the pictures of the data set `double_digits`.

Numpy alone, a block of pictures at a time. Everything random is uniform numbers straight from
the bits of a counter-based generator, and pixels come from sums, products, quotients and
roundings in float64, which every machine rounds alike; sines, matrix products and sums over
axes do not have that property and are avoided. So a seed gives the same bytes everywhere.
Which digits are drawn for which split, and how pictures are stored, is in `double_digits.py`.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

SIDE = 32  # pixels
CLASSES = 100  # 10 * tens + units
BLOCK = 500  # pictures that are drawn together; they hold every class equally often
_KNOT = 4  # pixels between the knots of a ground's texture

Range = tuple[float, float]  # a uniform draw between the two


@dataclasses.dataclass(frozen=True)
class Style:
    """How pictures vary. Colours are on the scale [0, 1]; luminance is (R + 2 G + B) / 4."""

    scale: Range  # pixels of the picture for one pixel of the source digit
    turn: float  # largest rotation, radians (within one per cent)
    shear: float  # largest shift of a row against the one above it, in source pixels
    beyond: float  # pixels by which a digit's 8×8 box may reach over the edge
    ground: Range  # luminance of the ground
    contrast: Range  # luminance by which ink is lighter (tens) or darker (units) than the ground
    chroma: float  # largest deviation of a channel before its luminance is set
    texture: float  # amplitude of the ground's unevenness, which has no colour
    grain: float  # amplitude of noise in every pixel and channel
    stripe: Range  # width in pixels of a stripe of ground colours over both digits


STYLES = {
    "clean": Style(
        scale=(1.5, 2.1),
        turn=0.15,
        shear=0.0,
        beyond=0.0,
        ground=(0.43, 0.57),
        contrast=(0.2, 0.4),
        chroma=0.15,
        texture=0.1,
        grain=0.04,
        stripe=(0.0, 0.0),
    ),
    "hard": Style(
        scale=(1.3, 2.3),
        turn=0.35,
        shear=0.3,
        beyond=2.0,
        ground=(0.35, 0.65),
        contrast=(0.15, 0.35),
        chroma=0.35,
        texture=0.12,
        grain=0.04,
        stripe=(1.0, 4.0),
    ),
}


def draw(
    style: Style, digits: np.ndarray, targets: np.ndarray, seed: tuple[int, ...], count: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first `count` pictures of an endless row that `seed`, integers >= 0, chooses.

    Source `digits` (N, 8, 8) are ink from 0 (none) to 1 and show `targets` (N,) in 0-9. Yields
    images (B, 32, 32, 3) uint8 and labels (B,) int64, where B is BLOCK but for the last block.
    A whole block holds each class equally often, in random order. Raises ValueError unless all
    ten digits are among the sources.
    """
    if not np.array_equal(np.unique(targets), np.arange(10)):
        raise ValueError(f"sources must show all ten digits, not {np.unique(targets).tolist()}")
    for block, done in enumerate(range(0, count, BLOCK)):
        bits = np.random.Philox(np.random.SeedSequence((*seed, block)))
        images, labels = _block(style, digits, targets, np.random.Generator(bits).random)
        yield images[: count - done], labels[: count - done]


def _block(style, digits, targets, uniform):
    labels = np.argsort(uniform(BLOCK), kind="stable") % CLASSES
    ground = _between(style.ground, uniform(BLOCK))
    image = _ground(style, ground, uniform)

    layers = []
    for digit, sign in ((labels // 10, 1), (labels % 10, -1)):
        source = digits[_choose(targets, digit, uniform(BLOCK))]
        luminance = ground + sign * _between(style.contrast, uniform(BLOCK))
        layers.append((_digit(style, source, uniform), _colour(style, luminance, uniform)))
    swapped = _wide(uniform(BLOCK) < 0.5)[..., None]
    for tens_first in (True, False):  # unless swapped; what is painted last stands in front
        first, second = layers if tens_first else layers[::-1]
        pairs = zip(first, second, strict=True)
        image = _paint(image, *(np.where(swapped, b, a) for a, b in pairs))

    if style.stripe[1] > 0:
        colour = _colour(style, _between(style.ground, uniform(BLOCK)), uniform)
        image = _paint(image, _stripe(style, uniform), colour)
    image = image + style.grain * _signed(uniform(image.shape))
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8), labels


def _ground(style, luminance, uniform):
    """An uneven ground (B, 32, 32, 3): random knots, and straight lines between them."""
    knots = _signed(uniform((BLOCK, SIDE // _KNOT + 2, SIDE // _KNOT + 2)))
    row, column = uniform((2, BLOCK))  # of the corner, so that knots fall on any pixel
    steps = np.arange(SIDE) / _KNOT
    uneven = _bilinear(knots, _wide(row) + steps[:, None], _wide(column) + steps)
    return _colour(style, luminance, uniform) + style.texture * uneven[..., None]


def _choose(targets, digit, u):
    """One source (B,) for each `digit` (B,), at the share `u` (B,) of those that show it."""
    order = np.argsort(targets, kind="stable")
    counts = np.bincount(targets, minlength=10)
    first = np.cumsum(counts) - counts
    return order[first[digit] + (u * counts[digit]).astype(np.int64)]


def _digit(style, source, uniform):
    """What the ink of `source` (B, 8, 8) covers of every pixel: (B, 32, 32, 1) in [0, 1]."""
    scale = _between(style.scale, uniform(BLOCK))
    cosine, sine = _rotation(style.turn / 2 * _signed(uniform(BLOCK)))
    shear = style.shear * _signed(uniform(BLOCK))
    margin = 4 * scale - 0.5 - style.beyond  # from the edge to the centres of upright boxes
    centre = margin + (SIDE - 1 - 2 * margin) * uniform((2, BLOCK))
    down, right = _offsets(centre)
    rows = (cosine * down - sine * right) / _wide(scale)
    columns = (sine * down + cosine * right) / _wide(scale) - _wide(shear) * rows
    # A border without ink, onto which everything outside is mapped.
    bordered = np.pad(source, ((0, 0), (1, 1), (1, 1)))
    ink = _bilinear(bordered, np.clip(rows + 4.5, 0, 9), np.clip(columns + 4.5, 0, 9))
    return np.clip(2 * ink - 0.4, 0, 1)[..., None]  # steeper: enlarging has blurred the strokes


def _stripe(style, uniform):
    """What a straight stripe of any direction covers of every pixel: (B, 32, 32, 1)."""
    width = _wide(_between(style.stripe, uniform(BLOCK)))
    cosine, sine = _rotation(_signed(uniform(BLOCK)))
    down, right = _offsets((SIDE - 1) * uniform((2, BLOCK)))
    distance = np.abs(cosine * down - sine * right)
    return np.clip(width / 2 + 0.5 - distance, 0, 1)[..., None]


def _colour(style, luminance, uniform):
    """A random colour (B, 1, 1, 3) of `luminance` (B,)."""
    offset = style.chroma * _signed(uniform((BLOCK, 3)))
    grey = (offset[:, 0] + 2 * offset[:, 1] + offset[:, 2]) / 4
    return (offset + (luminance - grey)[:, None])[:, None, None]


def _paint(image, coverage, colour):
    return image + coverage * (colour - image)


def _rotation(half):
    """Cosine and sine (B, 1, 1) of the angle whose half has the tangent `half` (B,)."""
    square = _wide(half * half)
    return (1 - square) / (1 + square), 2 * _wide(half) / (1 + square)


def _offsets(centre):
    """Rows (B, 32, 1) and columns (B, 1, 32) of all pixels, from `centre` (2, B)."""
    grid = np.arange(SIDE, dtype=np.float64)
    return grid[:, None] - _wide(centre[0]), grid - _wide(centre[1])


def _bilinear(maps, rows, columns):
    """`maps` (B, H, W) read between their entries, at `rows` and `columns` in [0, side - 1]."""
    height, width = maps.shape[1:]
    top = np.minimum(rows.astype(np.int64), height - 2)
    left = np.minimum(columns.astype(np.int64), width - 2)
    lower, right = rows - top, columns - left
    start = np.arange(len(maps))[:, None, None] * (height * width) + top * width + left
    flat = maps.ravel()
    upper_line = flat[start] * (1 - right) + flat[start + 1] * right
    lower_line = flat[start + width] * (1 - right) + flat[start + width + 1] * right
    return upper_line * (1 - lower) + lower_line * lower


def _between(limits: Range, u):
    return limits[0] + (limits[1] - limits[0]) * u


def _signed(u):
    """Uniform numbers on [0, 1) as ones on [-1, 1)."""
    return 2 * u - 1


def _wide(per_picture):
    """(B,) as (B, 1, 1)."""
    return per_picture[:, None, None]
