import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from scipy import ndimage
from sklearn import datasets

from dfs_jax import config, data
from dfs_jax.config import ConfigError
from dfs_jax.data import double_digits as command
from dfs_jax.data import pipeline
from dfs_jax.data.augment import normalization
from dfs_jax.data.input import order
from dfs_jax.data.sets import double_digits, double_digits_drawing
from dfs_jax.training.run import prepare

ROOT = Path(__file__).parents[3]

# Everything still: each digit upright in the middle of the picture, grey on an even grey.
STILL = double_digits_drawing.Style(
    scale=(2.0, 2.0),
    turn=0.0,
    shear=0.0,
    beyond=-8.0,
    ground=(0.5, 0.5),
    contrast=(0.4, 0.4),
    chroma=0.0,
    texture=0.0,
    grain=0.0,
    stripe=(0.0, 0.0),
)


def still(**changes):
    return dataclasses.replace(STILL, **changes)


def pictures(style, digits, count=double_digits_drawing.BLOCK, seed=(3,)):
    """`count` pictures whose digit d is drawn from the one source `digits[d]` (10, 8, 8)."""
    blocks = zip(
        *double_digits_drawing.draw(style, digits, np.arange(10), seed, count), strict=True
    )
    return tuple(np.concatenate(block) for block in blocks)


def drawn(variant, part, count):
    blocks = zip(*double_digits.pictures(variant, part, count), strict=True)
    return tuple(np.concatenate(block) for block in blocks)


def sevens(ink):
    """Sources without ink but for the seven."""
    digits = np.zeros((10, 8, 8))
    digits[7] = ink
    return digits


def luminance(images):
    return np.asarray(images, np.float64) @ [0.25, 0.5, 0.25] / 255


@pytest.mark.parametrize(
    ("variant", "part", "digest"),
    [
        ("clean", "train", "c857dffabb9063c2"),
        ("clean", "validation", "3823649cf8e82eb2"),
        ("clean", "test", "dab74150053e7de4"),
        ("hard", "train", "731b4425b6bba036"),
        ("hard", "validation", "ce3a4e8ce656d588"),
        ("hard", "test", "e6c642ebfe519bcd"),
    ],
)
def test_pictures_stay_as_they_are(variant, part, digest):
    """A change of these needs a new version of the builder, or results stop being comparable."""
    assert double_digits.DoubleDigits.VERSION == "1.0.0"
    images, labels = drawn(variant, part, 40)
    found = hashlib.sha256(images.tobytes() + labels.astype(np.uint8).tobytes())
    assert found.hexdigest()[:16] == digest


def test_the_number_of_pictures_changes_none_of_them():
    images, labels = drawn("hard", "train", 1001)
    assert images.shape == (1001, 32, 32, 3)
    assert images.dtype == np.uint8
    for count in (1, 500, 501):
        fewer = drawn("hard", "train", count)
        np.testing.assert_array_equal(fewer[0], images[:count])
        np.testing.assert_array_equal(fewer[1], labels[:count])
    assert len(np.unique(images.reshape(1001, -1), axis=0)) == 1001
    assert list(double_digits.pictures("hard", "train", 0)) == []


def test_every_block_holds_each_class_equally_often():
    _, labels = drawn("clean", "train", 2 * double_digits_drawing.BLOCK)
    first, second = np.split(labels, 2)
    for block in (first, second):
        np.testing.assert_array_equal(np.bincount(block), np.full(100, 5))
    assert (first != second).mean() > 0.9


def test_no_two_parts_share_a_source():
    assert sum(double_digits.PICTURES.values()) == 60_000
    parts = {part: double_digits.sources(part) for part in double_digits.PICTURES}
    assert {part: len(targets) for part, (_, targets) in parts.items()} == double_digits.SOURCES
    every = np.concatenate([ink.reshape(-1, 64) for ink, _ in parts.values()])
    assert len(np.unique(every, axis=0)) == 1797
    source = datasets.load_digits()
    of = {image.tobytes(): target for image, target in zip(source.data, source.target, strict=True)}
    for ink, targets in parts.values():
        assert [of[(16 * image).tobytes()] for image in ink] == targets.tolist()


@pytest.mark.parametrize("variant", double_digits.VARIANTS)
def test_tens_are_lighter_and_units_darker_than_the_ground(variant):
    style = dataclasses.replace(double_digits_drawing.STYLES[variant], stripe=(0.0, 0.0), grain=0.0)
    digits = sevens(double_digits.sources("train")[0][0])
    images, labels = pictures(style, digits)
    bare, _ = pictures(style, np.zeros((10, 8, 8)))  # the same draws: the same ground
    change = luminance(images) - luminance(bare)
    tens, units = labels // 10 == 7, labels % 10 == 7
    least = style.contrast[0] - style.texture - 0.1  # colours are clipped, sources not quite black
    assert np.abs(change[~tens & ~units]).max() == 0
    for rows, sign in ((tens & ~units, 1), (units & ~tens, -1)):
        assert rows.sum() == 45
        assert (sign * change[rows]).max((1, 2)).min() > least
        assert (sign * change[rows]).min() > -style.texture - 0.01


def test_a_digit_is_enlarged_bilinearly():
    ink = double_digits.sources("train")[0][5]
    images, labels = pictures(still(), sevens(ink))
    place = np.stack(np.meshgrid(*[(np.arange(32) - 15.5) / 2 + 3.5] * 2, indexing="ij"))
    read = ndimage.map_coordinates(ink, place, order=1, mode="grid-constant")
    expected = 0.5 + 0.4 * np.clip(2 * read - 0.4, 0, 1)
    (image,) = np.unique(images[(labels // 10 == 7) & (labels != 77)], axis=0)
    assert np.abs(image / 255 - expected[..., None]).max() < 0.5001 / 255


def slants(style, ink):
    """Angle (radians, from the vertical) of the inked pixels of each picture of a lone seven."""
    images, labels = pictures(style, sevens(ink))
    mass = luminance(images[(labels // 10 == 7) & (labels != 77)]) - 0.5
    mass = mass / mass.sum((1, 2), keepdims=True)
    grid = np.arange(32)
    row, column = (mass.sum(axis) @ grid for axis in (2, 1))
    rows, columns = grid[:, None] - row[:, None, None], grid - column[:, None, None]
    rr, rc, cc = ((mass * x).sum((1, 2)) for x in (rows**2, rows * columns, columns**2))
    return np.arctan2(2 * rc, rr - cc) / 2


@pytest.mark.parametrize(("turn", "shear"), [(0.35, 0.0), (0.0, 0.3)])
def test_slant_and_shear_reach_their_limits_and_no_further(turn, shear):
    bar = np.zeros((8, 8))
    bar[:, 3:5] = 1.0
    found = slants(still(turn=turn, shear=shear), bar)
    assert len(found) == 45
    limit = turn + np.arctan(shear)
    assert np.abs(found).max() < limit * 1.05
    assert found.max() > 0.8 * limit
    assert found.min() < -0.8 * limit


def test_digits_stay_inside_and_reach_every_edge():
    images, labels = pictures(still(scale=(1.5, 2.1), beyond=0.0), sevens(np.ones((8, 8))), 4000)
    inked = luminance(images[(labels // 10 == 7) & (labels != 77)]) > 0.6
    assert inked.any(0)[1:-1, 1:-1].all()
    sides = np.sqrt(inked.sum((1, 2)))
    assert 11.5 < sides.min() < sides.max() < 18.5  # nothing is cut off
    cut = pictures(still(scale=(1.5, 1.5), beyond=6.0), sevens(np.ones((8, 8))), 4000)
    assert (luminance(cut[0]) > 0.6).sum((1, 2))[cut[1] // 10 == 7].min() < 100


def test_either_digit_stands_in_front():
    images, _ = pictures(still(), np.ones((10, 8, 8)))
    middle = luminance(images)[:, 15, 15]
    assert set(np.round(middle, 1)) == {0.1, 0.9}
    assert 0.4 < (middle > 0.5).mean() < 0.6


def test_stripes_hide_both_digits():
    bare, _ = pictures(still(stripe=(200.0, 200.0)), np.ones((10, 8, 8)))
    assert np.abs(luminance(bare) - 0.5).max() < 0.01
    thin, _ = pictures(still(contrast=(0.4, 0.4), stripe=(3.0, 3.0)), np.ones((10, 8, 8)))
    hidden = (np.abs(luminance(thin) - 0.5) < 0.05)[:, 8:24, 8:24].mean((1, 2))
    assert 0.05 < hidden.mean() < 0.3


def test_colours_have_the_luminance_that_was_drawn():
    style = still(ground=(0.35, 0.65), chroma=0.3)
    images, _ = pictures(style, np.zeros((10, 8, 8)))
    found = luminance(images)
    assert np.ptp(found, axis=(1, 2)).max() == 0
    assert 0.345 < found.min() < 0.36
    assert 0.64 < found.max() < 0.655
    assert np.ptp(images[:, 0, 0], axis=-1).max() > 80


def test_missing_digits_are_named():
    with pytest.raises(ValueError, match=r"all ten digits, not \[0, 1, 2\]"):
        next(double_digits_drawing.draw(STILL, np.zeros((3, 8, 8)), np.arange(3), (0,), 5))


# The data set, in small.


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The default configuration, with 600 + 100 training and 100 test pictures."""
    for part, size in (("train", 600), ("validation", 100), ("test", 100)):
        monkeypatch.setitem(double_digits.PICTURES, part, size)
    c = config.load(str(ROOT / "configs" / "double_digits.py"))
    c.data.update(dir=str(tmp_path), validation_size=100)
    c.train.update(batch_size=600, eval_batch_size=64)
    return c


def grey_levels(batch, name):
    mean, std = (np.array(s) for s in normalization.STATISTICS[name])
    return np.round((np.asarray(batch["image"], np.float64) * std + mean) * 255).astype(np.uint8)


def test_both_variants_are_prepared_and_served(small, tmp_path):
    seen = []
    for variant in double_digits.VARIANTS:
        small.data.name = f"double_digits/{variant}"
        assert small.data.name in data.names()
        found = data.create(small)
        spec = found.spec
        assert (spec.train_size, spec.validation_size, spec.test_size) == (600, 100, 100)
        assert (spec.name, spec.inputs["image"].shape, spec.num_classes) == (
            small.data.name,
            (32, 32, 3),
            100,
        )
        assert spec.class_names[7] == "07"
        for part, source in (("validation", found.validation), ("test", found.test)):
            images, labels = drawn(variant, part, 100)
            batch = next(source.batches())
            np.testing.assert_array_equal(batch["label"], labels[:64])
            np.testing.assert_array_equal(grey_levels(batch, spec.name), images[:64])
        batch = next(found.train.batches(0))
        images, labels = drawn(variant, "train", 600)
        rows = order.train_indices(600, 600, small.data.seed, 0)
        np.testing.assert_array_equal(batch["label"], labels[rows])
        np.testing.assert_array_equal(grey_levels(batch, spec.name), images[rows])
        assert np.abs(np.mean(batch["image"], (0, 1, 2))).max() < 0.1
        np.testing.assert_allclose(np.std(batch["image"], (0, 1, 2)), 1, atol=0.1)
        seen.append(images)
    assert (seen[0] != seen[1]).any((1, 2, 3)).all()
    assert {"clean", "hard"} <= {path.name for path in (tmp_path / "double_digits").iterdir()}
    (tmp_path / "double_digits" / "hard" / "1.0.0" / "dataset_info.json").write_text("{")
    with pytest.raises(pipeline.DataError, match=r"double_digits/hard\S* cannot be read"):
        data.create(small)
    small.data.name = "double_digits/easy"
    with pytest.raises(ConfigError, match=r"known: .*double_digits/clean, double_digits/hard"):
        data.create(small)


def test_units_are_the_clean_pictures_with_one_digit_as_the_class(small, tmp_path):
    small.data.name = "double_digits/units"
    found = data.create(small)
    assert found.spec.name == small.data.name
    assert found.spec.class_names == tuple("0123456789")
    for part, source in (("validation", found.validation), ("test", found.test)):
        images, labels = drawn("clean", part, 100)
        batch = next(source.batches())
        np.testing.assert_array_equal(batch["label"], labels[:64] % 10)
        np.testing.assert_array_equal(grey_levels(batch, "double_digits/clean"), images[:64])
    labels = drawn("clean", "train", 600)[1] % 10
    rows = order.train_indices(600, 600, small.data.seed, 0)
    np.testing.assert_array_equal(next(found.train.batches(0))["label"], labels[rows])
    prepared = {path.name for path in (tmp_path / "double_digits").iterdir()}
    assert "units" not in prepared  # nothing is drawn a second time


def test_validation_is_the_end_of_the_training_split(small):
    small.data.validation_size = 30
    found = data.create(small)
    assert (found.train.size, found.validation.size) == (670, 30)
    batch = next(found.validation.batches())
    labels = drawn("clean", "validation", 100)[1][-30:]
    np.testing.assert_array_equal(np.asarray(batch["label"])[np.asarray(batch["mask"])], labels)


def test_the_builder_has_a_configuration_for_each_variant():
    assert tuple(double_digits.DoubleDigits.builder_configs) == double_digits.VARIANTS
    assert tfds.builder_cls("double_digits") is double_digits.DoubleDigits


@pytest.mark.parametrize("preset", ["vgg7,joint", "msdnet,dfs_all", "resnet18,dfs"])
def test_presets_fit_the_pictures(small, preset):
    chosen = config.load(str(ROOT / "configs" / f"double_digits.py:{preset}"))
    chosen.data.update(dir=small.data.dir, validation_size=100)
    run = prepare(chosen)
    assert run.total_steps == 1500
    assert run.network.num_exits == {"v": 6, "m": 5, "r": 4}[preset[0]]
    assert run.network.surgery.partition == ("joint" not in preset)


def test_the_command_writes_samples_and_figures(small, tmp_path, capsys):
    page = tmp_path / "page.png"
    assert command.main(["clean", "--samples", str(page)]) == 0
    assert page.read_bytes()[:4] == b"\x89PNG"
    assert page.stat().st_size < 150_000
    printed = capsys.readouterr().out
    assert "train: 600 pictures, 5 to 9 of a class, from 1197 source digits" in printed
    with pytest.raises(SystemExit) as caught:
        command.main(["easy"])
    assert caught.value.code == 2
    assert "invalid choice: 'easy'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("variant", double_digits.VARIANTS)
def test_the_card_and_the_statistics_are_those_of_the_pictures(variant):
    figures = command.describe(variant)
    card = (ROOT / "docs" / "double_digits.md").read_text()
    assert figures in card
    for values, line in zip(
        normalization.STATISTICS[f"double_digits/{variant}"], figures.splitlines()[-2:], strict=True
    ):
        assert line.endswith(", ".join(f"{value:.6f}" for value in values))
