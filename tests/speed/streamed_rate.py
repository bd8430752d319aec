"""Images per second of streamed data against one plain tf.data `map` of the same operations.

    python -m tests.speed.streamed_rate [--pairs 9] [--batches 10]

JPEGs of 500×375, random crops of 224, batches of 64: folders, and records as TFDS prepares
ImageNet, with and without antialias. Ours is `StreamedTrain.examples`: in its order, checked and
ready for skipping; the plain one reads, decodes and crops in one parallel `map`, and fails at a bad
file.
Pairs are interleaved, each side first in turn; printed are medians, and the median of the ratios.
"""

import argparse
import io
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dfs_jax import config, data
from dfs_jax.data.input import streamed
from dfs_jax.data.input.records import Files, TFRecords, parse_example
from dfs_jax.ops import allocator

AHEAD = 12  # batches that either side may have made before they are asked for
IMAGES, CLASSES, BATCH, SIDE, SHARDS = 512, 4, 64, 224, 8
REPEATED = 4  # times that the records hold the images, for epochs are long


def jpeg(seed: int) -> bytes:
    """A picture of 500×375 with the detail of a photograph, of 75 kB."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.BICUBIC), np.float32)
    pixels = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_folder(root: Path, images: list[bytes]) -> list[str]:
    """The images as DIR/train/CLASS/N.jpg; their paths."""
    paths = []
    for i, image in enumerate(images):
        path = root / "train" / str(i % CLASSES) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
        paths.append(str(path))
    return paths


def write_records(root: Path, images: list[bytes]) -> list[str]:
    """The images as TFRECORD files; their paths."""
    import tensorflow as tf

    def example(i: int) -> bytes:
        feature = {
            "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[images[i]])),
            "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[i % CLASSES])),
        }
        return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()

    paths = [str(root / f"train-{shard}") for shard in range(SHARDS)]
    for shard, path in enumerate(paths):
        with tf.io.TFRecordWriter(path) as writer:
            for i in REPEATED * list(range(shard, len(images), SHARDS)):
                writer.write(example(i))
    return paths


def configured(antialias: bool):
    c = config.default()
    c.data.update(image_size=SIDE, antialias=antialias, validation_size=0, streams=SHARDS)
    c.data.update(normalization="imagenet", on_error="skip")
    c.train.batch_size = BATCH
    return c


def plain_map(records, parse, antialias: bool) -> Iterator:
    """Batches of `records`, an endless data set of what `parse` takes, by one parallel map."""
    import tensorflow as tf

    def image_and_label(position, record):
        encoded, label = parse(record)
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(encoded),
            tf.zeros((1, 0, 4)),
            seed=tf.stack([np.int64(0), position]),
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], 0)
        image = tf.image.decode_and_crop_jpeg(encoded, window, 3, dct_method="INTEGER_ACCURATE")
        image = tf.image.resize(image, (SIDE, SIDE), "bilinear", antialias=antialias)
        return tf.cast(tf.round(image), tf.uint8), label

    width = 2 * (os.cpu_count() or 1)
    images = records.enumerate().map(image_and_label, num_parallel_calls=width, deterministic=True)
    chosen = tf.data.Options()
    chosen.autotune.enabled = False
    return images.batch(BATCH).prefetch(2).with_options(chosen).as_numpy_iterator()


def folders(root: Path, images: list[bytes], antialias: bool) -> tuple[Iterator, Iterator]:
    """Our batches of image files, and the plain ones."""
    import tensorflow as tf

    paths = (
        write_folder(root, images)
        if not (root / "train").exists()
        else sorted(map(str, root.glob("train/*/*.jpg")))
    )
    c = configured(antialias)
    c.data.update(name="folder", dir=str(root), validation_size=BATCH)
    ours = data.create(c).train.examples(0, np.arange(BATCH))
    labels = [int(Path(path).parent.name) for path in paths]
    records = tf.data.Dataset.from_tensor_slices((paths, labels)).shuffle(IMAGES, seed=0).repeat()
    zipped = records.map(lambda path, label: (path, label))
    plain = plain_map(zipped, lambda record: (tf.io.read_file(record[0]), record[1]), antialias)
    return ours, plain


def prepared(root: Path, images: list[bytes], antialias: bool) -> tuple[Iterator, Iterator]:
    """Our batches of records, and the plain ones."""
    import tensorflow as tf

    paths = sorted(map(str, root.glob("train-*"))) or write_records(root, images)
    source = TFRecords(
        Files(tuple(paths), (REPEATED * len(images) // SHARDS,) * SHARDS), shuffle_buffer=64
    )
    d = streamed.from_records(
        configured(antialias),
        name="made",
        train=source,
        test=source,
        class_names=[str(k) for k in range(CLASSES)],
    )
    files = tf.data.Dataset.from_tensor_slices(paths)
    records = files.interleave(
        tf.data.TFRecordDataset, cycle_length=SHARDS, num_parallel_calls=SHARDS
    )
    records = records.repeat().shuffle(64)
    return d.train.examples(0, np.arange(BATCH)), plain_map(
        records, lambda raw: parse_example(raw, None), antialias
    )


def rest() -> float:
    """Waits until all have read ahead as far as they do; the seconds of all cores used so far."""
    used = time.process_time()
    while True:
        time.sleep(0.1)
        before, used = used, time.process_time()
        if used - before < 0.005:
            return used


def measured(batches: Iterator, count: int) -> tuple[float, float]:
    """Seconds per image, and seconds of a core per image, of `count` batches."""
    used = rest()
    next(itertools.islice(batches, AHEAD - 1, None))  # those that had been made ahead
    start = time.perf_counter()
    next(itertools.islice(batches, count - 1, None))
    seconds = (time.perf_counter() - start) / count
    return seconds / BATCH, (rest() - used) / (AHEAD + count) / BATCH


def compare(ours: Iterator, plain: Iterator, pairs: int, count: int) -> str:
    """Rates and ratios of interleaved measurements of `count` batches."""
    sides = {"ours": ours, "plain": plain}
    took = np.zeros((pairs + 1, 2, 2))  # the first pair warms up
    for pair in range(pairs + 1):
        for side in (0, 1) if pair % 2 else (1, 0):
            took[pair, side] = measured(list(sides.values())[side], count)
    ratios = took[1:, 1] / took[1:, 0]
    rates = 1 / np.median(took[1:, :, 0], axis=0)
    low, ratio, high = np.quantile(ratios[:, 0], (0.25, 0.5, 0.75))
    cores = np.median(took[1:, :, 1], axis=0) * 1e6
    return (
        f"ours {rates[0]:,.0f}, plain {rates[1]:,.0f} images/s; ratio {ratio:.3f}, quartiles "
        f"{low:.3f} and {high:.3f}; {cores[0]:,.0f} and {cores[1]:,.0f} µs of a core per image, "
        f"ratio {np.median(ratios[:, 1]):.3f}"
    )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--batches", type=int, default=10, help="of one measurement")
    arguments = parser.parse_args(argv)
    allocator.keep_freed_memory()  # as training does, for both sides
    images = [jpeg(i) for i in range(IMAGES)]
    with tempfile.TemporaryDirectory() as root:
        for name, make in (("folder", folders), ("prepared", prepared)):
            for antialias in (False, True):
                sides = make(Path(root), images, antialias)
                result = compare(*sides, arguments.pairs, arguments.batches)
                print(f"{name}, antialias {antialias}: {result}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
