"""The layers of every network here: linen wrappers of `surgery.conv` and `surgery.dense`,
BatchNorm with PyTorch's statistics, ReLU and average pooling. (Max pooling: `ops/pooling.py`.)

Parameters are float32 (float64 under dtype=float64), the computation has `dtype`. Layers are
tagged, so that `cost.py` counts them whatever their implementation. A layer that takes
`Feature` accepts an array or a `Partitioned`; every layer returns a plain array.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn
from jax import lax

from dfs_jax import surgery
from dfs_jax.ops.tags import tagged
from dfs_jax.surgery import Partitioned

Feature = jax.Array | Partitioned
Initializer = Callable[..., jax.Array]


def full_precision(dtype: Any) -> jnp.dtype:
    """Type of parameters, statistics, logits and losses: at least float32."""
    return jnp.promote_types(jnp.float32, dtype)


def torch_default(fan_in: int | None = None) -> Initializer:
    """PyTorch's default for weights and biases: uniform in ±1/sqrt(fan_in).

    `fan_in=None` takes it from the kernel's shape (..., in, out).
    """

    def init(key, shape, dtype=jnp.float32):
        bound = 1 / math.sqrt(fan_in or math.prod(shape[:-1]))
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def split_torch_default(cut: int) -> Initializer:
    """`torch_default` of a kernel (..., in, out) stored as two, inputs [:cut] and [cut:].

    The official VGG keeps two kernels a layer, each initialised with its own fan_in.
    """

    def init(key, shape, dtype=jnp.float32):
        *window, inputs, outputs = shape
        parts = [
            torch_default()(k, (*window, width, outputs), dtype)
            for k, width in zip(jax.random.split(key), (cut, inputs - cut), strict=True)
            if width
        ]
        return jnp.concatenate(parts, axis=-2)

    return init


def he_fan_out(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal with deviation sqrt(2 / (out · h · w)) for kernels (h, w, in, out), as ResNets use."""
    height, width, _, outputs = shape
    return math.sqrt(2 / (outputs * height * width)) * jax.random.normal(key, shape, dtype)


def parameter(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
    """`module.param(name, init, shape, dtype)`, without its price.

    Linen traces `init` in every pass, only to compare the shape of its result: a quarter of the
    time to trace a training step. Raises ScopeParamShapeError as linen does.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape, dtype)
    value = module.get_variable("params", name)
    if value.shape != shape:
        raise errors.ScopeParamShapeError(name, module.scope.path_text, value.shape, shape)
    return value


class Conv(nn.Module):
    """Convolution (B, H, W, C) -> (B, H', W', features) with symmetric zero padding."""

    features: int
    kernel_size: int
    strides: int = 1
    padding: int | None = None  # None: (kernel_size - 1) / 2, which keeps the map at stride 1
    depthwise: bool = False
    use_bias: bool = False
    dtype: Any = jnp.float32
    kernel_init: Initializer = torch_default()

    @nn.compact
    def __call__(self, x: Feature) -> jax.Array:
        channels = x.shape[-1]
        size, param_dtype = self.kernel_size, full_precision(self.dtype)
        shape = (size, size, 1 if self.depthwise else channels, self.features)
        kernel = parameter(self, "kernel", self.kernel_init, shape, param_dtype)
        y = surgery.conv(
            cast(x, self.dtype),
            kernel.astype(self.dtype),
            strides=self.strides,
            padding=(size - 1) // 2 if self.padding is None else self.padding,
            groups=channels if self.depthwise else 1,
        )
        if self.use_bias:
            init = torch_default(math.prod(shape[:-1]))
            y = y + parameter(self, "bias", init, (self.features,), param_dtype).astype(self.dtype)
        return y


class Dense(nn.Module):
    """Linear layer (..., C) -> (..., features)."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initializer = torch_default()
    bias_init: Initializer | None = None  # None: PyTorch's default

    @nn.compact
    def __call__(self, x: Feature) -> jax.Array:
        channels, param_dtype = x.shape[-1], full_precision(self.dtype)
        kernel = parameter(self, "kernel", self.kernel_init, (channels, self.features), param_dtype)
        bias = None
        if self.use_bias:
            init = self.bias_init or torch_default(channels)
            bias = parameter(self, "bias", init, (self.features,), param_dtype)
        return surgery.dense(cast(x, self.dtype), kernel.astype(self.dtype), bias)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's running statistics.

    Normalises with the biased batch variance and keeps the unbiased one (n / (n - 1)), with
    momentum 0.9 and eps 1e-5. Under jit and sharding the statistics are the global batch's.
    """

    dtype: Any = jnp.float32
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        shape, stats_dtype = (x.shape[-1],), full_precision(self.dtype)
        scale = parameter(self, "scale", nn.initializers.ones, shape, stats_dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, shape, stats_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, stats_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, stats_dtype)
        if train:
            if not self.is_initializing():
                mean, var = _moments(lax.stop_gradient(x), stats_dtype)
                n = math.prod(x.shape[:-1])
                keep, new = self.momentum, 1 - self.momentum
                running_mean.value = keep * running_mean.value + new * mean
                running_var.value = keep * running_var.value + new * var * (n / max(n - 1, 1))
            y = _normalised(self.epsilon)(x, scale, bias)
        else:
            factor = scale * lax.rsqrt(running_var.value + self.epsilon)
            y = (x.astype(stats_dtype) - running_mean.value) * factor + bias
        return y.astype(self.dtype)


def _moments(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance (C,) of x (..., C), in `dtype`."""
    axes = tuple(range(x.ndim - 1))
    wide = x.astype(dtype)
    mean = jnp.mean(wide, axes)
    return mean, jnp.mean(jnp.square(wide - mean), axes)


@functools.cache
def _normalised(epsilon: float):
    """Batch normalisation (x (..., C), scale (C,), bias (C,)) -> y (..., C), in x's type.

    Its gradient is written out: it reads x and y's gradient twice, and keeps x alone, where the
    derived one keeps and reads several arrays of that size.
    """

    def centred(x, mean):
        return x.astype(mean.dtype) - mean

    @jax.custom_vjp
    def normalise(x, scale, bias):
        return forward(x, scale, bias)[0]

    def forward(x, scale, bias):
        mean, var = _moments(x, scale.dtype)
        inverse = lax.rsqrt(var + epsilon)
        y = centred(x, mean) * (scale * inverse) + bias
        return y.astype(x.dtype), (x, mean, inverse, scale)

    def backward(kept, g):
        x, mean, inverse, scale = kept
        axes, n = tuple(range(x.ndim - 1)), math.prod(x.shape[:-1])
        g, centre = g.astype(mean.dtype), centred(x, mean)
        d_bias = jnp.sum(g, axes)
        along = jnp.sum(g * centre, axes)
        dx = scale * inverse * (g - d_bias / n - centre * (inverse**2 * along / n))
        return dx.astype(x.dtype), inverse * along, d_bias

    normalise.defvjp(forward, backward)
    return normalise


class ConvBNReLU(nn.Module):
    """Convolution without bias, batch norm, ReLU: (B, H, W, C) -> (B, H', W', features)."""

    features: int
    kernel_size: int
    strides: int = 1
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Feature, *, train: bool) -> jax.Array:
        x = Conv(
            self.features,
            self.kernel_size,
            self.strides,
            use_bias=self.use_bias,
            dtype=self.dtype,
            name="conv",
        )(x)
        return relu(BatchNorm(dtype=self.dtype, name="bn")(x, train=train))


def plain(x: Feature) -> jax.Array:
    """The feature as an array whose dead channels have no gradient."""
    return x.stopped() if isinstance(x, Partitioned) else x


def cast(x: Feature, dtype: Any) -> Feature:
    """`x` in the type of the computation."""
    return jax.tree.map(lambda value: value.astype(dtype), x)


relu = tagged("relu", jax.nn.relu)  # gradient 0 at 0, as in PyTorch; jnp.maximum has 0.5 there


def average_pool(x: Feature, window: int) -> Feature:
    """Mean over adjoining windows of x (B, H, W, C); rows and columns left over are dropped.

    A `Partitioned` stays one: averaging does not mix channels.
    """
    return jax.tree.map(_average_pool(window), x)


@functools.cache
def _average_pool(window: int):
    def pool(x):
        batch, height, width, channels = x.shape
        rows, columns = height // window, width // window
        x = x[:, : rows * window, : columns * window]
        blocks = x.reshape(batch, rows, window, columns, window, channels)
        return jnp.mean(blocks, axis=(2, 4))

    return tagged(f"pool:{window * window}", pool)


def global_average_pool(x: Feature) -> Feature:
    """Mean over the map of x (B, H, W, C): (B, C). A `Partitioned` stays one."""
    return jax.tree.map(_global_average_pool(x.shape[1] * x.shape[2]), x)


@functools.cache
def _global_average_pool(elements: int):
    return tagged(f"pool:{elements}", functools.partial(jnp.mean, axis=(1, 2)))
