"""From stored records to batches of pixels, in TensorFlow on the host.

Decoding, the random resized crop of training (arXiv 1409.4842, section 6) and the resize and
centre crop of evaluation. A record that cannot be used does not stop a batch: its row says so, and
what follows from that is the caller's matter. TensorFlow is imported when called.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf

# What became of a row; the text completes "<record> ...".
USABLE = 0
DAMAGED = {
    1: "cannot be read: its file is missing, truncated or damaged there",
    2: "cannot be read, or does not decode as an image",
    3: "has a label that is not one of the classes",
}
_MISSING, _UNDECODABLE, _BAD_LABEL = DAMAGED

_RESIZED = 256 / 224  # short side of an evaluated image before its centre crop, over the crop's
_ASPECT_RATIOS = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10

# (stored record, its number) -> (encoded image, label), in a TensorFlow graph.
Parse = Callable[["tf.Tensor", "tf.Tensor"], tuple["tf.Tensor", "tf.Tensor"]]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How records become images of `size` x `size` pixels and labels below `num_classes`."""

    parse: Parse
    size: int
    num_classes: int
    min_crop_area: float  # smallest share of an image's area that a random crop covers
    antialias: bool
    channels: int = 3  # 1: grey

    def batches(
        self, records: "tf.data.Dataset", batch_size: int, seed: int | None, *, remainder: bool
    ) -> "tf.data.Dataset":
        """Batches {`image` (n, size, size, 3) uint8, `label`, `status`, `index` (n,)}, in order.

        `records` yields (stored record, its number, position); a stored record "" is one that
        could not be read. With a `seed` crops are random, a pure function of (seed, position);
        without, images are resized and cropped in the centre. `remainder` keeps a last, smaller
        batch. Every record gives a row; one whose `status` is not USABLE is black.
        """
        cores = os.cpu_count() or 1
        # A dataset per record, which turns the failure of one into a row that says so: graphs
        # know no other way to go on after a failed operation. It costs 3 % of the decoding.
        return (
            records.interleave(
                lambda *record: self._row(record, seed),
                cycle_length=2 * cores,
                block_length=1,
                num_parallel_calls=2 * cores,
                deterministic=True,
            )
            .batch(batch_size, drop_remainder=not remainder)
            .prefetch(2)
            .with_options(options())
        )

    def _row(self, record: tuple[Any, Any, Any], seed: int | None) -> "tf.data.Dataset":
        import tensorflow as tf

        raw, index, _ = record
        unreadable = tf.equal(tf.strings.length(raw), 0)
        black = {
            "image": tf.zeros((self.size, self.size, self.channels), tf.uint8),
            "label": tf.constant(0, tf.int32),
            "status": tf.where(unreadable, np.int32(_MISSING), np.int32(_UNDECODABLE)),
            "index": index,
        }
        decoded = tf.data.Dataset.from_tensors(record).map(
            lambda raw, index, position: self._decode(raw, index, position, seed)
        )
        return decoded.ignore_errors().concatenate(tf.data.Dataset.from_tensors(black)).take(1)

    def _decode(self, raw, index, position, seed: int | None) -> dict[str, "tf.Tensor"]:
        import tensorflow as tf

        encoded, label = self.parse(raw, index)
        if seed is None:
            image = self._centre(encoded)
        else:
            image = self._random_crop(encoded, tf.stack([np.int64(seed), position]))
        known = (label >= 0) & (label < self.num_classes)
        return {
            "image": image,
            "label": tf.cast(tf.where(known, label, tf.zeros_like(label)), tf.int32),
            "status": tf.where(known, np.int32(USABLE), np.int32(_BAD_LABEL)),
            "index": index,
        }

    def _random_crop(self, encoded: "tf.Tensor", seed: "tf.Tensor") -> "tf.Tensor":
        import tensorflow as tf

        def of_jpeg():
            # Decodes only the blocks of pixels that the crop needs.
            window = self._window(tf.io.extract_jpeg_shape(encoded), seed)
            return tf.image.decode_and_crop_jpeg(encoded, window, channels=self.channels)

        def of_others():
            image = tf.io.decode_image(encoded, channels=self.channels, expand_animations=False)
            top, left, height, width = tf.unstack(self._window(tf.shape(image), seed))
            return image[top : top + height, left : left + width]

        image = tf.cond(tf.io.is_jpeg(encoded), of_jpeg, of_others)
        return self._resize(image, (self.size, self.size))

    def _window(self, shape: "tf.Tensor", seed: "tf.Tensor") -> "tf.Tensor":
        import tensorflow as tf

        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            shape,
            bounding_boxes=tf.zeros((1, 0, 4)),
            seed=seed,
            min_object_covered=0.0,
            aspect_ratio_range=_ASPECT_RATIOS,
            area_range=(self.min_crop_area, 1.0),
            max_attempts=_CROP_ATTEMPTS,
            use_image_if_no_bounding_boxes=True,
        )
        return tf.concat([begin[:2], size[:2]], 0)

    def _centre(self, encoded: "tf.Tensor") -> "tf.Tensor":
        import tensorflow as tf

        image = tf.io.decode_image(encoded, channels=self.channels, expand_animations=False)
        shape = tf.shape(image)[:2]
        short = round(self.size * _RESIZED)
        scale = tf.cast(short, tf.float64) / tf.cast(tf.reduce_min(shape), tf.float64)
        resized = tf.cast(tf.round(tf.cast(shape, tf.float64) * scale), tf.int32)
        top, left = tf.unstack((resized - self.size) // 2)
        image = self._resize(image, resized)
        image = image[top : top + self.size, left : left + self.size]
        return tf.ensure_shape(image, (self.size, self.size, self.channels))

    def _resize(self, image: "tf.Tensor", shape: Any) -> "tf.Tensor":
        import tensorflow as tf

        image = tf.image.resize(image, shape, "bilinear", antialias=self.antialias)
        return tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), tf.uint8)


def options() -> "tf.data.Options":
    """Of every pipeline: in order, and as wide as is written there."""
    import tensorflow as tf

    chosen = tf.data.Options()
    chosen.deterministic = True
    # The thread that would tune widths complains when an iterator ends early.
    chosen.autotune.enabled = False
    return chosen
