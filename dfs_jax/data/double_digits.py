"""The command that draws the double digits and prints what docs/double_digits.md tells of them.

    python -m dfs_jax.data.double_digits clean [--samples FILE.png]

Sizes, statistics and digests; `--samples` also writes a page of pictures.
"""

import hashlib
import sys
from collections.abc import Sequence

import numpy as np

from dfs_jax.config import command
from dfs_jax.data.sets import double_digits
from dfs_jax.data.sets.double_digits_drawing import CLASSES


def save_samples(variant: str, path: str) -> None:
    """Write a page of 40 training pictures with their labels to the PNG file `path`."""
    from matplotlib import figure

    ((images, labels),) = double_digits.pictures(variant, "train", 40)
    page = figure.Figure(figsize=(10, 4.6))
    for axes, image, label in zip(page.subplots(4, 10).flat, images, labels, strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(double_digits.class_names()[label], fontsize=9, pad=2)
        axes.axis("off")
    page.tight_layout(pad=0.3)
    page.savefig(path, dpi=64)


def describe(variant: str) -> str:
    """Sizes and digests of the parts, and mean and standard deviation of the training split."""
    lines, moments = [], []
    for part in double_digits.PICTURES:
        digest, counts = hashlib.sha256(), np.zeros(CLASSES, np.int64)
        for images, labels in double_digits.pictures(variant, part):
            digest.update(images.tobytes())
            counts += np.bincount(labels, minlength=CLASSES)
            if part in double_digits.SPLITS["train"]:
                x = images / 255
                moments.append([x.mean((0, 1, 2)), (x * x).mean((0, 1, 2))])
        _, per_digit = np.unique(double_digits.sources(part)[1], return_counts=True)
        lines.append(
            f"{part}: {counts.sum()} pictures, {counts.min()} to {counts.max()} of a class, from "
            f"{per_digit.sum()} source digits, {per_digit.min()} to {per_digit.max()} of a kind; "
            f"sha256 {digest.hexdigest()[:16]}"
        )
    mean, square = np.mean(moments, 0)
    for name, value in (("mean", mean), ("standard deviation", np.sqrt(square - mean * mean))):
        lines.append(f"{name} of the training split: {', '.join(f'{v:.6f}' for v in value)}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command with arguments `argv`."""
    parser = command.parser(__doc__)
    parser.add_argument("variant", choices=double_digits.VARIANTS)
    parser.add_argument("--samples", metavar="FILE", help="write a page of samples to this PNG")

    def run(arguments, config):
        if arguments.samples:
            save_samples(arguments.variant, arguments.samples)
        print(describe(arguments.variant))

    return command.run(parser, argv, run)


if __name__ == "__main__":
    sys.exit(main())
