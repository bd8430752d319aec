"""How long the input gradients take that surgery makes smaller: the bound of what it can save.

Every convolution and dense layer that reads a partitioned feature is found by its tag
(`tags.py`) in the traced network, and its input gradient is timed alone, at its own shapes, as
joint training computes it (all channels) and as surgery does (live channels only). What it takes
to start a program is in these times; on a layer of a few microseconds that is most of it.
"""

import collections
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from dfs_jax.models import traced
from dfs_jax.ops import compiler, tags
from dfs_jax.profiling import timing
from dfs_jax.profiling.timing import Clock
from dfs_jax.surgery import Surgery


class LayerGradient(NamedTuple):
    """The input gradient of one kind of layer, `count` of which the network has."""

    layer: str  # "conv" or "dense"
    shape: tuple[int, ...]  # of the input
    kernel: tuple[int, ...]
    live: int  # channels of the input that need a gradient
    count: int
    full_seconds: float  # of one layer, for all channels
    live_seconds: float  # of one layer, for the live ones

    @property
    def dead(self) -> float:
        """Share of the channels that need none."""
        return 1 - self.live / self.shape[-1]


class InputGradients(NamedTuple):
    """All layers of a network that read a partitioned feature."""

    layers: tuple[LayerGradient, ...]

    @property
    def full_seconds(self) -> float:
        """Of all channels of these layers: t_dX."""
        return sum(layer.count * layer.full_seconds for layer in self.layers)

    @property
    def live_seconds(self) -> float:
        """Of what surgery computes of them."""
        return sum(layer.count * layer.live_seconds for layer in self.layers)

    @property
    def dead_seconds(self) -> float:
        """What could be saved at most: of every layer's time the share of its dead channels."""
        return sum(layer.count * layer.dead * layer.full_seconds for layer in self.layers)


def measure(
    network: Any,
    shape: tuple[int, int, int, int],
    samples: int,
    calls: int = 1,
    clock: Clock = time.perf_counter,
) -> InputGradients:
    """Input gradients of `network` on images of `shape` (B, H, W, C).

    Seconds are medians of `samples` measurements of `calls` calls in a row. Layers that are the
    same computation are timed once.
    """
    whole = network.clone(surgery=Surgery(partition=False))
    kinds: dict[Any, list[Any]] = collections.defaultdict(list)
    for own, full in zip(_layers(network, shape), _layers(whole, shape), strict=True):
        if (own.kind, own.shapes) != (full.kind, full.shapes):
            raise ValueError(f"surgery changed the layers: {own.shapes} instead of {full.shapes}")
        if own.live < own.shapes[0][-1]:
            kinds[str(own.equation), str(full.equation)].append((own, full))
    layers = []
    for same in kinds.values():
        own, full = same[0]
        times = [_seconds(layer.equation, samples, calls, clock) for layer in (full, own)]
        layers.append(LayerGradient(own.kind, *own.shapes[:2], own.live, len(same), *times))
    return InputGradients(tuple(layers))


class _Layer(NamedTuple):
    kind: str
    live: int
    shapes: tuple[tuple[int, ...], ...]  # of input, kernel and perhaps bias
    equation: core.JaxprEqn


def _layers(network: Any, shape: tuple[int, ...]) -> list[_Layer]:
    """Convolutions and dense layers of `network` in training mode, in order."""
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = traced.variables(network, images)

    def apply(variables, images):
        rngs = {"dropout": jax.random.key(0)}
        return network.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)

    return list(_tagged(jax.make_jaxpr(apply)(variables, images).jaxpr))


def _tagged(jaxpr: core.Jaxpr) -> Iterator[_Layer]:
    for equation in jaxpr.eqns:
        name = str(equation.params.get("name", ""))
        if not name.startswith(tags.PREFIX):
            for inner in core.jaxprs_in_params(equation.params):
                yield from _tagged(inner)
            continue
        kind, _, live = name.removeprefix(tags.PREFIX).partition(":")
        if kind in ("conv", "dense"):
            shapes = tuple(atom.aval.shape for atom in equation.invars)
            yield _Layer(kind, int(live or shapes[0][-1]), shapes, equation)


def _seconds(equation: core.JaxprEqn, samples: int, calls: int, clock: Clock) -> float:
    """Median time of the input gradient of the layer `equation` alone, given random arrays."""
    layer = core.jaxpr_as_fun(equation.params["jaxpr"])

    @compiler.jit
    def gradient(g, x, *others):
        # What else the layer computes is not asked for, so that the compiler drops it.
        _, pullback = jax.vjp(lambda x: layer(x, *others)[0], x)
        return pullback(g)[0]

    rng = np.random.default_rng(0)
    avals = [equation.outvars[0].aval, *(atom.aval for atom in equation.invars)]
    arrays = [jnp.asarray(rng.standard_normal(a.shape), a.dtype) for a in avals]
    return timing.median(timing.repeating(gradient, *arrays, calls=calls), samples, clock)
