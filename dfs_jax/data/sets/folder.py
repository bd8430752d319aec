"""Own images in folders, one for each class: `data.name="folder"`, `data.dir` the tree.

    DIR/train/CLASS/*.jpg      and, read in the same way, DIR/val and DIR/test

The test split is `test`, else `val` (also called `valid` or `validation`), else as many images of
`train` as `data.validation_size` holds out. Classes are the folders of `train`, in sorted order.
Which files count is told in `image_files.py`; those that are not used are counted and told.

Held out are the files with the smallest SHA-256 of CLASS/FILE, so that one more image moves one at
most. A run that goes on holds out the files that it began with, by name: files that come later are
trained on.
"""

import collections
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import ml_collections
import numpy as np
from etils import epath

from dfs_jax.config import ConfigError
from dfs_jax.data import record
from dfs_jax.data.input import order, streamed
from dfs_jax.data.input.pictures import ENDINGS
from dfs_jax.data.input.records import Indexed
from dfs_jax.data.pipeline import Data, DataError
from dfs_jax.data.record import Record, Split
from dfs_jax.data.sets import image_files
from dfs_jax.data.sets.image_files import Found, ImageFile
from dfs_jax.writing.files import absolute

if TYPE_CHECKING:
    import tensorflow as tf

log = logging.getLogger(__name__)

_VALIDATION = ("val", "valid", "validation")  # names of one split


def load(config: ml_collections.ConfigDict, known: Record | None = None) -> Data:
    """The image folders as `config` says; `known` is what the run has noted of them.

    Raises ConfigError or DataError, naming the folder or the file.
    """
    streamed.check_config(config)
    if not config.data.dir:
        raise ConfigError("data.dir: give the folder that holds train/CLASS/*.jpg")
    root = epath.Path(absolute(config.data.dir))
    known = known or Record()
    found = _find(root, known.of_before)
    classes = found["train"].classes
    if known.classes:
        record.refuse(record.of_classes(known.classes, classes), os.fspath(root))
    _check(found)
    splits = _divided(found, config.data.validation_size, known)
    _tell(root, found, splits)

    files = {name: files for name, (_, files) in splits.items()}
    held = {k: files[k] for k in ("test", "validation") if k in splits and splits[k][0] == "train"}
    own = splits.get("validation") if "validation" not in held else None
    return streamed.from_records(
        config,
        name=root.name,
        # The last ones are held out for validation.
        train=Images(files["train"] + held.get("validation", []), classes),
        test=Images(files["test"], classes),
        own_validation=own and Images(files["validation"], classes),
        class_names=classes,
        known=known,
        record=Record(
            classes,
            {k: Split(source, image_files.parts(v)) for k, (source, v) in splits.items()},
            {split: tuple(file.name for file in held[split]) for split in held},
            of_before=known.of_before,
        ),
    )


class Images(Indexed):
    """`records.Records` of image files; a stored record is the path of one."""

    def __init__(self, files: Sequence[ImageFile], classes: Sequence[str]):
        self.size = len(files)
        number = {name: label for label, name in enumerate(classes)}
        self._paths = [file.path for file in files]
        self._labels = np.array([number[file.label] for file in files], np.int32)

    def where(self, index: int) -> str:
        """See `Records`."""
        return self._paths[index]

    def parse(self, raw: "tf.Tensor", index: "tf.Tensor") -> "tuple[tf.Tensor, tf.Tensor]":
        """See `Records`."""
        import tensorflow as tf

        return tf.io.read_file(raw), tf.gather(tf.constant(self._labels), index)

    def _read(self, number: Callable[[int], int], count: int, ahead: int) -> Iterator[bytes]:
        # The files themselves are read where they are decoded, many at once.
        return (os.fsencode(self._paths[number(k)]) for k in range(count))


def _find(root: epath.Path, before: bool) -> dict[str, Found]:
    """What lies in the folders of the splits, by the names "train", "val" and "test"."""
    names = image_files.folders(root) if root.is_dir() else []
    if "train" not in names:
        raise DataError(f"there is no folder {root / 'train'}; it should hold a folder per class")
    validation = [name for name in names if name in (_VALIDATION[:1] if before else _VALIDATION)]
    if len(validation) > 1:
        raise DataError(f"{root} has {' and '.join(validation)}, which mean the same; keep one")
    places = {"train": "train"}
    if validation:
        places["val"] = validation[0]
    if "test" in names:
        places["test"] = "test"
    if other := [name for name in names if name not in places.values()]:
        log.warning("%s: folders that are not used: %s", root, record.listed(other))
    found = {split: image_files.find(root / place) for split, place in places.items()}
    return {k: image_files.as_before(v) if before else v for k, v in found.items()}


def _check(found: Mapping[str, Found]) -> None:
    """Raises DataError for classes and splits that nothing can be learned or measured with."""
    endings = ", ".join(ENDINGS)
    classes = found["train"].classes
    for split, there in found.items():
        if not there.classes:
            raise DataError(f"{there.folder} has no folders; it should hold one per class")
        for name in there.classes:
            if name not in classes:
                raise DataError(f"{there.folder / name}: train has no class {name!r}")
        if not there.files and split != "train":
            raise DataError(f"the class folders of {there.folder} have no images ({endings})")
        labels = {file.label for file in there.files}
        missing = [name for name in classes if name not in labels]
        if missing and split == "train":
            place = there.folder / missing[0]
            raise DataError(f"the class folder {place} has no images ({endings})")
        if missing:
            log.warning("%s has no images of class %s", there.folder, record.listed(missing))


def _divided(
    found: Mapping[str, Found], size: int, known: Record
) -> dict[str, tuple[str, list[ImageFile]]]:
    """For each split where its files come from, "train", "val" or "test", and the files.

    `size` is data.validation_size.
    """
    train = found["train"]
    test = next((split for split in ("test", "val") if split in found), None)
    if test is None and "test" not in known.held_out and not 0 < 2 * size < len(train.files):
        raise ConfigError(
            f"{train.folder.parent} has neither test nor val, so data.validation_size images of "
            f"train are held out for testing and as many for validation; {size} does not fit, "
            f"give 1 to {(len(train.files) - 1) // 2}"
        )
    sizes = {"test": 0 if test else size, "validation": max(size, 0)}
    rest, held = _held_out(train, sizes, known)
    splits = {"train": ("train", rest), "test": ("train", held["test"])}
    if test:
        splits["test"] = (test, found[test].files)
    if held["validation"]:
        splits["validation"] = ("train", held["validation"])
    elif size == -1 and test == "test" and "val" in found:
        splits["validation"] = ("val", found["val"].files)
    return splits


def _held_out(
    train: Found, sizes: Mapping[str, int], known: Record
) -> tuple[list[ImageFile], dict[str, list[ImageFile]]]:
    """The files of `train` to train on, and those held out for each split of `sizes`."""
    # Training streams are cut from this order, so that it must not be the one of the classes.
    if known.of_before:  # drawn by their number, so that one file more changes all; from the end
        ordered = [train.files[i] for i in order.permutation(len(train.files), 0, 0)]
    else:
        ordered = sorted(train.files, key=_hash)
    step = -1 if known.of_before else 1
    left, held = {file.name: file for file in ordered[::step]}, {}
    for split in sorted(sizes, key=lambda split: split not in known.held_out):  # noted ones first
        size = sizes[split]
        names = known.held_out.get(split, list(left)[:size][::step]) if size else []
        if gone := [name for name in names if name not in left]:
            raise DataError(
                f"{train.folder} lacks {record.listed(gone)}, held out as {split} images of this "
                "run; put them back, or start in another workdir"
            )
        held[split] = [left.pop(name) for name in names]
    return list(left.values())[::step], held


def _hash(file: ImageFile) -> bytes:
    return hashlib.sha256(file.name.encode("utf-8", "surrogateescape")).digest()


def _tell(
    root: epath.Path,
    found: Mapping[str, Found],
    splits: Mapping[str, tuple[str, Sequence[ImageFile]]],
) -> None:
    """Log which files are not used, and classes that are held out whole."""
    unused = collections.Counter()
    for there in found.values():
        unused += there.unused
    if unused:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(unused.items()))
        log.warning("%s: %d files are not used: %s", root, unused.total(), kinds)
    if "val" in found and all(source != "val" for source, _ in splits.values()):
        log.warning(
            "%s: its %d images are not used; data.validation_size=-1 takes them for validation, "
            "in place of images of train",
            found["val"].folder,
            len(found["val"].files),
        )
    trained = {file.label for file in splits["train"][1]}
    if whole := [name for name in found["train"].classes if name not in trained]:
        log.warning(
            "%s: no image of class %s is trained on, for all are held out",
            found["train"].folder,
            record.listed(whole),
        )
