"""TFDS data sets as arrays: prepared on disk once, then read whole into memory.

Knows about TensorFlow, which it imports when called and keeps off accelerators. What is in a
data set is its builder's matter, what becomes of the arrays that of `in_memory`.
"""

import contextlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dfs_jax.data.in_memory import Arrays
from dfs_jax.data.pipeline import DataError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


def read(
    builder_class: "type[tfds.core.DatasetBuilder]", data_dir: str | None, sizes: Mapping[str, int]
) -> dict[str, Arrays]:
    """Images (N, H, W, C) uint8 and labels (N,) of the splits in `sizes`, in stored order.

    Prepares the data in `data_dir` (None: TFDS's own place) first where that has not been done;
    several processes may do so at once. `sizes` gives the examples that each split must have.
    Raises DataError, naming the directory, when the prepared data cannot be read.
    """
    import tensorflow_datasets as tfds

    hide_accelerators()
    data_dir = data_dir and os.path.expanduser(data_dir)
    # Without a builder its directory is unknown; the data set's holds it, and nothing else.
    with _blames(os.path.join(data_dir or tfds.core.constants.DATA_DIR, builder_class.name)):
        builder = builder_class(data_dir=data_dir)
    if not builder.data_path.exists():
        builder = _prepare(builder, builder_class, data_dir)
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

    dataset = builder.as_dataset(
        split=split,
        batch_size=-1,
        shuffle_files=False,
        read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
    )
    examples = tfds.as_numpy(dataset)
    images, labels = np.asarray(examples["image"]), np.asarray(examples["label"])
    if len(images) != size:
        raise ValueError(f"split {split!r} has {len(images)} examples instead of {size}")
    return images, labels


@contextlib.contextmanager
def _blames(directory: str):
    try:
        yield
    except Exception as error:  # TensorFlow, TFDS and protocol buffers have no common class
        reason = next(iter(str(error).strip().splitlines()), "")
        raise DataError(
            f"the prepared data in {directory} cannot be read ({type(error).__name__}: {reason}); "
            "delete that directory and run again to prepare it anew"
        ) from error
