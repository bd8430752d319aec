"""One picture, one meaning: training, evaluation and predictions on files of every odd kind."""

import itertools

import numpy as np
import odd_files
import pytest
from PIL import Image

from dfs_jax.data.input import decode, pictures
from dfs_jax.early_exit.preprocessing import Preprocessing
from dfs_jax.early_exit.serving import read_image

TABLE = odd_files.table()
SIZE = (12, 16)


def preprocessing(antialias: bool) -> Preprocessing:
    scale = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    covered = decode.covered(SIZE)
    return Preprocessing((*SIZE, 3), **scale, short_side=covered, antialias=antialias)


def read(path, index):
    import tensorflow as tf

    return tf.io.read_file(path), index


def rows(paths, size, *, seed=None, antialias=True) -> dict[str, np.ndarray]:
    import tensorflow as tf

    decoder = decode.Decoder(read, (*size, 3), len(TABLE), 1.0, antialias)
    numbers = np.arange(len(paths))
    records = tf.data.Dataset.from_tensors(([str(path) for path in paths], numbers, numbers))
    (batch,) = decoder.batches(records, seed)
    return batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("odd")
    for name, (content, _) in TABLE.items():
        (path / name).write_bytes(content)
    return path


def shown() -> list[str]:
    return [name for name, (_, wanted) in TABLE.items() if not isinstance(wanted, str)]


def test_the_table_is_long():
    assert len(TABLE) >= 70
    assert len(shown()) >= 55


def difference(one, other) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other).max())


@pytest.mark.parametrize("name", TABLE)
def test_a_file_shows_what_was_stored_or_is_refused(name):
    content, wanted = TABLE[name]
    if isinstance(wanted, str):
        with pytest.raises(pictures.Refused, match=f"^cannot be read as an image: .*{wanted}"):
            pictures.decode(content, 3)
        return
    found = pictures.decode(content, 3)
    assert found.dtype == np.uint8
    assert difference(found, wanted) <= 3
    grey = np.asarray(Image.fromarray(found).convert("L"))[..., None]
    assert difference(pictures.decode(content, 1), grey) <= 1


def test_training_has_the_same_pixels(folder):
    """A crop of the whole image, in the image's own size."""
    by_shape = sorted((TABLE[name][1].shape[:2], name) for name in shown())
    for shape, group in itertools.groupby(by_shape, lambda item: item[0]):
        names = [name for _, name in group]
        batch = rows([folder / name for name in names], shape, seed=0)
        assert (batch["wrong"] == b"").all()
        for name, image in zip(names, batch["image"], strict=True):
            assert difference(image, pictures.decode(TABLE[name][0], 3)) <= 3, name


@pytest.mark.parametrize("antialias", [True, False])
def test_evaluation_has_the_pixels_of_predictions(folder, antialias):
    batch = rows([folder / name for name in TABLE], SIZE, antialias=antialias)
    trained = rows([folder / name for name in TABLE], SIZE, seed=0, antialias=antialias)
    np.testing.assert_array_equal(batch["wrong"], trained["wrong"])
    for name, image, wrong in zip(TABLE, batch["image"], batch["wrong"], strict=True):
        if isinstance(TABLE[name][1], str):
            with pytest.raises(ValueError, match="cannot be read") as refused:
                read_image(str(folder / name), preprocessing(antialias))
            assert str(refused.value) == wrong.decode()
            assert not image.any()
        else:
            assert wrong == b""
            found = read_image(str(folder / name), preprocessing(antialias))
            assert difference(image, found) <= 3, name


def test_the_fast_path_takes_plain_jpegs_alone():
    import tensorflow as tf

    plain = {name for name, (content, _) in TABLE.items() if pictures.is_plain_jpeg(content, 3)}
    upright = {"upright_little_endian.jpg", "upright_xmp.jpg", "turned1.jpg", "comment.jpg"}
    at_a_glance = {"plain.jpg", "progressive.jpg", "grey.jpg", "subsampled.jpg", "named.png"}
    at_a_glance |= {"wide.jpg"}
    assert plain >= upright | at_a_glance | {"stored_as_rgb.jpg"}
    for name, (content, wanted) in TABLE.items():
        if not content:
            continue  # fails there, and is made again by Pillow
        sure = bool(decode._surely_plain_jpeg(tf.constant(content)))
        assert sure == (name in at_a_glance) or name in ("huge.jpg", "comment.jpg"), name
        if name in plain:
            theirs = tf.io.decode_jpeg(content, channels=3, dct_method=decode._DCT).numpy()
            assert difference(theirs, pictures.decode(content, 3)) <= 3
            assert not isinstance(wanted, str)
    assert not pictures.is_plain_jpeg(TABLE["plain.jpg"][0], 1)
    assert pictures.is_plain_jpeg(TABLE["grey.jpg"][0], 1)


def test_crops_are_windows_of_the_whole_picture():
    import tensorflow as tf

    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((80, 60))
    decoder = decode.Decoder(None, (10, 10, 3), 1, 0.1, True)
    windows = [(13, 21, 33, 37), (0, 0, 60, 80), (1, 16, 20, 32), (16, 15, 32, 1), (59, 79, 1, 1)]
    for options in ({}, {"subsampling": 2}, {"quality": 100}, {"progressive": True}):
        content = odd_files.saved(image, "JPEG", **options)
        whole = pictures.decode(content, 3)
        for top, left, height, width in windows:
            window = tf.constant([top, left, height, width])
            found, wrong = decoder._decoded(tf.constant(content), lambda shape, w=window: w)
            assert wrong.numpy() == b""
            wanted = whole[top : top + height, left : left + width]
            assert difference(found.numpy(), wanted) <= 3


def test_other_numbers_of_channels():
    with pytest.raises(ValueError, match="4 channels, which no image file has"):
        pictures.decode(TABLE["plain.png"][0], 4)
