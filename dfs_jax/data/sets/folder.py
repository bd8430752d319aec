"""Own images in folders, one for each class: `data.name="folder"`, `data.dir` the tree.

    DIR/train/CLASS/*.jpg      and, read in the same way, DIR/val and DIR/test

The test split is `test`, else `val`, else as many images of `train` as `data.validation_size`
holds out. Classes are the folders of `train`, in sorted order. Files end in .jpg, .jpeg or .png,
in letters of any size; other files and hidden ones are left alone.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import ml_collections
import numpy as np
from etils import epath

from dfs_jax.config import ConfigError
from dfs_jax.data.input import order, streamed
from dfs_jax.data.input.records import Indexed
from dfs_jax.data.pipeline import Data, DataError

if TYPE_CHECKING:
    import tensorflow as tf

_ENDINGS = (".jpg", ".jpeg", ".png")
_ORDER_SEED = 0  # of which training images are held out


def load(config: ml_collections.ConfigDict) -> Data:
    """The image folders as `config` says. Raises ConfigError or DataError, naming the folder."""
    streamed.check_config(config)
    if not config.data.dir:
        raise ConfigError("data.dir: give the folder that holds train/CLASS/*.jpg")
    root = epath.Path(config.data.dir).expanduser()
    if not (root / "train").is_dir():
        raise DataError(f"there is no folder {root / 'train'}; it should hold a folder per class")
    classes = [folder.name for folder in _folders(root / "train")]
    splits = {
        name: _read_split(root / name, classes)
        for name in ("train", "val", "test")
        if (root / name).is_dir()
    }
    # Sorted by class as they are, the last images would all be of one class.
    train = splits["train"]
    train = train.chosen(order.permutation(train.size, _ORDER_SEED, 0))
    if "test" in splits or "val" in splits:
        test = splits.get("test") or splits["val"]
    else:
        train, test = _split_off(train, config.data.validation_size, root)
    return streamed.from_records(
        config,
        name=root.name,
        train=train,
        test=test,
        own_validation=splits.get("val") if "test" in splits else None,
        class_names=classes,
    )


class Images(Indexed):
    """`records.Records` of image files; a stored record is the path of one."""

    def __init__(self, paths: Sequence[str], labels: np.ndarray):
        self.size = len(paths)
        self._paths, self._labels = paths, labels.astype(np.int32)

    def where(self, index: int) -> str:
        """See `Records`."""
        return self._paths[index]

    def parse(self, raw: "tf.Tensor", index: "tf.Tensor") -> "tuple[tf.Tensor, tf.Tensor]":
        """See `Records`."""
        import tensorflow as tf

        return tf.io.read_file(raw), tf.gather(tf.constant(self._labels), index)

    def chosen(self, numbers: np.ndarray) -> "Images":
        """The images `numbers` (n,), in this order."""
        return Images([self._paths[i] for i in numbers], self._labels[numbers])

    def _read(self, number: Callable[[int], int], count: int, ahead: int) -> Iterator[bytes]:
        # The files themselves are read where they are decoded, many at once.
        return (os.fsencode(self._paths[number(k)]) for k in range(count))


def _folders(parent: epath.Path) -> list[epath.Path]:
    return sorted(p for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))


def _read_split(folder: epath.Path, classes: Sequence[str]) -> Images:
    paths, labels = [], []
    for child in _folders(folder):
        if child.name not in classes:
            raise DataError(f"{child}: train has no class {child.name!r}")
        found = sorted(
            os.fspath(path)
            for path in child.iterdir()
            if path.name.lower().endswith(_ENDINGS) and not path.name.startswith(".")
        )
        if not found:
            raise DataError(f"the class folder {child} has no images ({', '.join(_ENDINGS)})")
        paths += found
        labels += [classes.index(child.name)] * len(found)
    if not paths:
        raise DataError(f"{folder} has no folders; it should hold one per class")
    return Images(paths, np.array(labels))


def _split_off(train: Images, size: int, root: epath.Path) -> tuple[Images, Images]:
    if not 0 < 2 * size < train.size:
        raise ConfigError(
            f"{root} has neither test nor val, so data.validation_size images of train are held "
            f"out for testing and as many for validation; {size} does not fit, give 1 to "
            f"{(train.size - 1) // 2}"
        )
    numbers = np.arange(train.size)
    return train.chosen(numbers[:-size]), train.chosen(numbers[-size:])
