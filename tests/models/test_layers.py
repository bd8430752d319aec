"""Batch norm against its definition, with gradients of first and second order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfs_jax.models.layers import BatchNorm

EPSILON = 1e-5


def definition(x, scale, bias):
    axes = tuple(range(x.ndim - 1))
    centred = x - x.mean(axes)
    return centred / jnp.sqrt((centred**2).mean(axes) + EPSILON) * scale + bias


def layer(x, scale, bias):
    params = {"scale": scale, "bias": bias}
    norm = BatchNorm(dtype=x.dtype)
    stats = norm.init(jax.random.key(0), x, train=True)["batch_stats"]
    variables = {"params": params, "batch_stats": stats}
    return norm.apply(variables, x, train=True, mutable=["batch_stats"])[0]


def loss(function, weights, *arguments):
    return jnp.sum(weights * jnp.sin(function(*arguments)))


def slope(function, weights, spread, *arguments):
    gradients = jax.grad(loss, (2, 3, 4))(function, weights, *arguments)
    return sum(jnp.sum(jnp.cos(spread * g)) for g in gradients)


@jax.jit
def everything(weights, spread, *arguments):
    """Value, gradients and gradients of gradients, of the layer and of its definition."""
    return [
        [
            loss(function, weights, *arguments),
            jax.grad(loss, (2, 3, 4))(function, weights, *arguments),
            jax.grad(slope, (3, 4, 5))(function, weights, spread, *arguments),
        ]
        for function in (layer, definition)
    ]


@settings(max_examples=10, deadline=None)
@given(
    shape=st.sampled_from([(2, 1), (5, 3), (3, 2, 2, 4), (1, 3, 1, 2)]),
    spread=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_the_definition_s(shape, spread, seed):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        arguments = [
            rng.standard_normal(s) * scale + shift
            for s, scale, shift in ((shape, spread, 2.0), (shape[-1:], 1, 0), (shape[-1:], 1, 0))
        ]
        weights = rng.standard_normal(shape)
        found = jax.device_get(everything(weights, spread, *arguments))
        for a, b in zip(*map(jax.tree.leaves, found), strict=True):
            atol = 1e-10 * max(1.0, np.abs(b).max())
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_running_statistics_keep_the_unbiased_variance(momentum):
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (4, 2, 2, 3)), jnp.float32)
    norm = BatchNorm(momentum=momentum)
    variables = norm.init(jax.random.key(0), x, train=True)
    _, new = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    flat = np.asarray(x).reshape(-1, 3)
    np.testing.assert_allclose(new["batch_stats"]["mean"], (1 - momentum) * flat.mean(0), rtol=1e-5)
    expected = momentum + (1 - momentum) * flat.var(0, ddof=1)
    np.testing.assert_allclose(new["batch_stats"]["var"], expected, rtol=1e-5)


def test_bfloat16_is_normalised_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(100, 1, (64, 8)), jnp.bfloat16)
    one, zero = jnp.ones(8), jnp.zeros(8)
    y, pull = jax.vjp(layer, x, one, zero)
    dx, d_scale, d_bias = pull(jnp.ones_like(y))
    assert (y.dtype, dx.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert (d_scale.dtype, d_bias.dtype) == (jnp.float32, jnp.float32)
    expected = definition(x.astype(jnp.float32), one, zero)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=2e-2)
