"""Answers for image files from an exported bundle.

    python -m dfs_jax.predict --bundle BUNDLE [--budget COST] [--json] IMAGE…

Every image gets its label, the confidence of the exit that answered, which exit that was, and
what the answer cost in multiply-adds: in a table, or as JSON lines while it goes on. With
`--budget 100e6` the most accurate thresholds are used whose mean cost per image, as measured on
the validation split, is at most that. A file that is no image is named on standard error and the
others are answered; the exit status then is 1.
"""

import argparse
import collections
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfs_jax.config import ConfigError, command
from dfs_jax.config.tables import format_table
from dfs_jax.early_exit.bundle import BundleError, EarlyExit
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


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command with arguments `argv`."""
    parser = command.parser(__doc__)
    parser.add_argument("--bundle", required=True, metavar="BUNDLE", help="an exported network")
    parser.add_argument("--budget", type=float, metavar="COST", help="multiply-adds per image")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    failures: list[str] = []
    status = command.run(parser, argv, lambda arguments, _: _predict(arguments, failures))
    return status or int(bool(failures))


def _predict(arguments: argparse.Namespace, failures: list[str]) -> None:
    try:
        early_exit = EarlyExit.load(arguments.bundle)
    except BundleError as error:
        raise ConfigError(f"--bundle: {error}") from error
    try:
        early_exit.within(arguments.budget)
    except ValueError as error:
        raise ConfigError(f"--budget: {error}") from error
    answers = predictions(early_exit, arguments.images, arguments.budget, failures)
    answers = _with_progress(answers, len(arguments.images), failures)
    if arguments.json:
        for prediction in answers:
            print(_json_line(prediction), flush=True)
    else:
        rows = list(answers)
        if rows:
            print(_table(rows))
    if failures:
        count = len(arguments.images)
        print(f"{len(failures)} of {count} files could not be read as images", file=sys.stderr)


def predictions(
    early_exit: EarlyExit, files: Sequence[str], budget: float | None, failures: list[str]
) -> Iterator[Prediction]:
    """The answers to `files` in their order, read as they are needed.

    A file that is no image is told on standard error, added to `failures` and left out. Raises
    ValueError if the bundle has no thresholds for `budget`.
    """
    asked: collections.deque[str] = collections.deque()

    def requests() -> Iterator[np.ndarray]:
        for file in files:
            try:
                image = read_image(file, early_exit.preprocessing)
            except (OSError, ValueError) as error:
                print(f"{file}: {_reason(error)}", file=sys.stderr, flush=True)
                failures.append(file)
                continue
            asked.append(file)
            yield image[None]

    for answers in early_exit.serve(requests(), budget=budget):
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
    from PIL import Image, ImageOps

    modes = {1: "L", 3: "RGB"}
    channels = preprocessing.image_shape[-1]
    if channels not in modes:
        raise ValueError(f"the network takes {channels} channels, which no image file has")
    try:
        with Image.open(file) as image:
            pixels = np.asarray(ImageOps.exif_transpose(image).convert(modes[channels]))
    except (Image.DecompressionBombError, SyntaxError) as error:  # what Pillow raises besides
        raise ValueError(str(error)) from error
    return preprocessing.fit(pixels.reshape(*pixels.shape[:2], channels))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "cannot be read as an image" if isinstance(error, OSError) else str(error)


def _with_progress(
    answers: Iterator[Prediction], total: int, failures: Sequence[str]
) -> Iterator[Prediction]:
    """The same answers; where they are many, a line on standard error every tenth of the way."""
    start, told = time.monotonic(), 0
    for done, prediction in enumerate(answers, 1):
        done += len(failures)
        if total >= _MANY and done * _TOLD // total > told:
            told = done * _TOLD // total
            rate = done / max(time.monotonic() - start, 1e-9)
            print(
                f"image {done}/{total} ({done / total:.0%})  {rate:,.0f} images/s",
                file=sys.stderr,
                flush=True,
            )
        yield prediction


def _json_line(prediction: Prediction) -> str:
    fields: dict[str, Any] = prediction._asdict()
    if not math.isfinite(prediction.confidence):
        fields["confidence"] = None
    return json.dumps(fields, allow_nan=False)


def _table(rows: Sequence[Prediction]) -> str:
    headers = ("image", "label", "confidence", "exit", "cost (M)")
    return format_table(
        [(p.image, p.label, p.confidence, p.exit, f"{p.cost / 1e6:.3f}") for p in rows], headers
    )


if __name__ == "__main__":
    sys.exit(main())
