import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfs_jax.config import ConfigError
from dfs_jax.data.augment import augmentation, normalization
from dfs_jax.data.augment.augmentation import Augmentation

KEYS = jax.random.split(jax.random.key(0), 2000)


def picture(height, width, channels=3):
    """An image without black pixels, so that cut ones show."""
    return np.random.default_rng(height).integers(1, 256, (height, width, channels), dtype=np.uint8)


@settings(max_examples=10, deadline=None)
@given(data=st.data(), height=st.integers(1, 7), width=st.integers(1, 7), padding=st.integers(0, 9))
def test_crop_is_a_window_of_the_padded_image(data, height, width, padding):
    image = picture(height, width)
    top, left = (data.draw(st.integers(0, 2 * padding)) for _ in range(2))
    fill = data.draw(st.integers(0, 255))
    pads = ((padding, padding), (padding, padding), (0, 0))
    expected = np.pad(image, pads, constant_values=fill)[top : top + height, left : left + width]
    found = augmentation.crop(jnp.asarray(image), jnp.array([top, left]), padding, fill)
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=10, deadline=None)
@given(data=st.data(), height=st.integers(1, 9), width=st.integers(1, 9))
def test_cutout_blackens_the_part_of_the_square_inside(data, height, width):
    image = picture(height, width)
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    size = data.draw(st.integers(1, min(height, width)))
    top, left = y - size // 2, x - size // 2
    expected = image.copy()
    for row in range(height):
        for column in range(width):
            if top <= row < top + size and left <= column < left + size:
                expected[row, column] = 0
    if size % 2 == 0:  # as the PyTorch recipes have it
        half = size // 2
        reference = image.copy()
        reference[max(0, y - half) : min(height, y + half), max(0, x - half) : x + half] = 0
        np.testing.assert_array_equal(expected, reference)
    found = augmentation.cutout(jnp.asarray(image), jnp.array([y, x]), size)
    np.testing.assert_array_equal(found, expected)


def test_flip_mirrors_left_and_right():
    image = picture(3, 5)
    np.testing.assert_array_equal(
        augmentation.flip(jnp.asarray(image), jnp.array(True)), image[:, ::-1]
    )
    np.testing.assert_array_equal(augmentation.flip(jnp.asarray(image), jnp.array(False)), image)


def test_draws_are_uniform_over_all_places():
    offsets = np.asarray(jax.vmap(lambda k: augmentation.draw_crop(k, 2))(KEYS))
    centres = np.asarray(jax.vmap(lambda k: augmentation.draw_cutout(k, (4, 6, 3)))(KEYS))
    flips = np.asarray(jax.vmap(augmentation.draw_flip)(KEYS))[:, None]
    for draws, shape in ((offsets, (5, 5)), (centres, (4, 6)), (flips, (2,))):
        counts = np.zeros(shape)
        np.add.at(counts, tuple(draws.T.astype(int)), 1)
        mean = len(KEYS) / counts.size
        assert np.abs(counts - mean).max() < 5 * np.sqrt(mean), counts


def test_apply_crops_then_flips_then_cuts():
    """The chain equals its links, and a link draws the same whatever the others do."""
    image, key = jnp.asarray(picture(8, 8)), KEYS[3]

    def only(value, **choice):
        return Augmentation(**choice).apply(key, value)

    crop, flip, cut = {"crop_padding": 3, "crop_fill": 9}, {"flip": True}, {"cutout": 4}
    step_by_step = only(only(only(image, **crop), **flip), **cut)
    together = only(image, **crop, **flip, **cut)
    np.testing.assert_array_equal(together, step_by_step)
    np.testing.assert_array_equal(only(image, **crop, **cut), only(only(image, **crop), **cut))
    assert not np.array_equal(together, image)
    np.testing.assert_array_equal(only(image), image)


def test_the_same_pixels_when_computing_in_float64():
    image = jnp.asarray(picture(8, 8))
    chosen = Augmentation(crop_padding=3, flip=True, cutout=4, autoaugment="cifar10")
    several = jax.jit(jax.vmap(lambda key: chosen.apply(key, image)))
    usual = np.asarray(several(KEYS[:32]))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(several(KEYS[:32]), usual)
        assert normalization.normalise(image, (0.5,), (0.5,)).dtype == jnp.float32


def test_normalise():
    image = picture(4, 4)
    mean, std = normalization.STATISTICS["cifar100"]
    expected = (image.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    found = normalization.normalise(jnp.asarray(image), mean, std)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_padding", -1),
        ("crop_padding", 7),
        ("crop_fill", -1),
        ("crop_fill", 256),
        ("cutout", -1),
        ("cutout", 7),  # the shorter side has 6
    ],
)
def test_choices_that_make_no_sense(conf, field, value):
    conf.data[field] = value
    with pytest.raises(ConfigError, match=rf"data\.{field} {value} "):
        Augmentation.from_config(conf, (6, 8, 3))


def test_choices_of_the_configuration(conf):
    conf.data.update(crop_padding=4, crop_fill=128, flip=True, cutout=6)
    assert Augmentation.from_config(conf, (6, 8, 3)) == Augmentation(4, 128, True, 6)


def test_statistics(conf):
    assert normalization.statistics(conf, "cifar100", 3) == normalization.STATISTICS["cifar100"]
    conf.data.normalization = "cifar10"
    assert normalization.statistics(conf, "cifar100", 3) == normalization.STATISTICS["cifar10"]
    with pytest.raises(ConfigError, match="is for 3 channels, but the images have 1"):
        normalization.statistics(conf, "digits", 1)
    conf.data.normalization = "cifra10"
    with pytest.raises(ConfigError, match=r"no statistics 'cifra10'; known: own, cifar10, "):
        normalization.statistics(conf, "digits", 1)
