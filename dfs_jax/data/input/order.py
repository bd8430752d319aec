"""Which example stands in which row of which batch: arithmetic, no reading.

Sets in memory have one order per epoch (`train_indices`). The records of a streamed set are cut
into V virtual streams, a number that does not depend on the hosts. A stream passes through its own
records again and again, each pass (its epoch) in an order of its own, and gives B / V rows to every
batch of B. So the rows of step s are known without those before, and a host that makes some of the
rows reads only their streams.
"""

import dataclasses
import functools

import jax
import ml_collections
import numpy as np

from dfs_jax.config import ConfigError


@functools.lru_cache(maxsize=4)
def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order (size,) int64 of an epoch's examples, equal on every platform; read-only."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    order = generator.permutation(size)
    order.flags.writeable = False  # the cache hands out this very array
    return order


def train_indices(size: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The examples (batch_size,) int32 of step `step`, out of `size`.

    Epochs follow each other without a gap, each in an order of its own: the batch is positions
    step * batch_size and on of that stream. So a batch may span epochs, and none drops examples.
    """
    position, end = step * batch_size, (step + 1) * batch_size
    pieces = []
    while position < end:
        epoch, first = divmod(position, size)
        last = min(size, first + end - position)
        pieces.append(permutation(size, seed, epoch)[first:last])
        position += last - first
    return np.concatenate(pieces).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Streams:
    """`count` streams over records 0 to `size` - 1, for batches of `batch_size` rows.

    Stream v has the records from v * size / count on, up to those of stream v + 1. Streams differ
    in length by at most one record, and an epoch of one stream is a pass through its own records:
    within it, each appears exactly once.
    """

    count: int
    size: int
    batch_size: int
    seed: int

    @classmethod
    def from_config(cls, config: ml_collections.ConfigDict, size: int, hosts: int) -> "Streams":
        """The streams of `config` over `size` training records, checked for `hosts` hosts.

        Raises ConfigError when the batch size, the hosts and the streams do not divide each other.
        """
        count, batch_size = config.data.streams, config.train.batch_size
        if count < 1:
            raise ConfigError(f"data.streams {count} is not positive")
        if batch_size % count:
            raise ConfigError(
                f"train.batch_size {batch_size} is not a multiple of data.streams {count}, each of "
                f"which gives as many rows; take {-(-batch_size // count) * count}, or set "
                f"data.streams to a divisor of {batch_size}"
            )
        if count % hosts:
            raise ConfigError(
                f"data.streams {count} cannot be shared evenly by {hosts} hosts; "
                f"take {-(-count // hosts) * hosts}, or another multiple of {hosts}"
            )
        if config.train.eval_batch_size % hosts:
            raise ConfigError(
                f"train.eval_batch_size {config.train.eval_batch_size} cannot be shared evenly by "
                f"{hosts} hosts; take a multiple of {hosts}"
            )
        if size < count:
            raise ConfigError(
                f"data.streams {count} is more than the {size} training examples; take at most "
                f"{size}"
            )
        return cls(count, size, batch_size, config.data.seed)

    @property
    def rows_per_stream(self) -> int:
        """Rows of every batch that come from one stream."""
        return self.batch_size // self.count

    def bounds(self, stream: int) -> tuple[int, int]:
        """First record of `stream`, and the one after its last."""
        return stream * self.size // self.count, (stream + 1) * self.size // self.count

    def reached(self, stream: int, step: int) -> tuple[int, int]:
        """Epochs that `stream` has completed before `step`, and records read of the next one."""
        first, last = self.bounds(stream)
        return divmod(step * self.rows_per_stream, last - first)

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """The streams (n,) that fill `rows`, ascending row numbers.

        Raises ConfigError unless `rows` are all rows of these streams.
        """
        streams = np.unique(rows // self.rows_per_stream)
        if len(streams) * self.rows_per_stream != len(rows):
            raise ConfigError(
                f"data.streams {self.count} does not fit the hosts: a host makes {len(rows)} of "
                f"the {self.batch_size} rows of a batch, which are no whole streams of "
                f"{self.rows_per_stream}; take a multiple of the number of hosts that divides "
                "train.batch_size"
            )
        return streams

    def indices(self, step: int, rows: np.ndarray) -> np.ndarray:
        """Records (n,) int64 of `rows` of step `step`, where any record can be had at once.

        Within an epoch of a stream the order is a uniformly random one.
        """

        def record(row: int) -> int:
            stream, place = divmod(row, self.rows_per_stream)
            first, last = self.bounds(stream)
            epoch, done = divmod(step * self.rows_per_stream + place, last - first)
            return first + _order(last - first, self.seed, epoch, stream)[done]

        return np.array([record(row) for row in rows.tolist()], np.int64)


def host_rows(batch_size: int, host: int, hosts: int) -> np.ndarray:
    """The rows (batch_size / hosts,) that host number `host` makes where each has one block."""
    return np.arange(batch_size * host // hosts, batch_size * (host + 1) // hosts)


def process_rows(batch_size: int, sharding: jax.sharding.NamedSharding | None) -> np.ndarray:
    """The rows, ascending, that lie on devices of this process under `sharding`."""
    if sharding is None or sharding.is_fully_addressable:
        return np.arange(batch_size)
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


@functools.lru_cache(maxsize=256)  # two epochs of 128 streams
def _order(size: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    key = np.array([seed | stream << 32, epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(size)
