"""Two ways to compute one thing, held to each other: what the tests of `ops` share."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings

PROPERTY = settings(max_examples=5, deadline=None)


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def assert_equal_with_gradients(ours, theirs, *arrays):
    """Values, gradients, and gradients of gradients in float64, to 1e-10."""

    def gradients(function, *arrays):
        value, pull = jax.vjp(function, *arrays)
        return value, pull(jnp.cos(value))

    def curvature(function, *arrays):
        def squared(*arrays):
            return sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients(function, *arrays)))

        return jax.grad(squared, range(len(arrays)))(*arrays)

    @jax.jit  # one compilation for all, which is what these tests take
    def everything(*arrays):
        return [[what(f, *arrays) for what in (gradients, curvature)] for f in (ours, theirs)]

    found = jax.device_get(everything(*arrays))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        scale = max(1.0, np.abs(b).max())
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=1e-10)
