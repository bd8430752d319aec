"""Double digits: two handwritten digits on a coloured ground, 100 or 10 classes, no download.

    python -m dfs_jax.data.double_digits clean [--samples FILE.png]

draws the data set and prints what docs/double_digits.md tells of it: sizes, statistics and
digests. Here is what is drawn for which split, and the TFDS builder; how a picture is drawn is
in `double_digits_draw`.
"""

import hashlib
import sys
from collections.abc import Iterator, Sequence

import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from dfs_jax import command
from dfs_jax.data import augment, in_memory, pipeline, prepared
from dfs_jax.data import double_digits_draw as drawing
from dfs_jax.data.pipeline import Data

VARIANTS = tuple(drawing.STYLES)

# The parts, with the pictures and the source digits of each. The first two are the training
# split: its last pictures, which are held out for validation, have sources of their own too.
PICTURES = {"train": 45_000, "validation": 5_000, "test": 10_000}
SOURCES = {"train": 1197, "validation": 240, "test": 360}
SPLITS = {"train": ("train", "validation"), "test": ("test",)}
_SEED = 0  # of the sources' shares and of all that is drawn; changing it needs a new VERSION

# For normalization "own", which looks here under a data set's name; printed by the command above.
augment.STATISTICS.update(
    {
        "double_digits/clean": ((0.500091, 0.499985, 0.499718), (0.137520, 0.123947, 0.137226)),
        "double_digits/hard": ((0.500253, 0.499963, 0.499535), (0.218908, 0.172702, 0.218059)),
    }
)
augment.STATISTICS["double_digits/units"] = augment.STATISTICS["double_digits/clean"]


class DoubleDigits(tfds.core.GeneratorBasedBuilder):
    """Pictures of two of scikit-learn's digits, as TFDS splits `train` and `test`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012, the base class fixes its type
    BUILDER_CONFIGS = [  # noqa: RUF012, likewise
        tfds.core.BuilderConfig(name="clean", description="Little variation."),
        tfds.core.BuilderConfig(name="hard", description="Free colours, shear, stripes, noise."),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Two handwritten digits: the tens in light ink, the units in dark ink.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(drawing.SIDE, drawing.SIDE, 3)),
                    "label": tfds.features.ClassLabel(names=class_names()),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # classes come in random order, and validation comes last
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str):
        blocks = (block for part in SPLITS[split] for block in draw(self.builder_config.name, part))
        examples = (example for block in blocks for example in zip(*block, strict=True))
        for key, (image, label) in enumerate(examples):
            yield key, {"image": image, "label": int(label)}


def class_names() -> list[str]:
    """The tens and the units digit of each class: "00" to "99"."""
    return [f"{label:02d}" for label in range(drawing.CLASSES)]


# What a configuration can ask for: which pictures, and the names of the classes. With ten of them
# the class is the units digit, and the tens digit distracts.
TASKS = {
    **{variant: (variant, class_names()) for variant in VARIANTS},
    "units": ("clean", list("0123456789")),
}


def sources(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Ink (N, 8, 8) in [0, 1] and digits (N,) from which `part` is drawn; no two parts share any.

    The ink comes in scikit-learn's 17 steps.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    order = pipeline.permutation(sum(SOURCES.values()), _SEED, 0)
    shares = np.split(order, np.cumsum(list(SOURCES.values()))[:-1])
    chosen = dict(zip(SOURCES, shares, strict=True))[part]
    return digits.images[chosen] / 16, digits.target[chosen]


def draw(
    variant: str, part: str, count: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first `count` pictures of `part` (None: all), in blocks: see `drawing.draw`."""
    count = PICTURES[part] if count is None else count
    seed = (_SEED, list(PICTURES).index(part))
    return drawing.draw(drawing.STYLES[variant], *sources(part), seed, count)


def load(config: ml_collections.ConfigDict, task: str) -> Data:
    """The pictures of `task` as `config` says; validation is the end of the training split.

    Up to `data.validation_size=5000` validation shares no source digit with training.
    """
    variant, classes = TASKS[task]
    sizes = {split: sum(PICTURES[part] for part in parts) for split, parts in SPLITS.items()}
    arrays = prepared.read(_Variant(variant), config.data.dir, sizes)
    arrays = {k: (images, labels % len(classes)) for k, (images, labels) in arrays.items()}
    train, validation = in_memory.hold_out(arrays["train"], config.data.validation_size)
    return in_memory.create(
        config,
        name=f"double_digits/{task}",
        train=train,
        validation=validation,
        test=arrays["test"],
        class_names=classes,
    )


class _Variant:
    """What `prepared.read` takes for a builder class: DoubleDigits with its variant chosen."""

    def __init__(self, variant: str):
        self._variant = variant
        self.name = f"{DoubleDigits.name}/{variant}"  # the directory of its versions

    def __call__(self, *, data_dir: str | None) -> DoubleDigits:
        return DoubleDigits(config=self._variant, data_dir=data_dir)


def save_samples(variant: str, path: str) -> None:
    """Write a page of 40 training pictures with their labels to the PNG file `path`."""
    from matplotlib import figure

    ((images, labels),) = draw(variant, "train", 40)
    page = figure.Figure(figsize=(10, 4.6))
    for axes, image, label in zip(page.subplots(4, 10).flat, images, labels, strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(class_names()[label], fontsize=9, pad=2)
        axes.axis("off")
    page.tight_layout(pad=0.3)
    page.savefig(path, dpi=64)


def describe(variant: str) -> str:
    """Sizes and digests of the parts, and mean and standard deviation of the training split."""
    lines, moments = [], []
    for part in PICTURES:
        digest, counts = hashlib.sha256(), np.zeros(drawing.CLASSES, np.int64)
        for images, labels in draw(variant, part):
            digest.update(images.tobytes())
            counts += np.bincount(labels, minlength=drawing.CLASSES)
            if part in SPLITS["train"]:
                x = images / 255
                moments.append([x.mean((0, 1, 2)), (x * x).mean((0, 1, 2))])
        _, per_digit = np.unique(sources(part)[1], return_counts=True)
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
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--samples", metavar="FILE", help="write a page of samples to this PNG")

    def run(arguments, config):
        del config
        if arguments.samples:
            save_samples(arguments.variant, arguments.samples)
        print(describe(arguments.variant))

    return command.run(parser, argv, run)


if __name__ == "__main__":
    sys.exit(main())
