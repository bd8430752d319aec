"""Inner products and sums of gradients that are whole parameter trees."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def exact(function: Callable) -> Callable:
    """`function` with matrix products in full precision.

    The default of accelerators keeps about three digits, too few to tell what is in conflict.
    """

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return wrapped


def gram(trees: Sequence[Any]) -> jax.Array:
    """Matrix (N, N) of the inner products of N trees, in float32 at least."""
    positions = zip(*map(jax.tree.leaves, trees), strict=True)
    return sum(tensor_gram(tensors) for tensors in positions)


@exact
def tensor_gram(tensors: Sequence[jax.Array]) -> jax.Array:
    """Matrix (N, N) of the inner products of N arrays of one shape, in float32 at least."""
    stacked = jnp.stack(tensors)
    stacked = stacked.astype(jnp.promote_types(jnp.float32, stacked.dtype))
    axes = tuple(range(1, stacked.ndim))
    return jnp.tensordot(stacked, stacked, axes=(axes, axes))


def weighted_sum(trees: Sequence[Any], weights: jax.Array) -> Any:
    """Σ_i weights[i] · trees[i], in the trees' types."""

    def combine(*tensors):
        return sum(weights[i].astype(g.dtype) * g for i, g in enumerate(tensors))

    return jax.tree.map(combine, *trees)
