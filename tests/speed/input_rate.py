"""Images per second of CIFAR-sized training data that lies in memory, by augmentation.

    python -m tests.speed.input_rate

50,000 made images of 32×32, in batches of 500, cropped and flipped, and what else is printed. The
best of five measurements of 20 batches each; run it with nothing else on the machine. Other data is
measured by `dfs_jax.benchmark --input_only`.
"""

import itertools
import sys
import time

import jax
import numpy as np

from dfs_jax import config
from dfs_jax.data.input import in_memory

AUGMENTATIONS = (
    {"cutout": 16},
    {"cutout": 16, "autoaugment": "cifar10"},
    {"randaugment_layers": 2},
    {"mixup": 0.2, "cutmix": 1.0},
)
SIZE, BATCH, BATCHES = 50_000, 500, 20


def images_per_second(**augmentation) -> float:
    """The rate of batches with the fields `augmentation` of the section `data`."""
    c = config.default()
    c.data.update(crop_padding=4, crop_fill=128, flip=True, normalization="cifar10", **augmentation)
    c.train.batch_size = BATCH
    images = np.random.default_rng(0).integers(0, 256, (SIZE, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(SIZE) % 100
    names = [str(label) for label in range(100)]
    arrays = {"train": (images, labels), "validation": None, "test": (images[:10], labels[:10])}
    source = in_memory.from_arrays(c, name="made", class_names=names, **arrays).train
    batches = source.batches(0)
    jax.block_until_ready(next(batches))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(list(itertools.islice(batches, BATCHES)))
        seconds.append(time.perf_counter() - began)
    return BATCHES * BATCH / min(seconds)


def main() -> int:
    for augmentation in AUGMENTATIONS:
        print(f"{augmentation}: {images_per_second(**augmentation):,.0f} images/s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
