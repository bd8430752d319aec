"""Gradient equilibrium, GE: every exit's gradient scaled by how deep it stands.

Improved Techniques for Training Adaptive Deep Networks (IMTA, ICCV 2019, arXiv 1908.06294). In
segment i the gradients of the exits i..N-1 meet and their variance grows with their number.
With F_i the feature between segment i (from 0) and what follows,

    ∂/∂F_i = 1/(N-i) · (gradient from exit i) + (N-i-1)/(N-i) · (gradient from deeper exits)

The forward pass is unchanged, and so are the gradients of the classifiers. The feature is the
one that surgery cuts (of MSDNet the coarsest scale, as in the official code). Cost 1×.
"""

import functools

import jax
import jax.numpy as jnp

from dfs_jax.gradients.method import GradientMethod, Update


def equilibrium() -> GradientMethod:
    """The gradient of the summed loss, scaled between segments; no state."""

    def apply(problem, params, state, rng):

        def boundary(i, feature):
            meeting = problem.num_exits - i
            onwards = _scale_gradient(feature, (meeting - 1) / meeting)
            return onwards, _scale_gradient(feature, 1 / meeting)

        def total(params):
            losses, aux = problem.losses(params, boundary=boundary)
            return jnp.sum(losses), aux

        gradients, aux = jax.grad(total, has_aux=True)(params)
        return Update(gradients), aux, state

    return GradientMethod(lambda params: (), apply)


def _scale_gradient(feature, factor: float):
    """`feature`, an array or a `Partitioned`, whose gradient is multiplied by `factor`."""
    return jax.tree.map(lambda x: _identity(factor, x), feature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _identity(factor: float, x: jax.Array) -> jax.Array:
    return x


def _forward(factor, x):
    return x, None


def _backward(factor, residuals, g):
    return (factor * g,)


_identity.defvjp(_forward, _backward)
