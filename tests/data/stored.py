"""Small data sets on disk for the tests of streams: ImageNet's archives, TFRECORD, folders."""

import io
import tarfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

CLASSES, PER_CLASS, VALIDATION = 4, 15, 37
TRAIN = CLASSES * PER_CLASS


def encoded(pixels: np.ndarray, kind: str = "JPEG") -> bytes:
    """`pixels` (H, W, 3) uint8 as the bytes of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def photo(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth image (height, width, 3) of its own for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))


def imagenet_archives(directory: Path, validation_numbers=range(1, VALIDATION + 1)) -> None:
    """ILSVRC2012_img_train.tar, a tar of one tar per class, and the flat ILSVRC2012_img_val.tar."""
    directory.mkdir(parents=True, exist_ok=True)
    names = Path(tfds.core.tfds_path("datasets/imagenet2012/labels.txt")).read_text().split()
    with tarfile.open(directory / "ILSVRC2012_img_train.tar", "w") as outer:
        for label, name in enumerate(names[:CLASSES]):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for i in range(PER_CLASS):
                    _add(archive, f"{name}_{i}.JPEG", encoded(photo(label * PER_CLASS + i)))
            _add(outer, f"{name}.tar", inner.getvalue())
    with tarfile.open(directory / "ILSVRC2012_img_val.tar", "w") as archive:
        for number in validation_numbers:
            name = f"ILSVRC2012_val_{number:08d}.JPEG"
            _add(archive, name, encoded(photo(10_000 + number)))


def tfrecord(path: Path, payloads: list[bytes]) -> str:
    """A TFRECORD file of these records."""
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path)) as writer:
        for payload in payloads:
            writer.write(payload)
    return str(path)


def example(image: bytes, label: int) -> bytes:
    """A record as TFDS stores it."""
    import tensorflow as tf

    feature = {
        "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
        "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
    }
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def image_folder(root: Path, sizes: dict[str, dict[str, int]]) -> Path:
    """DIR/SPLIT/CLASS/N.jpg with as many images as `sizes` says, all different."""
    seed = 0
    for split, classes in sizes.items():
        for name, size in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(size):
                (root / split / name / f"{i}.jpg").write_bytes(encoded(photo(seed)))
                seed += 1
    return root


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
