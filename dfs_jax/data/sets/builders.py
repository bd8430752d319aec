"""TFDS data sets as arrays: prepared on disk once, then read whole into memory.

Knows about TensorFlow, which it imports when called and keeps off accelerators. What is in a
data set is its builder's matter, what becomes of the arrays that of `in_memory`, and whether
its archives can be had that of `archives`.
"""

import contextlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dfs_jax.data.input.in_memory import Arrays
from dfs_jax.data.pipeline import DataError
from dfs_jax.data.sets import archives

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


def read(
    builder_class: "type[tfds.core.DatasetBuilder]", data_dir: str | None, sizes: Mapping[str, int]
) -> dict[str, Arrays]:
    """`read_splits` of the builder that `open_builder` makes ready."""
    return read_splits(open_builder(builder_class, data_dir), sizes)


def open_builder(
    builder_class: "type[tfds.core.DatasetBuilder]", data_dir: str | None
) -> "tfds.core.DatasetBuilder":
    """A builder whose data are prepared in `data_dir` (None: TFDS's own place).

    Prepares them first where that has not been done; several processes may do so at once.
    Raises DataError when the prepared data cannot be read, naming the directory, and when an
    archive that they are made from is not to be had, saying how to get it.
    """
    import tensorflow_datasets as tfds

    data_dir = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
    # Without a builder its directory is unknown; the data set's holds it, and nothing else.
    with _blames(os.path.join(data_dir, builder_class.name)):
        builder = builder_class(data_dir=data_dir)
    if not builder.data_path.exists():
        archives.check(builder, os.path.join(data_dir, "downloads"))
        hide_accelerators()
        builder = _prepare(builder, builder_class, data_dir)
    return builder


def read_splits(builder: "tfds.core.DatasetBuilder", sizes: Mapping[str, int]) -> dict[str, Arrays]:
    """Images (N, H, W, C) uint8 and labels (N,) of the splits in `sizes`, in stored order.

    `sizes` gives the examples that each split must have. Raises DataError, naming the directory
    and where possible the file, when the prepared data cannot be read.
    """
    hide_accelerators()
    with _blames(builder.data_dir):
        return {split: _read_split(builder, split, size) for split, size in sizes.items()}


def hide_accelerators() -> None:
    """Keep TensorFlow off GPUs and TPUs, whose memory it would otherwise take from JAX."""
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        # TensorFlow refuses once it runs; then whoever started it has chosen its devices.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], kind)


def _prepare(builder, builder_class, data_dir):
    import tensorflow_datasets as tfds

    # TFDS writes to a directory of its own and renames that at the end. So an interruption
    # leaves nothing that is taken for finished data, and of several processes one wins.
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except Exception:  # a failed rename has another class on every file system
        if not builder.data_path.exists():
            raise
    # The loser's builder describes files that it has removed again.
    with _blames(builder.data_dir):
        return builder_class(data_dir=data_dir)


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
