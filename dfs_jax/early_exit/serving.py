"""Answers for image files from a bundle, one after another, and what is told meanwhile.

A file becomes pixels as in training (`data/input/pictures.py`). How images share batches is in
`router.py`.
"""

import collections
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dfs_jax.early_exit.bundle import EarlyExit
from dfs_jax.early_exit.preprocessing import Preprocessing

_MANY = 100  # images, from which on progress is told
_TOLD = 10  # times


class Prediction(NamedTuple):
    """The answer for one image."""

    image: str  # the file
    label: str
    confidence: float
    exit: int  # from 1
    cost: int  # multiply-adds


def predictions(
    early_exit: EarlyExit, files: Sequence[str], budget: float | None, failures: list[str]
) -> Iterator[Prediction]:
    """The answers to `files` in their order, read as they are needed.

    A file that is no image is told on standard error, added to `failures` and left out; where
    files are many, so is a line every tenth of the way. Raises ValueError if the bundle has no
    thresholds for `budget`.
    """
    asked: collections.deque[str] = collections.deque()

    def requests() -> Iterator[np.ndarray]:
        for file in files:
            try:
                image = read_image(file, early_exit.preprocessing)
            except Exception as error:  # whatever it is, the other files are answered
                reason = str(error) or type(error).__name__
                if isinstance(error, OSError):
                    reason = f"cannot be read: {error.strerror or error}"
                print(f"{file}: {reason}", file=sys.stderr, flush=True)
                failures.append(file)
                continue
            asked.append(file)
            yield image[None]

    start, told, total = time.monotonic(), 0, len(files)
    for number, answers in enumerate(early_exit.serve(requests(), budget=budget), 1):
        done = number + len(failures)
        if total >= _MANY and done * _TOLD // total > told:
            told = done * _TOLD // total
            rate = done / max(time.monotonic() - start, 1e-9)
            line = f"image {done}/{total} ({done / total:.0%})  {rate:,.0f} images/s"
            print(line, file=sys.stderr, flush=True)
        (label,), (exit_index,), (confidence,) = answers.labels, answers.exits, answers.confidence
        yield Prediction(
            image=asked.popleft(),
            label=early_exit.labels[label],
            confidence=float(confidence),
            exit=int(exit_index) + 1,
            cost=early_exit.costs[exit_index],
        )


def read_image(file: str, preprocessing: Preprocessing) -> np.ndarray:
    """The image in `file` as (H, W, C) uint8 for the network; raises OSError or ValueError."""
    from dfs_jax.data.input import pictures

    with open(file, "rb") as opened:
        data = opened.read()
    return preprocessing.fit(pictures.decode(data, preprocessing.image_shape[-1]))
