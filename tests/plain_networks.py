"""The networks as one would write them in plain JAX, to compare the fast formulations with.

Same parameters, same results: convolutions are `lax.conv_general_dilated`, max pooling is
`lax.reduce_window`, batch norm is its formula, and all gradients are JAX's own.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax.numpy as jnp
from jax import lax

from dfs_jax import surgery
from dfs_jax.models import layers
from dfs_jax.ops import pooling
from dfs_jax.surgery import as_partitioned


def conv(x, kernel, *, strides=1, padding=0, groups=1):
    """`surgery.conv` by its definition."""
    x = as_partitioned(x).stopped()
    dtype = jnp.result_type(x, kernel)
    strides = (strides, strides) if isinstance(strides, int) else strides
    padding = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    return lax.conv_general_dilated(
        x.astype(dtype),
        kernel.astype(dtype),
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def dense(x, kernel, bias=None):
    """`surgery.dense` by its definition."""
    y = as_partitioned(x).stopped() @ kernel
    return y if bias is None else y + bias


def max_pool(x, window, strides, padding=0):
    """`pooling.max_pool` by the library's window reduction."""
    edges = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    sizes, steps = (1, window, window, 1), (1, strides, strides, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, sizes, steps, edges)


def normalised(epsilon):
    """`layers._normalised` by its formula."""

    def normalise(x, scale, bias):
        wide = x.astype(scale.dtype)
        axes = tuple(range(x.ndim - 1))
        factor = scale * lax.rsqrt(jnp.var(wide, axes) + epsilon)
        return ((wide - jnp.mean(wide, axes)) * factor + bias).astype(x.dtype)

    return normalise


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Networks traced inside are the plain ones."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(surgery, "conv", conv))
        stack.enter_context(mock.patch.object(surgery, "dense", dense))
        factory = lambda *choice: lambda x: max_pool(x, *choice)  # noqa: E731
        stack.enter_context(mock.patch.object(pooling, "_maximum", factory))
        stack.enter_context(mock.patch.object(layers, "_normalised", normalised))
        yield
