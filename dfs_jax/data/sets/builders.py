"""TFDS data sets on disk: prepared once, then read whole into memory or record by record.

Small ones are prepared when first asked for (`open_or_prepare`), large ones by a command beforehand
(`open_prepared`, `records_of`). Knows about TensorFlow, which it imports when called and keeps off
accelerators. What is in a data set is its builder's matter, whether its archives can be had that of
`archives.py`.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import ml_collections
import numpy as np

from dfs_jax.data import record
from dfs_jax.data.input.in_memory import Arrays
from dfs_jax.data.input.records import Files, Records, TFRecords, first_missing
from dfs_jax.data.pipeline import DataError
from dfs_jax.data.record import Record, Split
from dfs_jax.data.sets import archives

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

FORMATS = {"tf": "tfrecord", "grain": "array_record"}  # that a backend reads


def open_or_prepare(
    builder_class: "type[tfds.core.DatasetBuilder]",
    data_dir: str | None,
    variant: str | None = None,
) -> "tfds.core.DatasetBuilder":
    """A builder, of `variant` if there are some, whose data are in `data_dir` (None: TFDS's own).

    Prepares them first where that has not been done; several processes may do so at once.
    Raises DataError when the prepared data cannot be read, naming the directory, and when an
    archive that they are made from is not to be had, saying how to get it.
    """
    import tensorflow_datasets as tfds

    data_dir = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
    make = functools.partial(builder_class, config=variant, data_dir=data_dir)
    # Without a builder its directory is unknown; the data set's holds it, and nothing else.
    with _blames(os.path.join(data_dir, builder_class.name, *filter(None, [variant]))):
        builder = make()
    if builder.data_path.exists():
        return builder
    archives.check_available(builder, data_dir)
    hide_accelerators()
    # TFDS writes to a directory of its own and renames that at the end. So an interruption
    # leaves nothing that is taken for finished data, and of several processes one wins.
    try:
        with preparing(builder):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
    except Exception:  # a failed rename has another class on every file system
        if not builder.data_path.exists():
            raise
    # The loser's builder describes files that it has removed again.
    with _blames(builder.data_dir):
        return make()


def if_prepared(name: str, data_dir: str | None) -> "tfds.core.DatasetBuilder | None":
    """The builder of TFDS data set `name` if its data are in `data_dir` (None: TFDS's own).

    Raises DataError when what is there cannot be read.
    """
    import tensorflow_datasets as tfds

    data_dir = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
    place = os.path.join(data_dir, name)
    if not os.path.isdir(place):
        return None
    with _blames(place):
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
        return builder if builder.data_path.exists() else None


@contextlib.contextmanager
def preparing(builder: "tfds.core.DatasetBuilder") -> Iterator[None]:
    """Raises DataError for a disk that TFDS reports to be full while `builder` prepares its data.

    TFDS removes what it has begun; after a kill it stands beside, its name starting "incomplete".
    """
    try:
        yield
    except RuntimeError as error:
        if "No space left" not in str(error):
            raise
        raise DataError(
            f"{builder.info.full_name} cannot be prepared in {builder.data_dir}: no space left on "
            "device; nothing of it is kept"
        ) from error


def read_splits(builder: "tfds.core.DatasetBuilder", sizes: Mapping[str, int]) -> dict[str, Arrays]:
    """Images (N, H, W, C) uint8 and labels (N,) of the splits in `sizes`, in stored order.

    `sizes` gives the examples that each split must have. Raises DataError, naming the directory
    and where possible the file, when the prepared data cannot be read.
    """
    hide_accelerators()
    with _blames(builder.data_dir):
        return {split: _read_split(builder, split, size) for split, size in sizes.items()}


def open_prepared(
    name: str, config: ml_collections.ConfigDict, how_to_prepare: Callable[[str, str], str]
) -> "tfds.core.DatasetBuilder":
    """The builder of data that have been prepared in the format that `data.backend` reads.

    Raises DataError with `how_to_prepare(directory, format)` where there are none, at once and
    without a network; and one that names the directory where they cannot be read.
    """
    import tensorflow_datasets as tfds
    from etils import epath

    wanted = FORMATS[config.data.backend]
    place = os.path.expanduser(config.data.dir or tfds.core.constants.DATA_DIR)
    if not (epath.Path(place) / name.split("/")[0].split(":")[0]).exists():
        raise DataError(how_to_prepare(place, wanted))  # before TFDS looks for the data elsewhere
    try:
        builder = tfds.builder(name, data_dir=place, try_gcs=False)
        found = builder.info.file_format.value if builder.data_path.exists() else None
    except Exception as error:  # TFDS, JSON and protocol buffers have no common class
        raise DataError(
            f"the prepared data of {name} in {place} cannot be read "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error
    if found is None:
        raise DataError(how_to_prepare(place, wanted))
    if found != wanted:
        other = next((b for b, format_ in FORMATS.items() if format_ == found), None)
        raise DataError(
            f"data.backend {config.data.backend!r} reads {wanted} files, but {name} in {place} was "
            f"prepared as {found}; "
            + (f"take data.backend {other!r}, or " if other else "")
            + f"prepare it again in another data.dir with --file_format={wanted}"
        )
    return builder


def records_of(
    builder: "tfds.core.DatasetBuilder", split: str, config: ml_collections.ConfigDict
) -> Records:
    """The records of a split. Raises DataError, naming the file, when one is not there."""
    info = builder.info.splits[split]
    if not info.num_examples:
        raise DataError(f"split {split!r} of {builder.info.full_name} is empty")
    files = Files(tuple(os.fspath(path) for path in info.filepaths), tuple(info.shard_lengths))
    missing = first_missing(files.paths)
    if missing:
        raise DataError(f"{missing} is missing; prepare {builder.info.full_name} anew")
    if config.data.backend == "grain":
        from dfs_jax.data.input.array_records import ArrayRecords

        return ArrayRecords(files)
    return TFRecords(files, config.data.shuffle_buffer)


def record_of(
    builder: "tfds.core.DatasetBuilder",
    config: ml_collections.ConfigDict,
    *,
    test: str,
    own_validation: str | None = None,
) -> Record:
    """What a run notes of the splits, as `streamed.from_records` makes them."""
    held = config.data.validation_size

    def split(name: str, left_out: int = 0) -> Split:
        info = builder.info.splits[name]
        told = (builder.info.version, info.num_examples, info.num_bytes)
        count = info.num_examples - left_out
        return Split(name, {name: (count, record.fingerprint(map(str, told)))})

    train = builder.info.splits["train"].num_examples
    splits = {"train": split("train", max(held, 0)), "test": split(test)}
    if held > 0:
        splits["validation"] = split("train", train - held)
    elif held == -1 and own_validation:
        splits["validation"] = split(own_validation)
    return Record(tuple(builder.info.features["label"].names), splits)


def hide_accelerators() -> None:
    """Keep TensorFlow off GPUs and TPUs, whose memory it would otherwise take from JAX."""
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        # TensorFlow refuses once it runs; then whoever started it has chosen its devices.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], kind)


def _read_split(builder, split: str, size: int) -> Arrays:
    import tensorflow_datasets as tfds

    try:
        dataset = builder.as_dataset(
            split=split,
            batch_size=-1,
            shuffle_files=False,
            decoders=tfds.decode.PartialDecoding({"image": True, "label": True}),
            read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
        )
        examples = tfds.as_numpy(dataset)
    except Exception as error:
        damaged = _first_damaged(builder.info.splits[split].filepaths)
        if damaged is None:
            raise
        raise ValueError(f"{damaged} is damaged: {_first_line(error)}") from error
    images, labels = np.asarray(examples["image"]), np.asarray(examples["label"])
    if len(images) != size:
        raise ValueError(f"split {split!r} has {len(images)} examples instead of {size}")
    _check_labels(labels, builder, split)
    return images, labels


def _first_damaged(paths) -> str | None:
    """The first of TFRECORD files `paths` whose records cannot all be read."""
    import tensorflow as tf

    for path in map(os.fspath, paths):
        try:
            for _ in tf.data.TFRecordDataset(path):
                pass
        except tf.errors.OpError:
            return path
    return None


def _check_labels(labels: np.ndarray, builder, split: str) -> None:
    classes = builder.info.features["label"].num_classes
    (wrong,) = np.nonzero((labels < 0) | (labels >= classes))
    if not wrong.size:
        return
    info, example = builder.info.splits[split], int(wrong[0])
    ends = np.cumsum(info.shard_lengths)
    shard = int(np.searchsorted(ends, example, side="right"))
    record = example - int(ends[shard]) + info.shard_lengths[shard]
    raise ValueError(
        f"record {record} of {os.fspath(info.filepaths[shard])} has label {labels[example]}, "
        f"but there are {classes} classes"
    )


@contextlib.contextmanager
def _blames(directory: str):
    try:
        yield
    except Exception as error:  # TensorFlow, TFDS and protocol buffers have no common class
        raise DataError(
            f"the prepared data in {directory} cannot be read "
            f"({type(error).__name__}: {_first_line(error)}); "
            "delete that directory and run again to prepare it anew"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
