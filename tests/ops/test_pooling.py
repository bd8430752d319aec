"""Max pooling against the library's, and where its fast form runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_library import PROPERTY, assert_equal_with_gradients, random
from hypothesis import given
from hypothesis import strategies as st
from plain_networks import max_pool as plain_max_pool

from dfs_jax.ops import pooling


@PROPERTY
@given(
    height=st.integers(2, 7),
    width=st.integers(3, 7),
    window=st.sampled_from([2, 3]),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
def test_max_pool_is_the_library_s(height, width, window, ties, seed):
    with jax.enable_x64(True):
        x = random(seed, 2, max(height, window), max(width, window), 3)
        x = np.round(x) if ties else x
        assert_equal_with_gradients(
            lambda x: pooling.max_pool(x, window, window),
            lambda x: plain_max_pool(x, window, window),
            x,
        )


def test_overlapping_max_pool_is_the_library_s():
    with jax.enable_x64(True):
        x = random(0, 2, 7, 6, 3)
        assert_equal_with_gradients(
            lambda x: pooling.max_pool(x, 3, 2, 1), lambda x: plain_max_pool(x, 3, 2, 1), x
        )


def test_the_first_maximum_gets_the_gradient():
    x = jnp.zeros((1, 4, 4, 1)).at[0, 0, 1, 0].set(1).at[0, 1, 0, 0].set(1)
    gradient = jax.grad(lambda x: jnp.sum(pooling.max_pool(x, 2, 2)))(x)
    expected = np.zeros((4, 4))
    expected[0, 1] = expected[0, 2] = expected[2, 0] = expected[2, 2] = 1
    np.testing.assert_array_equal(gradient[0, :, :, 0], expected)


def test_max_pool_hands_on_what_is_not_a_number():
    x = jnp.zeros((1, 4, 4, 1)).at[0, 1, 1, 0].set(jnp.nan)
    assert jnp.isnan(pooling.max_pool(x, 2, 2)).tolist() == [[[[True], [False]], [[False]] * 2]]


def test_max_pool_at_the_size_of_imagenet():
    """Under jit, where a pooling by reshape has given wrong gradients."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 224, 224, 4)), jnp.float32)
    ours, theirs = (
        jax.jit(jax.grad(lambda x, pool=pool: jnp.sum(jnp.sin(pool(x, 2, 2)))))(x)
        for pool in (pooling.max_pool, plain_max_pool)
    )
    np.testing.assert_array_equal(ours, theirs)


# The gradient of a pooling of tiles.
_GRADIENT = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(pooling.max_pool(x, 2, 2)))))


def _images(sharding=None):
    return jax.ShapeDtypeStruct((64, 32, 32, 16), jnp.float32, sharding=sharding)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_keep_the_library_s(platform):
    text = _GRADIENT.trace(_images()).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.select_and_scatter" in text
    assert "stablehlo.reduce_window" in text


def test_cpu_reduces_no_window():
    text = _GRADIENT.lower(_images()).as_text()
    assert "stablehlo.select_and_scatter" not in text
    assert "stablehlo.reduce_window" not in text


def test_eight_devices_move_no_activation():
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    text = _GRADIENT.lower(_images(spread)).compile().as_text()
    for moving in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert moving not in text
