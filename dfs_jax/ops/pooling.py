"""Max pooling whose gradient is fast on CPU; the results are the library's.

Where windows do not overlap, CPU compares the places of a tile with each other and hands the
gradient to the first that is the largest: the library's window reduction is slow there, its
gradient most of all (`docs/performance.md`). GPU and TPU keep the library's: of this file they run
`_window_maximum` alone, as CPU does for windows that overlap. Averages are in `models/layers.py`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dfs_jax.ops.tags import tagged


def max_pool(x: jax.Array, window: int, strides: int, padding: int = 0) -> jax.Array:
    """Maximum over windows of x (B, H, W, C); the border is padded with -inf.

    The gradient goes to the first maximum of a window, in the order of rows, as in PyTorch.
    """
    return _maximum(window, strides, padding)(x)


@functools.cache
def _maximum(window: int, strides: int, padding: int):
    """`max_pool` with its tag."""
    if window == strides and not padding:
        pool = _tiled_maximum(window)
    else:
        pool = functools.partial(_window_maximum, window=window, strides=strides, padding=padding)
    return tagged(f"pool:{window * window}", pool)


def _window_maximum(x, window, strides, padding):
    sizes, steps = (1, window, window, 1), (1, strides, strides, 1)
    edge = (padding, padding)
    lowest = np.array(-np.inf, x.dtype)  # a constant, by which JAX knows that it is a maximum
    return lax.reduce_window(x, lowest, lax.max, sizes, steps, ((0, 0), edge, edge, (0, 0)))


def _tiled_maximum(window: int):
    """Maximum over tiles of window × window; rows and columns left over are dropped."""

    def library(x):
        return _window_maximum(x, window, window, 0)

    def tiles(x):
        """One (B, H', W', C) per place in a tile, in the order of rows."""
        height, width = (size // window * window for size in x.shape[1:3])
        for i, j in itertools.product(range(window), repeat=2):
            yield x[:, i:height:window, j:width:window]

    def on_cpu(x):
        return functools.reduce(jnp.maximum, tiles(x))

    def larger(a, b):
        """The larger of two values with its place, of equal ones the former."""
        return jnp.maximum(a[0], b[0]), jnp.where(b[0] > a[0], b[1], a[1])

    def spread(x, g):
        """g at the first place of its tile where x is largest, zeros elsewhere."""
        # Places are not compared with the maximum that was kept: the compiler may compute x again,
        # and round it otherwise.
        found = [(tile, jnp.uint8(k)) for k, tile in enumerate(tiles(x))]
        while len(found) > 1:
            pairs = zip(found[::2], found[1::2], strict=False)
            found = [larger(*pair) for pair in pairs] + found[len(found) // 2 * 2 :]
        ((_, first),) = found
        batch, rows, columns, channels = g.shape
        k = jnp.arange(window * window, dtype=jnp.uint8).reshape(1, 1, window, 1, window, 1)
        here = first[:, :, None, :, None] == k
        dx = jnp.where(here, g[:, :, None, :, None], 0)
        dx = dx.reshape(batch, rows * window, columns * window, channels)
        left = [(0, size - used) for size, used in zip(x.shape, dx.shape, strict=True)]
        return jnp.pad(dx, left)

    @jax.custom_vjp
    def pool(x):
        return lax.platform_dependent(x, cpu=on_cpu, default=library)

    def forward(x):
        return pool(x), x

    def backward(x, g):
        def default(x, g):
            return jax.vjp(library, x)[1](g)[0]

        x = lax.stop_gradient(x)  # where a maximum is has no derivative
        return (lax.platform_dependent(x, g, cpu=spread, default=default),)

    pool.defvjp(forward, backward)
    return pool
