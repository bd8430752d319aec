"""Deep Feature Surgery (arXiv 2407.13986): feature partitioning and feature referencing.

`Surgery` cuts a feature along its channels; `Partitioned` carries the result, which channels
need a gradient being static; `conv` and `dense` compute the input gradient of those channels
alone, which is where the method's saving comes from. Writing the definition directly, as
concatenate([plus, stop_gradient(sub)]) before an ordinary convolution, saves nothing: XLA
computes the whole input gradient and throws the dead part away.

Which feature of a network is cut, and where, is decided in `models/multi_exit.py`.

The path of one convolution, from a network's layer to its gradient on the device:

    models/layers.py    Conv: owns the kernel; x is an array or a Partitioned
          │
    surgery.py          conv: live channels, strides and padding, all static from here on
          │
    ops/tags.py         tagged("conv:L"): one named equation, by which the cost is counted
          │
    surgery.py          _partial, a custom_vjp: forward and kernel gradient of all channels,
          │             input gradient of the L live ones
          │
    ops/convolution.py  convolution, input_gradient, kernel_gradient: each other's gradients
          ├─ CPU        _fast: a matrix product, taps or forward convolutions, by shape
          └─ GPU, TPU   _library: lax.conv_general_dilated and its transposes

`dense` goes the same way and ends in matrix products.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from dfs_jax.ops import convolution
from dfs_jax.ops.tags import tagged

Ranges = tuple[tuple[int, int], ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["live"])
@dataclasses.dataclass(frozen=True)
class Partitioned:
    """A feature (..., C) of which only some channels need a gradient.

    `value` is the whole feature, read by everybody; `live` holds disjoint ascending channel
    ranges [start, stop). The operations of this module give the other channels no gradient;
    anything else must read `stopped()` instead of `value`.
    """

    value: jax.Array
    live: Ranges

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.value.dtype

    @property
    def channels(self) -> int:
        return self.value.shape[-1]

    def stopped(self) -> jax.Array:
        """The feature as an ordinary array (..., C), with stop_gradient on the dead channels."""
        pieces = []
        for start, stop, alive in _segments(self.live, self.channels):
            piece = self.value[..., start:stop]
            pieces.append(piece if alive else lax.stop_gradient(piece))
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)

    @staticmethod
    def concat(features: Sequence["jax.Array | Partitioned"]) -> "Partitioned":
        """Features (..., C_1), (..., C_2), … joined along the channels, live ranges shifted."""
        live, offset = [], 0
        for feature in map(as_partitioned, features):
            live += [(offset + start, offset + stop) for start, stop in feature.live]
            offset += feature.channels
        value = jnp.concatenate([as_partitioned(f).value for f in features], axis=-1)
        return Partitioned(value, _joined(live))


def as_partitioned(x: "jax.Array | Partitioned") -> Partitioned:
    """`x` itself, or an array (..., C) with every channel live."""
    return x if isinstance(x, Partitioned) else Partitioned(x, ((0, x.shape[-1]),))


@dataclasses.dataclass(frozen=True)
class Surgery:
    """How a feature is shared between an exit and the deeper part of the network.

    The first k = round(beta C) channels f+ are trained by the deeper exits, the others f- by
    the exit at hand (feature partitioning, section 3 of the paper). With `referencing` both
    see the whole feature, the other's part without gradient; without it they see zeros there.
    `exit_gradient="own"` is the paper's definition; "all" lets the exit train every channel,
    as the official MSDNet and ViT code does. `partition=False` is joint training. Before exit
    `first_exit` nothing is cut. `at(i)` is what happens at one place; the operations on features
    belong to it.

    Raises ValueError for beta outside [0, 1] or NaN, for an unknown `exit_gradient`, and for a
    `first_exit` below 1.
    """

    beta: float | tuple[float, ...] = 0.5  # share of the channels that deeper exits train, in
    # [0, 1]; or one for each exit but the last
    partition: bool = True  # False: joint training, the rest is ignored
    referencing: bool = True  # see the other part without training it; False: zeros instead
    exit_gradient: str = "own"  # channels an exit trains: "own" (paper) or "all"
    first_exit: int = 1  # the first one whose feature is cut

    def __post_init__(self):
        if isinstance(self.beta, list):  # as JSON has it
            object.__setattr__(self, "beta", tuple(self.beta))
        shares = self.beta if isinstance(self.beta, tuple) else (self.beta,)
        if not shares or not all(0.0 <= beta <= 1.0 for beta in shares):  # False for NaN too
            raise ValueError(f"surgery.beta must lie in [0, 1], got {self.beta}")
        if self.first_exit < 1:
            raise ValueError(f"surgery.first_exit must be 1 or more, got {self.first_exit}")
        if self.exit_gradient not in ("own", "all"):
            raise ValueError(
                f'surgery.exit_gradient must be "own" or "all", got {self.exit_gradient!r}'
            )

    @property
    def hides(self) -> bool:
        """Whether a side sees zeros in the place of the channels that the other one trains."""
        return self.partition and not self.referencing

    def check(self, num_exits: int) -> None:
        """Raise ValueError if this surgery does not fit a network of `num_exits` exits."""
        if isinstance(self.beta, tuple) and len(self.beta) != num_exits - 1:
            raise ValueError(
                f"surgery.beta has {len(self.beta)} values, and {num_exits - 1} features of the "
                f"network's {num_exits} exits are cut"
            )
        if self.first_exit > num_exits:
            raise ValueError(
                f"surgery.first_exit = {self.first_exit} is no exit of the network's {num_exits}"
            )

    def at(self, i: int) -> "Surgery":
        """The surgery on the feature after segment i (from 0), of one beta."""
        return dataclasses.replace(
            self,
            beta=self.beta[i] if isinstance(self.beta, tuple) else self.beta,
            partition=self.partition and i + 1 >= self.first_exit,
            first_exit=1,
        )

    def cut(self, channels: int) -> int:
        """Number k of shared channels: round(beta C), half to even as Python rounds."""
        return round(self.beta * channels)

    def to_next(self, x: jax.Array | Partitioned) -> Partitioned:
        """What the next segment receives of x (..., C): f+, and f- as reference or zeros."""
        x = as_partitioned(x)
        return self._keep(x, 0, self.cut(x.channels)) if self.partition else x

    def to_exit(self, x: jax.Array | Partitioned) -> Partitioned:
        """What the exit receives of x (..., C): f-, and f+ as reference or zeros."""
        x = as_partitioned(x)
        if not self.partition or (self.referencing and self.exit_gradient == "all"):
            return x
        return self._keep(x, self.cut(x.channels), x.channels)

    def _keep(self, x: Partitioned, start: int, stop: int) -> Partitioned:
        live = _joined((max(a, start), min(b, stop)) for a, b in x.live)
        value = x.value
        if self.hides:
            outside = [(0, 0, 0)] * (value.ndim - 1) + [(start, x.channels - stop, 0)]
            value = lax.pad(value[..., start:stop], jnp.zeros((), value.dtype), outside)
        return Partitioned(value, live)


def conv(
    x: jax.Array | Partitioned,
    kernel: jax.Array,
    *,
    strides: int | tuple[int, int] = 1,
    padding: int | str | Sequence[Sequence[int]] = 0,
    groups: int = 1,
) -> jax.Array:
    """Convolution of x (B, H, W, C) with kernel (h, w, C / groups, O), giving (B, H', W', O).

    Full forward, full kernel gradient, input gradient of the live channels alone. `padding`
    is a number on every side, "SAME", "VALID", or ((top, bottom), (left, right)); `groups` is
    1 or C (depthwise). Reverse mode of any order; forward mode is undefined for custom_vjp.
    Raises ValueError for channels that do not fit.
    """
    x = as_partitioned(x)
    if groups not in (1, x.channels) or kernel.shape[2] * groups != x.channels:
        raise ValueError(
            f"conv: kernel {kernel.shape} with {groups} groups does not fit {x.channels} channels"
        )
    strides = (strides, strides) if isinstance(strides, int) else tuple(strides)
    if isinstance(padding, int):
        padding = ((padding, padding),) * 2
    elif isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    geometry = convolution.Geometry(strides, tuple(map(tuple, padding)), groups > 1)
    return _conv(_joined(x.live), geometry)(*_promoted(x.value, kernel))


def dense(
    x: jax.Array | Partitioned, kernel: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Matrix product of x (..., C) with kernel (C, O), plus bias (O,): (..., O).

    Full forward, full kernel gradient, input gradient of the live channels alone.
    """
    x = as_partitioned(x)
    value, kernel = _promoted(x.value, kernel)
    arrays = (value, kernel) if bias is None else (value, kernel, bias.astype(value.dtype))
    return _dense(_joined(x.live))(*arrays)


@functools.cache
def _conv(live: Ranges, geometry: convolution.Geometry):
    def forward(x, kernel):
        return convolution.convolution(x, kernel, geometry)

    def input_gradient(x, kernel, g):
        if geometry.depthwise:
            factor = g.shape[-1] // x.shape[-1]
            outputs = tuple((start * factor, stop * factor) for start, stop in live)
            part, g = _take(kernel, outputs, 3), _take(g, outputs, 3)
        else:
            part = _take(kernel, live, 2)
        shape = (*x.shape[:-1], _width(live))
        return convolution.input_gradient(shape, part, g, geometry)

    def kernel_gradient(x, kernel, g):
        return convolution.kernel_gradient(x, kernel.shape, g, geometry)

    product = _partial(forward, input_gradient, kernel_gradient, live)
    return tagged(f"conv:{_width(live)}", product)


@functools.cache
def _dense(live: Ranges):
    def forward(x, kernel):
        return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))

    def input_gradient(x, kernel, g):
        return lax.dot_general(g, _take(kernel, live, 0), (((x.ndim - 1,), (1,)), ((), ())))

    def kernel_gradient(x, kernel, g):
        leading = tuple(range(x.ndim - 1))
        return lax.dot_general(x, g, ((leading, leading), ((), ())))

    product = _partial(forward, input_gradient, kernel_gradient, live)

    def apply(x, kernel, bias=None):
        y = product(x, kernel)
        return y if bias is None else y + bias

    return tagged(f"dense:{_width(live)}", apply)


def _partial(forward, input_gradient, kernel_gradient, live: Ranges):
    """`forward(x, kernel)` whose input gradient covers the channels `live` only.

    `input_gradient(x, kernel, g)` is that of the live channels, `kernel_gradient(x, kernel, g)`
    the whole one. The forward rule calls the operation itself and the backward rule sees x with
    its dead channels stopped, so that gradients of gradients follow the definition as well.
    """

    operation = jax.custom_vjp(forward)

    def forward_rule(x, kernel):
        return operation(x, kernel), (x, kernel)

    def backward_rule(residuals, g):
        x, kernel = residuals
        d_kernel = kernel_gradient(Partitioned(x, live).stopped(), kernel, g)
        if not live:
            return jnp.zeros_like(x), d_kernel
        return _scattered(input_gradient(x, kernel, g), live, x.shape[-1]), d_kernel

    operation.defvjp(forward_rule, backward_rule)
    return operation


def _promoted(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype = jnp.result_type(x, kernel)
    return x.astype(dtype), kernel.astype(dtype)


def _joined(ranges) -> Ranges:
    """Ascending ranges with empty ones dropped and touching ones joined."""
    result: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return tuple(result)


def _segments(live: Ranges, channels: int) -> list[tuple[int, int, bool]]:
    """The channels as consecutive (start, stop, alive); one empty segment for no channels."""
    segments, at = [], 0
    for start, stop in _joined(live):
        segments += [(at, start, False)] if start > at else []
        segments.append((start, stop, True))
        at = stop
    return segments + ([(at, channels, False)] if at < channels or not segments else [])


def _width(live: Ranges) -> int:
    return sum(stop - start for start, stop in live)


def _take(x: jax.Array, live: Ranges, axis: int) -> jax.Array:
    pieces = [lax.slice_in_dim(x, start, stop, axis=axis) for start, stop in live]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=axis)


def _scattered(part: jax.Array, live: Ranges, channels: int) -> jax.Array:
    """The live channels `part` (..., L) at their places among zeros (..., channels)."""
    pieces, at = [], 0
    for start, stop, alive in _segments(live, channels):
        if alive:
            pieces.append(part[..., at : at + stop - start])
            at += stop - start
        else:
            pieces.append(jnp.zeros((*part.shape[:-1], stop - start), part.dtype))
    return jnp.concatenate(pieces, axis=-1)
