"""Image files as the network takes them."""

import itertools
import types

import bundles
import numpy as np
import pytest
from PIL import Image

from dfs_jax import config, data
from dfs_jax.early_exit import export, serving
from dfs_jax.early_exit.preprocessing import Preprocessing


def test_images_of_any_size_and_colour(tmp_path):
    """Reduced to the network's size and channels; a photo's orientation is respected."""
    preprocessing = Preprocessing(bundles.IMAGE, (0.4,), (0.3,))
    grey = np.random.default_rng(0).integers(0, 256, (12, 10), dtype=np.uint8)
    upright = Image.fromarray(grey)
    upright.save(tmp_path / "grey.png")
    upright.convert("RGB").save(tmp_path / "colour.png")
    upright.convert("P").save(tmp_path / "palette.gif")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    expected = preprocessing.fit(grey[..., None])
    for name in ("grey.png", "colour.png", "palette.gif", "turned.png"):
        np.testing.assert_array_equal(
            serving.read_image(str(tmp_path / name), preprocessing), expected
        )
    colour = Preprocessing((6, 5, 3), (0.4,) * 3, (0.3,) * 3)
    found = serving.read_image(str(tmp_path / "grey.png"), colour)
    np.testing.assert_array_equal(found, np.repeat(expected, 3, axis=-1))


def upside_down(i: int, lit: bool) -> tuple[Image.Image, dict]:
    """Light above or below, stored upside down with a tag that says so."""
    pixels = np.random.default_rng(i).integers(0, 60, (20, 20), dtype=np.uint8)
    pixels[:10] += 150
    exif = Image.Exif()
    exif[0x0112] = 3
    stored = pixels[::-1] if lit else pixels
    return Image.fromarray(stored), {"exif": exif}


def sixteen_bits(i: int, lit: bool) -> tuple[Image.Image, dict]:
    """Dark or bright, of 16 bits: all beyond 255."""
    grey = np.random.default_rng(i).integers(0, 20_000, (20, 20))
    return Image.fromarray((grey + (40_000 if lit else 1_000)).astype(np.uint16)), {}


@pytest.mark.parametrize(
    ("made", "kind", "lit_pixels"),
    [
        (upside_down, "jpg", lambda image: image[:8].mean() > image[8:].mean()),
        (sixteen_bits, "png", lambda image: image.mean() > 128),
    ],
)
def test_predictions_see_what_training_and_evaluation_saw(tmp_path, made, kind, lit_pixels):
    for split, i, lit in itertools.product(("train", "test"), range(4), (False, True)):
        place = tmp_path / split / ("b_lit" if lit else "a_other")
        place.mkdir(parents=True, exist_ok=True)
        image, options = made(i, lit)
        image.save(place / f"{i}.{kind}", **options)
    c = config.default()
    c.data.update(name="folder", dir=str(tmp_path), streams=1, validation_size=0)
    c.data.update(normalization="imagenet", crop_area=1.0, image_size=(16, 24))
    c.train.batch_size = c.train.eval_batch_size = 8
    d = data.create(c)
    trained = next(d.train.examples(0, np.arange(8)))
    evaluated = next(d.test.examples(0, 1))
    for batch in (trained, evaluated):
        assert [lit_pixels(image) for image in batch["image"]] == batch["label"].tolist()
    preprocessing = export._preprocessing(types.SimpleNamespace(data=d, config=c))
    assert preprocessing.short_side == (18, 27)
    files = sorted((tmp_path / "test").glob("*/*"))
    predicted = np.stack([serving.read_image(str(file), preprocessing) for file in files])
    assert np.abs(predicted.astype(int) - evaluated["image"]).max() <= 3
