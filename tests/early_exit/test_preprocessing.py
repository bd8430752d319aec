"""Images made inputs, against JAX's resizing and the normalisation of training."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.data.augment import normalization
from dfs_jax.early_exit.preprocessing import Preprocessing, resize

RGB = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    ("before", "after"),
    [((17, 23), (8, 8)), ((8, 8), (19, 5)), ((1, 3), (4, 4)), ((60, 45), (9, 45))],
)
def test_resizing_is_that_of_jax(before, after, antialias):
    x = image(*before, 3)
    exact = jax.image.resize(
        x.astype(np.float32), (*after, 3), "bilinear", antialias=antialias, precision="highest"
    )
    assert np.abs(np.clip(exact, 0, 255) - resize(x, after, antialias=antialias)).max() <= 0.501


def test_whole_images_are_stretched():
    p = Preprocessing((8, 6, 3), **RGB)
    x = image(20, 40, 3)
    np.testing.assert_array_equal(p.fit(x), resize(x, (8, 6)))
    np.testing.assert_array_equal(p.fit(x[:8, :6]), x[:8, :6])


@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (20, 20), (9, 31)])
def test_the_centre_is_cut_out_once_the_short_side_fits(shape):
    p = Preprocessing((8, 8, 3), **RGB, short_side=10)
    x = image(*shape, 3)
    scale = 10 / min(shape)
    whole = resize(x, tuple(round(side * scale) for side in shape))
    assert min(whole.shape[:2]) == 10
    top, left = (whole.shape[0] - 8) // 2, (whole.shape[1] - 8) // 2
    np.testing.assert_array_equal(p.fit(x), whole[top : top + 8, left : left + 8])


def test_pixels_that_are_cut_off_are_never_computed():
    """Of an image of one row that is made 256 high, millions of columns are cut off."""
    for antialias in (True, False):
        p = Preprocessing((224, 224, 3), **RGB, short_side=256, antialias=antialias)
        for shape in ((1, 20_000), (20_000, 1), (3, 60_000)):
            x = image(*shape, 3)
            tracemalloc.start()
            found = p.fit(x)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert found.shape == (224, 224, 3)
            assert peak < 20 * 2**20
    before = np.full((1, 20_000, 3), 50, np.uint8)
    before[:, 10_000:] = 150
    # What is kept are 7/8 of a pixel, from one centre nearly to the next.
    assert (np.abs(p.fit(before)[:, [0, -1], 0].astype(int) - [56, 144]) <= 1).all()


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("before", "after"), [(300, 17), (17, 300), (40, 41), (2, 9)])
def test_a_part_is_that_of_the_whole(before, after, antialias):
    x = image(before, 3, 3)
    whole = resize(x, (after, 3), antialias=antialias)
    for first, last in ((0, 1), (after // 3, after // 2 + 1), (after - 2, after)):
        part = resize(x, (after, 3), (slice(first, last), slice(1, 3)), antialias=antialias)
        np.testing.assert_allclose(part, whole[first:last, 1:3], atol=1)


def test_images_that_are_not_square():
    """The image covers both sides, and the crop is its centre."""
    p = Preprocessing((8, 16, 3), **RGB, short_side=(10, 20))
    x = image(60, 60, 3)
    np.testing.assert_array_equal(p.fit(x), resize(x, (20, 20))[6:14, 2:18])
    x = image(30, 120, 3)
    np.testing.assert_array_equal(p.fit(x), resize(x, (10, 40))[1:9, 12:28])


def test_normalisation_is_that_of_training():
    p = Preprocessing((4, 4, 3), **RGB)
    x = image(5, 4, 4, 3)
    ours, theirs = p.normalise(x), normalization.normalise(jnp.asarray(x), **RGB)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    exact = (x / 255 - np.array(RGB["mean"])) / np.array(RGB["std"])
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("antialias", [True, False])
def test_streamed_images_are_cut_as_in_evaluation(antialias):
    import tensorflow as tf

    from dfs_jax.data.input import decode

    x, size = image(75, 100, 3), (32, 24)
    decoder = decode.Decoder(None, (*size, 3), 1, 1.0, antialias)
    theirs = np.round(decoder._centre(tf.constant(x)))
    p = Preprocessing((*size, 3), **RGB, short_side=decode.covered(size), antialias=antialias)
    assert np.abs(p.fit(x).astype(int) - theirs).max() <= 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="each channel"):
        Preprocessing((8, 8, 1), **RGB)
    p = Preprocessing((8, 8, 3), **RGB)
    for shape in ((8, 8), (8, 8, 1), (0, 8, 3)):
        with pytest.raises(ValueError, match=r"\(height, width, 3\)"):
            p.fit(np.zeros(shape, np.uint8))
