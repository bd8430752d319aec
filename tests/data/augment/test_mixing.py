"""Mixup and CutMix against NumPy, and what they draw."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dfs_jax.config import ConfigError
from dfs_jax.data.augment import mixing
from dfs_jax.data.augment.mixing import Mixing
from dfs_jax.data.input import in_memory

KEYS = jax.random.split(jax.random.key(0), 4000)
SHAPE = (8, 6)


def shares(chosen):
    """What each of many batches keeps of its own images: (4000, H, W)."""
    return np.asarray(jax.jit(jax.vmap(lambda key: mixing.draw_shares(chosen, key, SHAPE)))(KEYS))


def batch(size=5, classes=4):
    rng = np.random.default_rng(size)
    return rng.normal(size=(size, *SHAPE, 3)).astype(np.float32), np.arange(size) % classes


@pytest.mark.parametrize("chosen", [Mixing(mixup=0.5), Mixing(cutmix=1.0)])
def test_images_and_labels_are_mixed_alike(chosen):
    images, labels = batch()

    @jax.jit
    def draw_and_apply(key):
        mixed = chosen.apply(key, jnp.asarray(images), labels, 4)
        return mixing.draw_shares(chosen, key, SHAPE), *mixed

    for key in KEYS[:4]:
        own, found, targets = jax.device_get(draw_and_apply(key))
        own = own.astype(np.float64)
        partner = [1, 2, 3, 4, 0]
        weights = own[..., None]
        expected = weights * images + (1 - weights) * images[partner]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        one_hot = np.eye(4)[labels]
        expected = own.mean() * one_hot + (1 - own.mean()) * one_hot[partner]
        np.testing.assert_allclose(targets, expected, atol=1e-6)
        np.testing.assert_allclose(np.sum(targets, axis=1), 1, atol=1e-6)
        assert targets.dtype == found.dtype == np.float32


@pytest.mark.parametrize(("alpha", "probability"), [(0.2, 1.0), (2.0, 0.3)])
def test_shares_of_mixup_are_from_a_beta_distribution(alpha, probability):
    """In the share of the batches that is mixed."""
    kept = shares(Mixing(mixup=alpha, probability=probability))
    assert (kept == kept[:, :1, :1]).all()
    drawn = kept[:, 0, 0].astype(np.float64)
    if probability < 1:
        alone = np.mean(drawn == 1)
        assert abs(alone - 0.7) < 5 * np.sqrt(0.21 / len(KEYS))
        drawn = drawn[drawn < 1]
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(drawn.mean() - 0.5) < 5 * np.sqrt(variance / len(drawn))
    assert abs(drawn.var() - variance) < 0.1 * variance


def test_cutmix_covers_rectangles():
    kept = shares(Mixing(cutmix=1.0))
    assert set(np.unique(kept)) == {0, 1}
    for own in kept[:500]:
        rows, columns = (own == 0).any(axis=1), (own == 0).any(axis=0)
        np.testing.assert_array_equal(own == 0, rows[:, None] & columns)
        for side in (rows, columns):  # without a gap
            assert np.abs(np.diff(np.r_[0, side, 0])).sum() in (0, 2)
    # Their mean area, beside that of rectangles drawn here: uniform areas, cut off at the edges.
    rng = np.random.default_rng(0)
    lengths = np.array(SHAPE)
    half = (lengths * np.sqrt(rng.uniform(size=(len(KEYS), 1)))).astype(int) // 2
    centres = rng.integers(0, lengths, (len(KEYS), 2))
    sides = np.minimum(centres + half, lengths) - np.maximum(centres - half, 0)
    covered, expected = (kept == 0).mean(axis=(1, 2)), sides.prod(axis=1) / lengths.prod()
    assert abs(covered.mean() - expected.mean()) < 5 * expected.std() * np.sqrt(2 / len(KEYS))
    assert covered.max() == expected.max()


def test_one_of_two_methods():
    kept = shares(Mixing(mixup=1.0, cutmix=1.0))
    rectangles = np.isin(kept, (0, 1)).all(axis=(1, 2))
    assert abs(rectangles.mean() - 0.5) < 5 * np.sqrt(0.25 / len(KEYS))


def test_a_batch_that_is_not_mixed_is_left_alone():
    images, labels = batch()
    never = Mixing(mixup=1.0, probability=0.0)
    apply = jax.jit(lambda key: never.apply(key, jnp.asarray(images), labels, 4))
    found, targets = apply(KEYS[0])
    np.testing.assert_array_equal(found, images)
    np.testing.assert_array_equal(targets, np.eye(4)[labels])


def take(source, start, count, sharding=None):
    with jax.transfer_guard("disallow"):
        batches = list(itertools.islice(source.batches(start, sharding), count))
    return [jax.tree.map(np.asarray, each) for each in batches]


def test_batches_depend_on_seed_and_step_alone(conf):
    conf.data.update(mixup=0.4, cutmix=1.0, normalization="cifar10")
    conf.train.batch_size = 16
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 6, 3), dtype=np.uint8)
    arrays = images, np.arange(40) % 4
    source = in_memory.from_arrays(
        conf, name="made", train=arrays, validation=None, test=arrays, class_names=list("abcd")
    ).train
    straight = take(source, 0, 5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    divided = NamedSharding(mesh, PartitionSpec("data"))
    jax.tree.map(np.testing.assert_array_equal, take(source, 3, 2, divided), straight[3:])
    for each in straight:
        assert each["label"].shape == (16, 4)
        np.testing.assert_allclose(each["label"].sum(axis=1), 1, atol=1e-6)
    assert len({each["label"].max(axis=1).min() for each in straight}) > 1  # every step anew


@pytest.mark.parametrize(
    ("field", "value"),
    [("mixup", -0.1), ("cutmix", float("inf")), ("cutmix", float("nan")), ("mix_probability", 1.5)],
)
def test_choices_that_make_no_sense(conf, field, value):
    conf.data[field] = value
    with pytest.raises(ConfigError, match=rf"data\.{field} {value} "):
        Mixing.from_config(conf)
