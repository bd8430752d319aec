"""From stored records to batches of pixels, in TensorFlow on the host.

The random resized crop of training (arXiv 1409.4842, section 6) and the resize and centre crop of
evaluation. What a file's pixels are is said in `pictures.py`; TensorFlow decodes plain JPEGs to the
same ones, and of a random crop only the part that is needed. A record that cannot be used does not
stop a batch: its row says so, and what follows from that is the caller's matter. TensorFlow is
imported when called.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dfs_jax.data.input import pictures

if TYPE_CHECKING:
    import tensorflow as tf

_MISSING = b"cannot be read: its file is missing, truncated or damaged there"
_BAD_LABEL = b"has a label that is not one of the classes"

_RESIZED = 256 / 224  # sides that an evaluated image covers before its centre crop, over the crop's
_ASPECT_RATIOS = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10
# Batches in work, so that the end of one leaves no core idle.
_AT_A_TIME = 4
# The default is faster in theory alone, and off by 26 grey levels at a quality of 100.
_DCT = "INTEGER_ACCURATE"

# What the byte behind 0xFF says: 1, here the pixels begin; 2, here is a segment of an application.
_CODES = np.array([2 if 0xE0 < c < 0xF0 else c == 0xDA for c in range(256)], np.uint8)

# (stored record, its number) -> (encoded image, label), in a TensorFlow graph.
Parse = Callable[["tf.Tensor", "tf.Tensor"], tuple["tf.Tensor", "tf.Tensor"]]

Rows = dict[str, np.ndarray]


def covered(crop: tuple[int, int]) -> tuple[int, int]:
    """Height and width that an evaluated image covers before its centre `crop` (H, W)."""
    return round(crop[0] * _RESIZED), round(crop[1] * _RESIZED)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How records become images of `image_shape` and labels below `num_classes`."""

    parse: Parse
    image_shape: tuple[int, int, int]  # (H, W, C); C is 1 or 3
    num_classes: int
    min_crop_area: float  # smallest share of an image's area that a random crop covers
    antialias: bool

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.image_shape[:2]

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.image_shape[-1]

    def batches(self, records: "tf.data.Dataset", seed: int | None) -> Iterator[Rows]:
        """`image` (n, H, W, C) uint8, `label`, `index`, `wrong` (n,) of every batch, in order.

        `records` yields batches of stored records, their numbers and positions, (n,) each; a stored
        record "" is one that could not be read. With a `seed` crops are random, a pure function of
        (seed, position); without, images are resized and cropped in the centre. Every record gives
        a row; one that cannot be used is black, and `wrong` completes "<record> ...".
        """
        import tensorflow as tf

        attempts = [  # at a record by itself
            tf.function(functools.partial(self._row, seed=seed, decoded=decoded), autograph=False)
            for decoded in (self._decoded, self._by_pillow)
        ]
        batches = records.interleave(
            lambda *batch: self._at_once(batch, seed),
            cycle_length=_AT_A_TIME,
            num_parallel_calls=_AT_A_TIME,
            deterministic=True,
        )
        for rows, failed in batches.prefetch(1).with_options(options()).as_numpy_iterator():
            if failed[0].size:
                made = [self._by_itself(record, attempts) for record in zip(*failed, strict=True)]
                rows |= {key: np.stack([row[key] for row in made]) for key in made[0]}
            label, wrong = rows["label"], rows["wrong"]
            known = (label >= 0) & (label < self.num_classes)
            wrong = np.where(known | (wrong != b""), wrong, _BAD_LABEL)
            rows["wrong"] = np.where(rows.pop("missing"), _MISSING, wrong)
            yield {**rows, "label": np.where(known, label, 0).astype(np.int32)}

    def _at_once(self, batch: tuple[Any, Any, Any], seed: int | None) -> "tf.data.Dataset":
        """The rows of `batch` and none of its records; or none of the rows, where one fails."""
        import tensorflow as tf

        raw, index, _ = batch
        kinds = {
            "image": tf.TensorSpec(self.image_shape, tf.uint8),
            "label": tf.TensorSpec((), tf.int64),
            "wrong": tf.TensorSpec((), tf.string),
        }

        def rows(*batch):
            return tf.map_fn(
                lambda record: self._row(record, seed, self._decoded),
                batch,
                fn_output_signature=kinds,
                # All cores, and no more: a batch is not alone.
                parallel_iterations=-(-(os.cpu_count() or 1) // (_AT_A_TIME - 1)),
            )

        made = tf.data.Dataset.from_tensors(batch).map(rows).ignore_errors()
        none = {key: tf.zeros((0, *kind.shape), kind.dtype) for key, kind in kinds.items()}
        about, no_record = {"index": index, "missing": raw == ""}, tuple(x[:0] for x in batch)
        made = made.map(lambda rows: ({**rows, **about}, no_record))
        failed = tf.data.Dataset.from_tensors(({**none, **about}, batch))
        return made.concatenate(failed).take(1)

    def _by_itself(self, record: tuple[bytes, int, int], attempts: Sequence[Callable]) -> Rows:
        import tensorflow as tf

        tensors = tuple(map(tf.constant, record))
        for attempt in attempts:
            with contextlib.suppress(tf.errors.OpError):
                return {key: x.numpy() for key, x in attempt(tensors).items()}
        return {"image": np.zeros(self.image_shape, np.uint8), "label": 0, "wrong": _MISSING}

    def _row(
        self, record: tuple[Any, Any, Any], seed: int | None, decoded: Callable
    ) -> dict[str, "tf.Tensor"]:
        import tensorflow as tf

        raw, index, position = record
        encoded, label = self.parse(raw, index)
        if seed is None:
            image, wrong = decoded(encoded, None)
            image = self._centre(image)
        else:
            key = tf.stack([np.int64(seed), position])
            image, wrong = decoded(encoded, lambda shape: self._window(shape, key))
            image = tf.image.resize(image, self.size, "bilinear", antialias=self.antialias)
        # Means of pixels, so rounding leaves them in range.
        image = tf.ensure_shape(tf.cast(tf.round(image), tf.uint8), self.image_shape)
        return {"image": image, "label": tf.cast(label, tf.int64), "wrong": wrong}

    def _decoded(self, encoded: "tf.Tensor", window: Callable | None):
        """Pixels (h, w, C) of an image file, or of a `window` of it by its shape; what is wrong."""
        import tensorflow as tf

        def look(data: bytes) -> np.bool_:
            return np.bool_(pictures.is_plain_jpeg(data, self.channels))

        def of_jpeg():
            fine = {"channels": self.channels, "dct_method": _DCT}
            if window is None:
                return tf.io.decode_jpeg(encoded, **fine), tf.constant("")
            # Decodes only the blocks of pixels that the window needs.
            shape = tf.io.extract_jpeg_shape(encoded)
            pixels = tf.reduce_prod(tf.cast(shape[:2], tf.int64))
            tf.raw_ops.Assert(condition=pixels <= pictures.MOST_PIXELS, data=[pixels])
            top, left, height, width = tf.unstack(window(shape))
            # Colours are stored for two columns at a time: those of the window's edges need
            # the columns beside it.
            first, last = tf.maximum(left - 1, 0), tf.minimum(left + width + 1, shape[1])
            wider = tf.stack([top, first, height, last - first])
            image = tf.image.decode_and_crop_jpeg(encoded, wider, **fine)
            return image[:, left - first : left - first + width], tf.constant("")

        def after_a_look():
            plain = tf.numpy_function(look, [encoded], tf.bool)
            return tf.cond(plain, of_jpeg, lambda: self._by_pillow(encoded, window))

        # Python's look takes 0.1 ms, so most files are spared it.
        if self.channels == 1:
            return after_a_look()
        return tf.cond(_surely_plain_jpeg(encoded), of_jpeg, after_a_look)

    def _by_pillow(self, encoded: "tf.Tensor", window: Callable | None):
        import tensorflow as tf

        def decode(data: bytes) -> tuple[np.ndarray, bytes]:
            try:
                return pictures.decode(data, self.channels), b""
            except pictures.Refused as error:
                return np.zeros((1, 1, self.channels), np.uint8), str(error).encode()

        image, wrong = tf.numpy_function(decode, [encoded], (tf.uint8, tf.string))
        image = tf.ensure_shape(image, (None, None, self.channels))
        if window is not None:
            top, left, height, width = tf.unstack(window(tf.shape(image)))
            image = image[top : top + height, left : left + width]
        return image, tf.ensure_shape(wrong, ())

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

    def _centre(self, image: "tf.Tensor") -> "tf.Tensor":
        """The centre of `image` (h, w, C) once it covers `covered(size)`, as `Preprocessing.fit`.

        Only the rows and columns that are kept are computed.
        """
        import tensorflow as tf

        shape = tf.cast(tf.shape(image)[:2], tf.float64)
        scale = tf.reduce_max(np.array(covered(self.size), np.float64) / shape)
        resized = tf.round(shape * scale)
        corner = (tf.cast(resized, tf.int32) - self.size) // 2
        centre = tf.raw_ops.ScaleAndTranslate(
            images=image[None],
            size=self.size,
            scale=tf.cast(resized / shape, tf.float32),
            translation=-tf.cast(corner, tf.float32),
            kernel_type="triangle",
            antialias=self.antialias,
        )
        return centre[0]


def options() -> "tf.data.Options":
    """Of every pipeline: in order, and as wide as is written there."""
    import tensorflow as tf

    chosen = tf.data.Options()
    chosen.deterministic = True
    # The thread that would tune widths complains when an iterator ends early.
    chosen.autotune.enabled = False
    return chosen


def _surely_plain_jpeg(encoded: "tf.Tensor") -> "tf.Tensor":
    """Whether the first and last bytes alone show what `pictures.is_plain_jpeg` looks for.

    The first kilobyte has the frame's header and the start of the pixels, and no segment of an
    application but JFIF's before them.
    """
    import tensorflow as tf

    head = tf.io.decode_raw(tf.strings.substr(encoded, 0, 1024), tf.uint8)
    codes = tf.gather(tf.constant(_CODES), tf.cast(head[1:], tf.int32))
    told = tf.reduce_max(tf.where(head[:-1] == 0xFF, codes, tf.zeros_like(codes)))
    return (
        (told == 1)
        & (tf.strings.substr(encoded, 0, 3) == b"\xff\xd8\xff")
        & (tf.strings.substr(encoded, -2, 2) == b"\xff\xd9")
    )
