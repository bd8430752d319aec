"""Double digits: two handwritten digits on a coloured ground, 100 or 10 classes, no download.

Here is what is drawn for which split, and the TFDS builder; how a picture is drawn is in
`double_digits_drawing.py`. `python -m dfs_jax.data.double_digits` shows the pictures.
"""

from collections.abc import Iterator

import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from dfs_jax.data.input import in_memory, order
from dfs_jax.data.pipeline import Data
from dfs_jax.data.sets import builders
from dfs_jax.data.sets import double_digits_drawing as drawing

VARIANTS = tuple(drawing.STYLES)

# The parts, with the pictures and the source digits of each. The first two are the training
# split: its last pictures, which are held out for validation, have sources of their own too.
PICTURES = {"train": 45_000, "validation": 5_000, "test": 10_000}
SOURCES = {"train": 1197, "validation": 240, "test": 360}
SPLITS = {"train": ("train", "validation"), "test": ("test",)}

_SEED = 0  # of the sources' shares and of all that is drawn; changing it needs a new VERSION


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
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str):
        blocks = (
            block for part in SPLITS[split] for block in pictures(self.builder_config.name, part)
        )
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
    shuffled = order.permutation(sum(SOURCES.values()), _SEED, 0)
    shares = np.split(shuffled, np.cumsum(list(SOURCES.values()))[:-1])
    chosen = dict(zip(SOURCES, shares, strict=True))[part]
    return digits.images[chosen] / 16, digits.target[chosen]


def pictures(
    variant: str, part: str, count: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first `count` pictures of `part` (None: all), in blocks: see `drawing.draw`."""
    count = PICTURES[part] if count is None else count
    seed = (_SEED, list(PICTURES).index(part))
    return drawing.draw(drawing.STYLES[variant], *sources(part), seed, count)


def load(config: ml_collections.ConfigDict) -> Data:
    """The pictures as `config` says; validation is the end of the training split.

    Up to `data.validation_size=5000` validation shares no source digit with training.
    """
    variant, classes = TASKS[config.data.name.removeprefix("double_digits/")]
    sizes = {split: sum(PICTURES[part] for part in parts) for split, parts in SPLITS.items()}
    builder = builders.open_or_prepare(DoubleDigits, config.data.dir, variant)
    arrays = builders.read_splits(builder, sizes)
    arrays = {k: (images, labels % len(classes)) for k, (images, labels) in arrays.items()}
    return in_memory.from_splits(config, arrays, classes)
