"""IDX files, in which MNIST and its successors are published: `data.name="idx:DIR"`, in memory.

DIR holds the four files of one data set (MNIST, KMNIST, one part of EMNIST), compressed or not:
grey images of 8 bits, as they are stored (EMNIST's lie on their side), and their labels. The labels
that occur are the classes. Examples come in an order of their own, by a hash of each, because some
sets are stored class by class; validation examples are the last ones of the training files.
"""

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import ml_collections
import numpy as np

from dfs_jax.data import place, record
from dfs_jax.data.augment import normalization
from dfs_jax.data.input import in_memory
from dfs_jax.data.input.in_memory import Arrays
from dfs_jax.data.pipeline import Data, DataError
from dfs_jax.data.record import Record, Split

_SPLITS = {"train": ("train",), "test": ("t10k", "test")}  # as the names of files say them
_KINDS = {"images": 3, "labels": 1}  # dimensions
_BYTES = 0x08  # type of the elements
_DAMAGED = (OSError, EOFError, zlib.error)  # OSError includes gzip's own


def load(config: ml_collections.ConfigDict) -> Data:
    """The files of `data.dir`, or else of DIR. Raises DataError for what is not there or damaged.

    `data.normalization="own"` are the statistics of the training files.
    """
    directory = place(config)
    contents = read(directory)
    splits = {split: parse(directory, split, *pair) for split, pair in contents.items()}
    classes, labels = np.unique(splits["train"][1], return_inverse=True)
    unknown = np.setdiff1d(splits["test"][1], classes)
    if unknown.size:
        raise DataError(f"{directory}: label {unknown[0]} is in the test files alone")
    test_labels = np.searchsorted(classes, splits["test"][1])
    images = splits["train"][0]
    return in_memory.from_splits(
        config,
        {
            "train": in_order(images, labels),
            "test": in_order(splits["test"][0], test_labels),
        },
        [str(label) for label in classes],
        own=normalization.measure([images]),
        record=_record(config.data.validation_size, contents, splits, classes),
    )


def read(directory: str) -> dict[str, tuple[bytes, bytes]]:
    """The contents of the files of images and labels of both splits, uncompressed.

    Raises DataError for a file that is missing, not the only one, or cannot be read.
    """
    folder = Path(directory).expanduser()
    if not directory or not folder.is_dir():
        raise DataError(f"there is no folder {directory!r}; it should hold IDX files")
    names = sorted(path.name for path in folder.iterdir())

    def contents(split: str, kind: str) -> bytes:
        return _contents(folder / _only(directory, names, split, kind))

    return {split: (contents(split, "images"), contents(split, "labels")) for split in _SPLITS}


def _only(directory: str, names: list[str], split: str, kind: str) -> str:
    """The name of the one file of `kind` of `split`."""
    stems = [f"{word}-{kind}" for word in _SPLITS[split]]
    plain_ends = [f"{stem}{sign}idx{_KINDS[kind]}-ubyte" for stem in stems for sign in "-."]
    ends = tuple(end + packed for end in plain_ends for packed in ("", ".gz"))
    found = [name for name in names if name.endswith(ends)]
    plain = {name.removesuffix(".gz") for name in found}  # a file beside its archive is one
    if len(plain) == 1:
        return found[0]
    if found:
        raise DataError(f"{directory} holds several data sets, {', '.join(found)}; keep one there")
    raise DataError(f"{directory} has no file {ends[0]} or {ends[1]}")


def _contents(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except _DAMAGED as error:
        raise DataError(f"{path} cannot be read ({error}); get it anew") from error


def parse(directory: str, split: str, images: bytes, labels: bytes) -> Arrays:
    """Images (N, H, W, 1) uint8 and labels (N,) uint8 of the contents of two files.

    Raises DataError, naming split and folder, for what is not that.
    """
    arrays = []
    for (kind, dimensions), data in zip(_KINDS.items(), (images, labels), strict=True):
        where = f"the {split} {kind} in {directory}"
        if data[:4] != bytes((0, 0, _BYTES, dimensions)):
            raise DataError(f"{where} are no IDX file of {dimensions}-dimensional bytes")
        start = 4 + 4 * dimensions
        shape = struct.unpack_from(f">{dimensions}I", data.ljust(start, b"\0"), offset=4)
        if len(data) - start != math.prod(shape):
            raise DataError(f"{where} are damaged: {len(data):,} bytes do not hold {shape}")
        arrays.append(np.frombuffer(data, np.uint8, offset=start).reshape(shape))
    if len(arrays[0]) != len(arrays[1]):
        raise DataError(
            f"{directory}: {len(arrays[0]):,} {split} images, but {len(arrays[1]):,} labels"
        )
    return arrays[0][..., None], arrays[1]


def in_order(images: np.ndarray, labels: np.ndarray) -> Arrays:
    """Examples in the order of a hash of each, the same wherever they come from."""
    hashes = [
        hashlib.sha256(image.tobytes() + bytes([label])).digest()
        for image, label in zip(images, labels, strict=True)
    ]
    order = sorted(range(len(labels)), key=hashes.__getitem__)
    return images[order], labels[order].astype(np.int32)


def _record(held: int, contents: dict, splits: dict[str, Arrays], classes: np.ndarray) -> Record:
    """What a run notes of them: the contents of files tell which they are."""
    marks = {
        split: record.fingerprint(hashlib.sha256(data).hexdigest() for data in pair)
        for split, pair in contents.items()
    }

    def noted(split: str, count: int) -> Split:
        return Split(split, {split: (count, marks[split])})

    train, test = (len(splits[split][1]) for split in _SPLITS)
    found = {"train": noted("train", train - held), "test": noted("test", test)}
    if held:
        found["validation"] = noted("train", held)
    return Record(tuple(map(str, classes)), found)
