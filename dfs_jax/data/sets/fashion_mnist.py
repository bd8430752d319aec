"""Fashion-MNIST (arXiv 1708.07747): 70,000 photographs of clothes, 28×28 grey, ten classes.

60,000 to train on, 10,000 to test. They come from TFDS where it is prepared, else from the four IDX
files in `data.dir`, else from those of the package dataset-fashion-mnist of Debian and Ubuntu:
the same examples in the same order.
"""

import hashlib
from pathlib import Path

import ml_collections

from dfs_jax.data.input import in_memory
from dfs_jax.data.input.in_memory import Arrays
from dfs_jax.data.pipeline import Data, DataError
from dfs_jax.data.sets import builders, idx

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
PACKAGE = "/usr/share/datasets/fashion-mnist"

_SIZES = {"train": 60_000, "test": 10_000}

# SHA-256 of each file, uncompressed: images and labels.
_CHECKSUMS = {
    "train": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    "test": (
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}


def load(config: ml_collections.ConfigDict) -> Data:
    """Fashion-MNIST as `config` says; validation examples come off the end of the training split.

    Raises DataError, saying how to get them, where the data are nowhere, and for files that are
    not the published ones.
    """
    splits = _prepared(config.data.dir) or _published(config.data.dir)
    splits = {split: idx.in_order(*arrays) for split, arrays in splits.items()}
    return in_memory.from_splits(config, splits, CLASSES)


def _prepared(data_dir: str | None) -> dict[str, Arrays] | None:
    """Both splits as TFDS has prepared them, None where it has not."""
    builder = builders.if_prepared("fashion_mnist", data_dir)
    return builder and builders.read_splits(builder, _SIZES)


def _published(data_dir: str | None) -> dict[str, Arrays]:
    folders = [folder for folder in (data_dir, PACKAGE) if folder and _has_files(folder)]
    if not folders:
        raise DataError(
            f"Fashion-MNIST is neither in {' nor in '.join(filter(None, (data_dir, PACKAGE)))}, "
            "nor prepared by TFDS; apt-get install dataset-fashion-mnist, or put "
            "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz "
            "and t10k-labels-idx1-ubyte.gz into a folder and name it by data.dir"
        )
    contents = idx.read(folders[0])
    for split, sums in _CHECKSUMS.items():
        for kind, data, wanted in zip(("images", "labels"), contents[split], sums, strict=True):
            if hashlib.sha256(data).hexdigest() != wanted:
                raise DataError(
                    f"the {split} {kind} in {folders[0]} are not those of Fashion-MNIST (SHA-256); "
                    f"get the file anew, or read it as it is with data.name=idx:{folders[0]}"
                )
    return {split: idx.parse(folders[0], split, *pair) for split, pair in contents.items()}


def _has_files(folder: str) -> bool:
    return any(Path(folder).expanduser().glob("*-idx?-ubyte*"))
