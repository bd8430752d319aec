"""How programs are compiled, and what a compiled program costs, read from the program.

What a network costs by its definition is counted in `models/cost.py`.
"""

import functools
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax

# XLA's CPU backend hands convolutions to YNNPACK, which spreads them over the output channels
# alone: with fewer than 128 of them, one core works. Eigen, its other library, spreads them over
# the batch too. Reductions stay with YNNPACK, where they are fast.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


class jit:
    """`jax.jit(function, **choices)`, compiled with the options that suit the default backend.

    Options belong to a whole program: within another function that is traced, this is `jax.jit`
    without them. With images of less than 32 pixels (`side`) there is nothing to gain, and the
    compiler's own options stay: the same sums in the same order on any number of devices.
    """

    def __init__(self, function: Callable, side: int = 32, **choices: Any):
        self._inner = jax.jit(function, **choices)
        chosen = options() if side >= 32 else None
        self._outermost = jax.jit(function, compiler_options=chosen, **choices)
        self.lower, self.trace = self._outermost.lower, self._outermost.trace

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs)))
        return (self._inner if traced else self._outermost)(*args, **kwargs)


@functools.cache
def options() -> dict[str, str] | None:
    """Compiler options for the default backend; docs/performance.md has what they bring.

    None where the backend needs none, where its compiler does not know them (they are not part
    of JAX's interface), and where XLA_FLAGS sets them.
    """
    chosen = any(name in os.environ.get("XLA_FLAGS", "") for name in _CPU_OPTIONS)
    if jax.default_backend() != "cpu" or chosen:
        return None
    try:
        jax.jit(lambda: 0, compiler_options=_CPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return _CPU_OPTIONS


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\S+|\(.*?\)) ([\w\-]+)\((.*)$")
_CALLED = re.compile(r"(?:body|calls|to_apply)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def flops(compiled: Any) -> float:
    """FLOPs of a compiled program (`jax.stages.Compiled`), loops counted as often as they run.

    The compiler's own count, which has the body of a loop once, plus the products of the further
    rounds of loops whose number of rounds it knows; what else a loop does counts once.
    """
    return compiled.cost_analysis()["flops"] + _further_rounds(compiled.as_text())


def _further_rounds(text: str) -> float:
    """FLOPs of products in `text` (HLO), beyond the first round of each loop."""
    products: dict[str, float] = {}  # FLOPs of a computation's own products
    calls: dict[str, list[tuple[str, int]]] = {}  # what it calls, and how often
    name = entry = ""
    shapes: dict[str, list[int]] = {}
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            name, shapes = start[1], {}
            products[name], calls[name] = 0.0, []
            entry = name if line.startswith("ENTRY") else entry
        elif instruction := _INSTRUCTION.match(line):
            result, shape, kind, rest = instruction.groups()
            shapes[result] = _dimensions(shape)
            trips = _TRIPS.search(rest) if kind == "while" else None
            rounds = int(trips[1]) if trips else 1
            calls[name] += [(called, rounds) for called in _CALLED.findall(rest)]
            if kind in _PRODUCTS:
                products[name] += _PRODUCTS[kind](shapes[result], rest, shapes)

    def total(computation: str, rounds: int) -> float:
        inner = (total(called, rounds * times) for called, times in calls.get(computation, ()))
        return products.get(computation, 0.0) * (rounds - 1) + sum(inner)

    return total(entry, 1)


def _dot(result: list[int], rest: str, shapes: dict[str, list[int]]) -> float:
    left = shapes[_operands(rest)[0]]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1]
    axes = [int(axis) for axis in contracted.split(",") if axis]
    return 2.0 * math.prod(result) * math.prod(left[axis] for axis in axes)


def _convolution(result: list[int], rest: str, shapes: dict[str, list[int]]) -> float:
    kernel = shapes[_operands(rest)[1]]
    outputs = kernel[re.search(r"dim_labels=\w+_(\w+)->", rest)[1].index("o")]
    return 2.0 * math.prod(result) * math.prod(kernel) / outputs


_PRODUCTS = {"dot": _dot, "convolution": _convolution}


def _operands(rest: str) -> list[str]:
    return re.findall(r"%?([\w.\-]+)[,)]", rest)


def _dimensions(shape: str) -> list[int]:
    """Of an array, as `f32[2,3]{1,0}`; an empty list for a tuple."""
    found = re.match(r"\w+\[([\d,]*)\]", shape)
    return [int(size) for size in found[1].split(",") if size] if found else []
