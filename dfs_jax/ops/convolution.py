"""Formulations of convolution that are fast on CPU.

With the options of `compiler.py`, XLA's CPU backend runs an ordinary forward convolution near the
machine's peak, but 1×1 and depthwise convolutions, the input gradient of a strided one and, in a
loop, both gradients far below it. Each is written here in a way that it compiles well;
`docs/performance.md` has the measurements. The results are the library's up to rounding, and so is
the number of products.

Which formulation runs is decided by shape and, when the program is lowered, by platform. GPU and
TPU keep the library's operations: of this file they run the upper half, the three operations that
are each other's gradients, with `_library` in them. What follows `_fast` they skip.

Surgery (which channels get a gradient) is not decided here, and pooling has a file of its own.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import xla_metadata

Shape = tuple[int, ...]

_PIECE = 4096  # pixels of one product in a 1×1 convolution's kernel gradient


class Geometry(NamedTuple):
    """What a convolution is, besides its operands."""

    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]  # ((top, bottom), (left, right)), zeros
    depthwise: bool


class Formulation(NamedTuple):
    """A way to compute a convolution y = x * kernel and its two gradients.

    x (B, H, W, C), kernel (h, w, C, O) or (h, w, 1, O) if depthwise, y and g (B, H', W', O).
    """

    forward: Callable[[jax.Array, jax.Array], jax.Array]  # (x, kernel) -> y
    input_gradient: Callable[[Shape, jax.Array, jax.Array], jax.Array]  # (x.shape, kernel, g)
    kernel_gradient: Callable[[jax.Array, Shape, jax.Array], jax.Array]  # (x, kernel.shape, g)


def convolution(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """x * kernel, in the formulation that suits the platform."""
    fast, library = _fast(x.shape[-1], kernel.shape, geometry), _library(geometry)
    return _bilinear(
        _on_platform(fast.forward, library.forward),
        lambda x, kernel, dy: input_gradient(x.shape, kernel, dy, geometry),
        lambda x, kernel, dy: kernel_gradient(x, kernel.shape, dy, geometry),
    )(x, kernel)


def input_gradient(shape: Shape, kernel: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
    """Gradient for an x of `shape`, given that for y."""
    fast, library = _fast(shape[-1], kernel.shape, geometry), _library(geometry)
    return _bilinear(
        _on_platform(
            functools.partial(fast.input_gradient, shape),
            functools.partial(library.input_gradient, shape),
        ),
        lambda kernel, g, dx: kernel_gradient(dx, kernel.shape, g, geometry),
        lambda kernel, g, dx: convolution(dx, kernel, geometry),
    )(kernel, g)


def kernel_gradient(x: jax.Array, shape: Shape, g: jax.Array, geometry: Geometry) -> jax.Array:
    """Gradient for a kernel of `shape`, given that for y."""
    fast, library = _fast(x.shape[-1], shape, geometry), _library(geometry)
    return _bilinear(
        _on_platform(
            lambda x, g: fast.kernel_gradient(x, shape, g),
            lambda x, g: library.kernel_gradient(x, shape, g),
        ),
        lambda x, g, d_kernel: input_gradient(x.shape, d_kernel, g, geometry),
        lambda x, g, d_kernel: convolution(x, d_kernel, geometry),
    )(x, g)


def _on_platform(cpu: Callable, default: Callable) -> Callable:
    """`cpu` where that runs and `default` elsewhere; no choice where both are one."""
    if cpu is default:
        return default
    return lambda a, b: lax.platform_dependent(a, b, cpu=cpu, default=default)


def _bilinear(product: Callable, to_left: Callable, to_right: Callable) -> Callable:
    """`product(a, b)` with gradients to_left(a, b, d) and to_right(a, b, d), d being its own.

    A convolution and its two gradients are each other's gradients, so that gradients of any order
    are made of the formulations of this module.
    """

    operation = jax.custom_vjp(product)

    def forward(a, b):
        return operation(a, b), (a, b)

    def backward(operands, d):
        return to_left(*operands, d), to_right(*operands, d)

    operation.defvjp(forward, backward)
    return operation


@functools.cache
def _library(geometry: Geometry) -> Formulation:
    """What the library does."""

    def forward(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            geometry.strides,
            geometry.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1] if geometry.depthwise else 1,
        )

    def input_gradient(shape, kernel, g):
        x = jax.ShapeDtypeStruct(shape, g.dtype)
        return jax.linear_transpose(lambda x: forward(x, kernel), x)(g)[0]

    def kernel_gradient(x, shape, g):
        kernel = jax.ShapeDtypeStruct(shape, g.dtype)
        return jax.linear_transpose(lambda kernel: forward(x, kernel), kernel)(g)[0]

    return Formulation(forward, input_gradient, kernel_gradient)


def _fast(channels: int, kernel: Shape, geometry: Geometry) -> Formulation:
    """The formulation on CPU, the only platform that runs what follows."""
    if geometry.depthwise:  # with one output a channel; no network here has several
        return _taps(geometry) if kernel[-1] == channels else _library(geometry)
    if kernel[:2] == (1, 1) and geometry.padding == ((0, 0), (0, 0)):
        return _pointwise(geometry)
    return _forward_like(geometry)


@functools.cache
def _pointwise(geometry: Geometry) -> Formulation:
    """A 1×1 convolution is a matrix product over the channels."""
    rows, columns = geometry.strides

    def seen(x):
        return x[:, ::rows, ::columns]

    def forward(x, kernel):
        return lax.dot_general(seen(x), kernel[0, 0], (((3,), (0,)), ((), ())))

    def input_gradient(shape, kernel, g):
        dx = lax.dot_general(g, kernel[0, 0], (((3,), (1,)), ((), ())))
        return _spaced(dx, shape, geometry.strides)

    def kernel_gradient(x, shape, g):
        return _apart(_channel_products, seen(x), g).reshape(shape)

    return Formulation(forward, input_gradient, kernel_gradient)


def _channel_products(x: jax.Array, g: jax.Array) -> jax.Array:
    """Sum over all pixels of x (B, H, W, C) times g (B, H, W, O): (C, O).

    In pieces of a few thousand pixels, with the narrower operand first: a long product is slow when
    few channels come out. In one piece or in eight at least, so that up to eight devices, which
    hold some of the images each, hold whole pieces and exchange their sum alone.
    """
    batch, height, width, _ = x.shape
    images = batch
    if batch * height * width > _PIECE:
        most = max(1, min(_PIECE // (height * width), batch // 8))
        images = max(n for n in range(1, most + 1) if batch % n == 0)
    x, g = (a.reshape(batch // images, -1, a.shape[-1]) for a in (x, g))
    if x.shape[-1] < g.shape[-1]:
        return jnp.sum(lax.dot_general(x, g, (((1,), (1,)), ((0,), (0,)))), 0)
    return jnp.sum(lax.dot_general(g, x, (((1,), (1,)), ((0,), (0,)))), 0).T


def _spaced(x: jax.Array, shape: Shape, strides: tuple[int, int]) -> jax.Array:
    """x (B, H', W', C) at every stride-th place of zeros of `shape`."""
    if x.shape == shape:
        return x
    config = [
        (0, size - (small - 1) * step - 1, step - 1)
        for size, small, step in zip(shape[1:3], x.shape[1:3], strides, strict=True)
    ]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])


@functools.cache
def _forward_like(geometry: Geometry) -> Formulation:
    """Both gradients as ordinary forward convolutions, on operands that are laid out for it.

    XLA brings other layouts into this form at a program's top level only: in a loop (gradient
    accumulation) or a branch it computes them by itself, an order slower.
    """
    return _library(geometry)._replace(
        input_gradient=functools.partial(_input_gradient_by_phases, geometry),
        kernel_gradient=functools.partial(_kernel_gradient_across_images, geometry),
    )


def _input_gradient_by_phases(geometry: Geometry, shape: Shape, kernel, g):
    """One convolution per phase of the stride.

    Rows u = a + s m of the input meet the kernel's rows i = u + p mod s alone, so that phase a of
    the gradient is g convolved with those; the library convolves g spread among zeros.
    """
    kernel = kernel.swapaxes(2, 3)
    across = [
        [
            _phase(a, kernel.shape[axis], shape[axis + 1], g.shape[axis + 1], step, before)
            for a in range(step)
        ]
        for axis, (step, (before, _)) in enumerate(
            zip(geometry.strides, geometry.padding, strict=True)
        )
    ]
    (rows, columns), (batch, height, width, channels) = geometry.strides, shape
    phases = []
    for (first, _, up_down), (left, _, sideways) in itertools.product(*across):
        part = kernel[first::rows, left::columns][::-1, ::-1]
        if 0 in part.shape:
            grid = (batch, -(-height // rows), -(-width // columns), channels)
            phases.append(jnp.zeros(grid, g.dtype))
            continue
        one = _library(Geometry((1, 1), (up_down, sideways), False))
        phases.append(one.forward(g, part))
    if len(phases) == 1:
        return phases[0]
    stacked = jnp.stack(phases).reshape(rows, columns, *phases[0].shape)
    dx = stacked.transpose(2, 3, 0, 4, 1, 5)
    dx = dx.reshape(batch, dx.shape[1] * rows, dx.shape[3] * columns, channels)
    return dx[:, :height, :width]


def _kernel_gradient_across_images(geometry: Geometry, x, shape: Shape, g):
    """x convolved with g: its images are the channels here, its channels the images."""
    sizes = zip(
        x.shape[1:3], shape[:2], g.shape[1:3], geometry.strides, geometry.padding, strict=True
    )
    # The last rows and columns may meet no place of the kernel: `after` is negative then.
    pads = [
        (before, (outputs - 1) * step + window - size - before)
        for size, window, outputs, step, (before, _) in sizes
    ]
    x = x[:, : x.shape[1] + min(0, pads[0][1]), : x.shape[2] + min(0, pads[1][1])]
    taps = lax.conv_general_dilated(
        _apart(_channels_first, _apart(_images_third, x)),  # in one go it would be slower
        _apart(_images_third, g),
        (1, 1),
        [(before, max(0, after)) for before, after in pads],
        rhs_dilation=geometry.strides,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return taps.transpose(1, 2, 0, 3)


def _images_third(x: jax.Array) -> jax.Array:
    """(B, H, W, C) to (H, W, B, C)."""
    return x.transpose(1, 2, 0, 3)


def _channels_first(x: jax.Array) -> jax.Array:
    """(H, W, B, C) to (C, H, W, B)."""
    return x.transpose(3, 0, 1, 2)


def _apart(function: Callable, *operands: jax.Array) -> jax.Array:
    """`function(*operands)`, from operands that lie in memory.

    Otherwise the compiler computes batch norm and ReLU, or their gradient, again within a
    transposition, in an order in which nothing stays in the cache. On CPU it removes an
    optimization barrier before it fuses, but not a call that it must not inline.
    """
    with xla_metadata.set_xla_metadata(inlineable="false"):
        return jax.jit(function)(*operands)


def _phase(a: int, window: int, size: int, outputs: int, step: int, before: int):
    """(first row of the kernel, its number of rows, padding of g) of the inputs a + step m."""
    first = (a + before) % step
    taps = -(-(window - first) // step) if window > first else 0
    start = (a + before - first) // step
    return first, taps, (taps - 1 - start, start - (-size // step) - outputs)


@functools.cache
def _taps(geometry: Geometry) -> Formulation:
    """A depthwise convolution is a sum over the places of its kernel, one loop when compiled."""

    def forward(x, kernel):
        taps = _windows(x, kernel.shape, geometry)
        return sum(tap * kernel[i, j, 0] for (i, j), tap in taps)

    def input_gradient(shape, kernel, g):
        x = jax.ShapeDtypeStruct(shape, g.dtype)
        return jax.linear_transpose(lambda x: forward(x, kernel), x)(g)[0]

    def kernel_gradient(x, shape, g):
        sums = [jnp.sum(tap * g, (0, 1, 2)) for _, tap in _windows(x, shape, geometry)]
        return jnp.stack(sums).reshape(shape)

    return Formulation(forward, input_gradient, kernel_gradient)


def _windows(x: jax.Array, kernel: Shape, geometry: Geometry):
    """((i, j), what kernel[i, j] meets, (B, H', W', C)) for every place of the kernel."""
    x = jnp.pad(x, ((0, 0), *geometry.padding, (0, 0)))
    (height, width), (rows, columns) = x.shape[1:3], geometry.strides
    for i, j in itertools.product(range(kernel[0]), range(kernel[1])):
        below, right = height - (kernel[0] - 1 - i), width - (kernel[1] - 1 - j)
        yield (i, j), x[:, i:below:rows, j:right:columns]
