"""`data.backend="grain"`: ARRAY_RECORD files, which have an index of their records.

Grain reads them in threads, in an order that `order.py` gives. Grain and array_record are an extra
of the package; they are imported when this backend is chosen.
"""

import dataclasses
from collections.abc import Callable, Iterator

from dfs_jax.config import ConfigError
from dfs_jax.data.input.records import Files, Indexed, parse_example

_THREADS = 16  # of reading; they wait for the disk, so there may be more of them than cores


class ArrayRecords(Indexed):
    """`records.Records` of ARRAY_RECORD files."""

    def __init__(self, files: Files):
        """Opens nothing yet. Raises ConfigError where the extra is not installed."""
        try:
            from grain.sources import ArrayRecordDataSource
        except ImportError as error:
            raise ConfigError(
                f"data.backend 'grain' needs {error.name}: pip install 'dfs_jax[grain]', or take "
                "data.backend 'tf' and data prepared as TFRECORD"
            ) from None
        self.size = sum(files.lengths)
        self.where, self.parse = files.where, parse_example
        self._source = ArrayRecordDataSource(
            [_WholeFile(*file) for file in zip(files.paths, files.lengths, strict=True)]
        )

    def _read(self, number: Callable[[int], int], count: int, ahead: int) -> Iterator[bytes]:
        import grain

        records = grain.MapDataset.source(_InOrder(self._source, number, count))
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=ahead)
        return iter(records.to_iter_dataset(options))


@dataclasses.dataclass(frozen=True)
class _WholeFile:
    """What array_record asks for in order not to open a file just to count its records."""

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        return self.take


@dataclasses.dataclass(frozen=True)
class _InOrder:
    """A random-access source for Grain: place k holds record number(k)."""

    source: object
    number: Callable[[int], int]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> bytes:
        try:
            return self.source[self.number(place)]
        except Exception:  # of whatever kind the reader raises for damage
            return b""
