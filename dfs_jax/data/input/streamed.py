"""Data sets too large for memory: decoded on the host while training runs, finished on the device.

`from_records` serves any `Records` by the contract of `pipeline.py`. Each host reads the records
of its own rows (`order.py` says which), decodes and crops them (`decode.py`), and puts uint8 pixels
on its devices, where they are augmented and normalised, with keys of (seed, step, row) as for sets
in memory. Here too is what happens to records that cannot be used. What files they are in is the
matter of `records.py` and `sets/`.

Going on in the middle of an epoch takes no time for files with an index (`records.Indexed`). For
TFRECORD files it takes as long as reading the epoch's records so far without decoding them: a core
passes about 27,000 ImageNet records (2.8 GB) a second, so that the disk decides. `python -m
dfs_jax.benchmark --input_only --start STEP` tells.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence

import jax
import ml_collections
import numpy as np
from jax.sharding import NamedSharding

from dfs_jax.config import ConfigError
from dfs_jax.data import pipeline
from dfs_jax.data.augment import normalization
from dfs_jax.data.augment.augmentation import Augmentation
from dfs_jax.data.augment.mixing import Mixing
from dfs_jax.data.augment.normalization import Statistics
from dfs_jax.data.input import decode, order
from dfs_jax.data.input.devices import one_ahead, place, place_rows, replicated
from dfs_jax.data.input.records import Records
from dfs_jax.data.pipeline import Batch, Data, DataError, Spec
from dfs_jax.data.record import Record, whole
from dfs_jax.models.inputs import images as image_inputs

log = logging.getLogger(__name__)

HostBatch = dict[str, np.ndarray]  # the rows of a batch that one host makes

_BLOCKS = 16  # of neighbouring records, that statistics are measured on
_TOLD = 10  # damaged records that the log names one by one


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError for fields of `config.data` that no streamed set can use."""
    d = config.data
    pipeline.check_batch(config, devices=1)
    pipeline.check_seed(config)
    if pipeline.image_size(config) is None:
        raise ConfigError(
            f"data.image_size 0: data set {d.name!r} needs the pixels a side of the crops, for "
            "instance 224, or their (height, width)"
        )
    if d.channels not in (0, 1, 3):
        raise ConfigError(f"data.channels must be 1 (grey), 3 or 0 (also 3), got {d.channels}")
    if d.on_error not in ("raise", "skip"):
        raise ConfigError(f"data.on_error must be 'raise' or 'skip', got {d.on_error!r}")
    if d.backend not in ("tf", "grain"):
        raise ConfigError(f"data.backend must be 'tf' or 'grain', got {d.backend!r}")
    if d.shuffle_buffer < 1:
        raise ConfigError(f"data.shuffle_buffer {d.shuffle_buffer} is not a positive number")
    if not 0 < d.crop_area <= 1:
        raise ConfigError(f"data.crop_area {d.crop_area} is not in (0, 1]")
    if d.validation_size < -1:
        raise ConfigError(f"data.validation_size {d.validation_size} is negative; 0: none")


def from_records(
    config: ml_collections.ConfigDict,
    *,
    name: str,
    train: Records,
    test: Records,
    class_names: Sequence[str],
    own_validation: Records | None = None,
    statistics: str | None = None,
    record: Record | None = None,
    known: Record | None = None,
) -> Data:
    """Records served as `config`, which has passed `check_config`, says.

    The validation split is the last `data.validation_size` records of `train`, or, for -1,
    `own_validation`; it is read like the test split. `statistics` is the entry of
    `normalization.STATISTICS` for normalization="own"; where it is None, or is for other channels,
    they are those of `known`, which an earlier start has noted, or measured here. `record` is what
    a run notes of the records, None: their number. Raises ConfigError, and DataError as reading
    does.
    """
    held = config.data.validation_size
    _check_held(held, name, train, own_validation)
    shape = (*pipeline.image_size(config), config.data.channels or 3)
    size = train.size - max(held, 0)
    plan = order.Streams.from_config(config, size, jax.process_count())

    def rows(records: Records) -> "_Rows":
        d = config.data
        decoder = decode.Decoder(
            records.parse,
            shape,
            num_classes=len(class_names),
            min_crop_area=d.crop_area,
            antialias=d.antialias,
        )
        return _Rows(records, decoder, d.on_error)

    own = statistics or name
    if config.data.normalization == "own" and not normalization.knows(statistics, shape[-1]):
        own = (known and known.statistics) or _measured(rows(train), size, config)
    scale = normalization.statistics(config, own, shape[-1])

    def evaluated(records: Records, first: int, last: int) -> "StreamedEval":
        return StreamedEval(rows(records), (first, last), config.train.eval_batch_size, scale)

    if held == -1:
        validation = evaluated(own_validation, 0, own_validation.size)
    else:
        validation = evaluated(train, size, train.size) if held else None
    sizes = {"train": size, "validation": validation.size if validation else 0, "test": test.size}
    record = record or whole(sizes, class_names)
    return Data(
        train=StreamedTrain(
            rows(train),
            plan,
            Augmentation.from_config(config, shape),
            scale,
            Mixing.from_config(config),
        ),
        validation=validation,
        test=evaluated(test, 0, test.size),
        spec=Spec(
            name=name,
            inputs=image_inputs(shape),
            num_classes=len(class_names),
            class_names=tuple(class_names),
            **{f"{split}_size": count for split, count in sizes.items()},
            statistics=scale,
        ),
        record=record if isinstance(own, str) else dataclasses.replace(record, statistics=own),
    )


def _check_held(held: int, name: str, train: Records, own_validation: Records | None) -> None:
    if held == -1 and own_validation is None:
        raise ConfigError(
            f"data.validation_size -1, but {name} has no validation split beside its test split; "
            "give the number of training examples to hold out, or 0"
        )
    if held >= train.size:
        raise ConfigError(
            f"data.validation_size {held} leaves none of the {train.size} training examples; "
            f"give 0 (no validation split) to {train.size - 1}"
        )


class StreamedTrain:
    """A `pipeline.TrainSource` over streams of records."""

    def __init__(
        self,
        rows: "_Rows",
        plan: order.Streams,
        augmentation: Augmentation,
        scale: normalization.Statistics,
        mixing: Mixing,
    ):
        self.size = plan.size
        self._rows, self._plan = rows, plan
        self._augmentation, self._scale, self._mixing = augmentation, scale, mixing
        self._compiled = functools.cache(lambda over: jax.jit(self._finished, out_shardings=over))

    @property
    def skipped(self) -> int:
        """Damaged records that this process has replaced so far."""
        return self._rows.skipped

    def batches(self, start: int, sharding: NamedSharding | None = None) -> Iterator[Batch]:
        """See `pipeline.TrainSource`; this process decodes the rows of its own devices."""
        size = self._plan.batch_size
        rows = order.process_rows(size, sharding)
        finish = self._compiled(sharding)
        mix = self._mixing.compiled(self._plan.seed, self._rows.decoder.num_classes, sharding)

        def make(step: int, part: HostBatch) -> Batch:
            number = place(np.uint32(step), replicated(sharding))
            return mix(finish(place_rows(part, rows, size, sharding), number), number)

        return one_ahead(make(*item) for item in enumerate(self.examples(start, rows), start))

    def examples(self, start: int, rows: np.ndarray) -> Iterator[HostBatch]:
        """Rows `rows` (n,) of the batches of steps `start`, ... before what the device does.

        `image` (n, H, W, C) uint8, `label` (n,) int32. `order.host_rows` gives the rows of one
        of several hosts. A damaged record raises DataError, or with data.on_error="skip" is
        replaced by the next good row of its stream in the batch, else of the host's rows.
        """
        import tensorflow as tf

        plan, rows = self._plan, np.asarray(rows, np.int64)
        own_stream = rows // plan.rows_per_stream
        places = tf.constant(rows)

        def positioned(count, batch):
            return *batch, (start + count) * plan.batch_size + places

        records = self._rows.records.shuffled(plan, start, rows)
        records = records.batch(len(rows)).enumerate().map(positioned)
        batches = self._rows.decoder.batches(records, plan.seed)
        for batch in batches:
            usable = self._rows.usable(batch)
            if not usable.any():
                raise DataError(
                    f"none of the {len(rows)} records of a batch can be used; the first one is "
                    f"{self._rows.records.where(int(batch['index'][0]))}"
                )
            kept = {key: batch[key] for key in ("image", "label")}
            if not usable.all():
                chosen = _replaced(usable, own_stream)
                kept = {key: rows[chosen] for key, rows in kept.items()}
            yield kept

    def _finished(self, batch, step):
        images = self._augmentation.apply_to_batch(self._plan.seed, step, batch["image"])
        return {**batch, "image": normalization.normalise(images, *self._scale)}


class StreamedEval:
    """A `pipeline.EvalSource` over records `extent[0]` to `extent[1]` - 1.

    Each of n hosts reads one of n contiguous parts; a host whose part is shorter by one fills up
    with masked rows, so that all have the same number of batches.
    """

    def __init__(
        self,
        rows: "_Rows",
        extent: tuple[int, int],
        batch_size: int,
        scale: normalization.Statistics,
    ):
        self.size = extent[1] - extent[0]
        self.num_batches = _num_batches(self.size, batch_size, jax.process_count())
        self._rows, self._extent, self._batch_size = rows, extent, batch_size
        self._scale = scale
        self._compiled = functools.cache(lambda over: jax.jit(self._finished, out_shardings=over))

    def batches(self, sharding: NamedSharding | None = None) -> Iterator[Batch]:
        """See `pipeline.EvalSource`; a damaged record that is skipped has mask False."""
        rows = order.process_rows(self._batch_size, sharding)
        finish = self._compiled(sharding)
        parts = self.examples(jax.process_index(), jax.process_count())
        return one_ahead(
            finish(place_rows(part, rows, self._batch_size, sharding)) for part in parts
        )

    def examples(self, host: int, hosts: int) -> Iterator[HostBatch]:
        """The rows of host number `host` of `hosts`, before what the device does.

        `image` (n, H, W, C) uint8, `label` (n,) int32, `mask` (n,) bool, n = B / hosts.
        """
        width = self._batch_size // hosts
        first, last = (self._extent[0] + self.size * edge // hosts for edge in (host, host + 1))
        records = self._rows.records.ordered(first, last).batch(width)
        records = records.map(lambda *batch: (*batch, batch[1]))  # positions, which nothing uses
        batches = self._rows.decoder.batches(records, seed=None)
        before, part = self._rows.skipped, None
        for batch in batches:
            part = _padded({**batch, "mask": self._rows.usable(batch)}, width)
            yield part
        made = -(-(last - first) // width)
        for _ in range(made, _num_batches(self.size, self._batch_size, hosts)):
            part = part or self._blank(width)
            yield {**part, "mask": np.zeros(width, bool)}
        if self._rows.skipped > before:
            skipped = self._rows.skipped - before
            log.warning("evaluation: %d of %d examples skipped", skipped, last - first)

    def _blank(self, width: int) -> HostBatch:
        images = np.zeros((width, *self._rows.decoder.image_shape), np.uint8)
        return {"image": images, "label": np.zeros(width, np.int32)}

    def _finished(self, batch):
        return {**batch, "image": normalization.normalise(batch["image"], *self._scale)}


class _Rows:
    """Records with their decoder, and the count of the damaged ones among them."""

    def __init__(self, records: Records, decoder: decode.Decoder, on_error: str):
        self.records, self.decoder = records, decoder
        self.skipped = 0
        self._on_error = on_error

    def usable(self, batch: HostBatch) -> np.ndarray:
        """Which rows (n,) of a decoded batch are good; raises DataError unless told to skip."""
        usable = batch["wrong"] == b""
        for row in np.flatnonzero(~usable):
            where, wrong = self.records.where(int(batch["index"][row])), batch["wrong"][row]
            message = f"{where} {wrong.decode()}"
            if self._on_error == "raise":
                raise DataError(f"{message}; mend it, or set data.on_error to 'skip'")
            self.skipped += 1
            # Named one by one at first, then ever more rarely: 16th, 32nd, 64th, ...
            if self.skipped <= _TOLD or self.skipped & (self.skipped - 1) == 0:
                log.warning("%s; %d skipped so far", message, self.skipped)
        return usable


def _measured(rows: _Rows, size: int, config: ml_collections.ConfigDict) -> Statistics:
    """Statistics of the first `size` records as evaluation sees them, in blocks all over them."""
    count = min(size, normalization.MEASURED)
    blocks = 1 if count == size else _BLOCKS

    def images() -> Iterator[np.ndarray]:
        for block in range(blocks):
            first = size * block // blocks
            extent = first, first + count * (block + 1) // blocks - count * block // blocks
            source = StreamedEval(rows, extent, config.train.eval_batch_size, scale=((), ()))
            for part in source.examples(0, 1):
                yield part["image"][part["mask"]]

    mean, std = normalization.measure(images())
    log.info("measured on %d training images: mean %s, deviation %s", count, mean, std)
    return mean, std


def _replaced(usable: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """For each row (n,) the good one that stands in for it, itself if good."""
    good = np.flatnonzero(usable)
    chosen = np.arange(len(usable))
    for row in np.flatnonzero(~usable):
        distance = (good - row) % len(usable)
        # Rows of its own stream first: they are the same on any number of hosts.
        chosen[row] = good[np.lexsort((distance, stream[good] != stream[row]))[0]]
    return chosen


def _padded(batch: HostBatch, width: int) -> HostBatch:
    """`image`, `label` and `mask` with the last row repeated up to `width` rows, mask False."""
    missing = width - len(batch["mask"])
    chosen = np.minimum(np.arange(width), width - missing - 1)
    mask = batch["mask"][chosen] & (np.arange(width) < width - missing)
    return {"image": batch["image"][chosen], "label": batch["label"][chosen], "mask": mask}


def _num_batches(size: int, batch_size: int, hosts: int) -> int:
    longest = -(-size // hosts)
    return -(-longest // (batch_size // hosts))
