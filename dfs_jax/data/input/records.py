"""Where stored records come from: the contract of a split, and TFRECORD files.

A split is numbered 0 to size - 1 in stored order. Files can be read from front to back (TFRECORD,
here) or at any place (`Indexed`: image files, ARRAY_RECORD). What is in a record is known to its
`parse` alone; what becomes of it is in `decode.py`.
"""

import bisect
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dfs_jax.data.input import decode
from dfs_jax.data.input.order import Streams

if TYPE_CHECKING:
    import tensorflow as tf

_FOREVER = np.iinfo(np.int64).max


class Records(Protocol):
    """A split of a data set, not decoded. A record that cannot be read is "", never left out."""

    size: int

    def where(self, index: int) -> str:
        """Record `index` as a message names it: its file, and its place there."""

    def parse(self, raw: "tf.Tensor", index: "tf.Tensor") -> "tuple[tf.Tensor, tf.Tensor]":
        """Encoded image () string and label () integer of a record; in a TensorFlow graph."""

    def shuffled(self, streams: Streams, start: int, rows: np.ndarray) -> "tf.data.Dataset":
        """Without an end: (record, its number) of `rows` (n,) of steps `start`, `start` + 1, ..."""

    def ordered(self, first: int, last: int) -> "tf.data.Dataset":
        """(record, its number) for records `first` to `last` - 1, in stored order."""


def parse_example(raw: "tf.Tensor", index: "tf.Tensor") -> "tuple[tf.Tensor, tf.Tensor]":
    """`Records.parse` for what TFDS stores when the features are `image` and `label`."""
    import tensorflow as tf

    features = {  # with defaults, for "" is parsed too
        "image": tf.io.FixedLenFeature((), tf.string, ""),
        "label": tf.io.FixedLenFeature((), tf.int64, -1),
    }
    example = tf.io.parse_single_example(raw, features)
    return example["image"], example["label"]


@dataclasses.dataclass(frozen=True)
class Files:
    """Paths of a split's files, with the number of records in each."""

    paths: tuple[str, ...]
    lengths: tuple[int, ...]

    @property
    def starts(self) -> list[int]:
        """Number of the first record of each file, and at the end that of all records."""
        return [0, *itertools.accumulate(self.lengths)]

    def where(self, index: int) -> str:
        """See `Records.where`."""
        file = bisect.bisect_right(self.starts, index) - 1
        return f"record {index - self.starts[file]} of {self.paths[file]}"

    def pieces(self, first: int, last: int) -> np.ndarray:
        """(k, 4) int64: file, records to pass over, records to read, number of the first."""
        starts = self.starts
        pieces = []
        for file in range(bisect.bisect_right(starts, first) - 1, bisect.bisect_left(starts, last)):
            low, high = max(first, starts[file]), min(last, starts[file + 1])
            if high > low:
                pieces.append((file, low - starts[file], high - low, low))
        return np.array(pieces, np.int64).reshape(-1, 4)


class TFRecords:
    """`Records` of TFRECORD files, read from front to back.

    A stream shuffles the order of its (parts of) files in every epoch, and then its records
    through a buffer of `shuffle_buffer`; both depend on (seed, epoch, stream) alone. Going on at
    step s leaves out whole epochs, and reads the records of the present one before s without
    decoding them.
    """

    def __init__(self, files: Files, shuffle_buffer: int):
        self.size = sum(files.lengths)
        self.where, self.parse = files.where, parse_example
        self._files, self._shuffle_buffer = files, shuffle_buffer

    def shuffled(self, streams: Streams, start: int, rows: np.ndarray) -> "tf.data.Dataset":
        """See `Records`."""
        import tensorflow as tf

        chosen = streams.of_rows(rows)
        pieces = [self._files.pieces(*streams.bounds(v)) for v in chosen]
        table = tf.RaggedTensor.from_row_lengths(np.concatenate(pieces), [len(p) for p in pieces])
        epochs, done = np.transpose([streams.reached(v, start) for v in chosen.tolist()])
        epochs, done = tf.constant(epochs, tf.int64), tf.constant(done, tf.int64)

        def stream(i):
            key = tf.stack([np.int64(streams.seed), tf.gather(chosen, i)])
            own = tf.gather(table, i)

            def epoch(number):
                seed = _fold_in(key, number)
                order = tf.random.experimental.stateless_shuffle(own, seed)
                records = tf.data.Dataset.from_tensor_slices(order).flat_map(self._piece)
                return records.shuffle(
                    self._shuffle_buffer, seed=seed[0], reshuffle_each_iteration=False
                )

            passes = tf.data.Dataset.range(tf.gather(epochs, i), _FOREVER).flat_map(epoch)
            return passes.skip(tf.gather(done, i))

        return tf.data.Dataset.range(len(chosen)).interleave(
            stream,
            cycle_length=len(chosen),
            block_length=streams.rows_per_stream,
            num_parallel_calls=min(len(chosen), 16),
            deterministic=True,
        )

    def ordered(self, first: int, last: int) -> "tf.data.Dataset":
        """See `Records`."""
        import tensorflow as tf

        pieces = self._files.pieces(first, last)
        return tf.data.Dataset.from_tensor_slices(pieces).flat_map(self._piece).prefetch(64)

    def _piece(self, piece: "tf.Tensor") -> "tf.data.Dataset":
        import tensorflow as tf

        file, skipped, size, number = tf.unstack(piece)
        path = tf.gather(tf.constant(self._files.paths), file)
        # A file that does not even open would fail again and again instead of ending, so it is
        # tried first.
        opened = tf.data.Dataset.from_tensors(path).map(_first_record_reads).ignore_errors()
        records = opened.flat_map(
            lambda path: tf.data.TFRecordDataset(path).skip(skipped).ignore_errors()
        )
        nothing = tf.data.Dataset.from_tensors("").repeat()
        numbers = tf.data.Dataset.range(number, number + size)
        return tf.data.Dataset.zip(records.concatenate(nothing), numbers)


class Indexed:
    """Base of `Records` in which any record can be had at once: going on at a step is instant.

    Within each epoch a stream's order is a uniformly random one, a pure function of (seed, epoch,
    stream). Subclasses have `size`, `where`, `parse` and `_read`.
    """

    size: int

    def _read(self, number: Callable[[int], int], count: int, ahead: int) -> Iterator[bytes]:
        """Records number(0) to number(count - 1) in this order, b"" where one cannot be read.

        `number` may be called at any place, from any thread; `ahead` is how many records it is
        worth having in hand before they are asked for.
        """
        raise NotImplementedError

    def shuffled(self, streams: Streams, start: int, rows: np.ndarray) -> "tf.data.Dataset":
        """See `Records`."""
        streams.of_rows(rows)  # the same hosts are refused, whatever the files
        width = len(rows)
        of_step = functools.lru_cache(maxsize=8)(lambda step: streams.indices(step, rows))
        return self._dataset(
            lambda k: int(of_step(start + k // width)[k % width]), sys.maxsize, width
        )

    def ordered(self, first: int, last: int) -> "tf.data.Dataset":
        """See `Records`."""
        return self._dataset(lambda k: first + k, last - first, 64)

    def _dataset(self, number: Callable[[int], int], count: int, width: int) -> "tf.data.Dataset":
        import tensorflow as tf

        def blocks():
            records = self._read(number, count, ahead=2 * width)
            for k in range(0, count, width):
                block = range(k, min(k + width, count))
                # The type is given, for NumPy would cut zero bytes off the end of a record.
                yield np.array([next(records) for _ in block], object), [number(i) for i in block]

        signature = (tf.TensorSpec((None,), tf.string), tf.TensorSpec((None,), tf.int64))
        return tf.data.Dataset.from_generator(blocks, output_signature=signature).unbatch()


def first_missing(paths: Sequence[str]) -> str | None:
    """The first of `paths` that is not there, or None."""
    from etils import epath

    for folder, group in itertools.groupby(sorted(map(epath.Path, paths)), lambda p: p.parent):
        there = {path.name for path in folder.iterdir()} if folder.exists() else set()
        for path in group:
            if path.name not in there:
                return str(path)
    return None


def _first_record_reads(path: "tf.Tensor") -> "tf.Tensor":
    import tensorflow as tf

    first = tf.data.TFRecordDataset(path).take(1).with_options(decode.options())
    read = first.reduce(np.int64(0), lambda n, _: n + 1)
    with tf.control_dependencies([read]):
        return tf.identity(path)


def _fold_in(key: "tf.Tensor", number: "tf.Tensor") -> "tf.Tensor":
    import tensorflow as tf

    # TensorFlow's own folding leaves one half of the key without the number.
    folded = tf.random.experimental.stateless_fold_in(key, number)
    return tf.random.stateless_uniform((2,), folded, minval=None, maxval=None, dtype=tf.int64)
