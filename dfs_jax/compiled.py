"""What a compiled program costs, read from the program.

XLA's cost analysis counts the body of a loop once, however often it runs. What a network costs
by its definition is counted in `flops.py`.
"""

import math
import re
from typing import Any

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\S+|\(.*?\)) ([\w\-]+)\((.*)$")
_CALLED = re.compile(r"(?:body|calls|to_apply)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def flops(compiled: Any) -> float:
    """FLOPs of a compiled program (`jax.stages.Compiled`), loops counted as often as they run.

    The compiler's own count, plus the matrix products of the further rounds of loops whose
    number of rounds it knows; what else a loop does counts once.
    """
    return compiled.cost_analysis()["flops"] + _further_rounds(compiled.as_text())


def _further_rounds(text: str) -> float:
    """FLOPs of matrix products in `text` (HLO), beyond the first round of each loop."""
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
            if kind == "dot":
                products[name] += _product(shapes[result], rest, shapes)

    def total(computation: str, rounds: int) -> float:
        inner = (total(called, rounds * times) for called, times in calls.get(computation, ()))
        return products.get(computation, 0.0) * (rounds - 1) + sum(inner)

    return total(entry, 1)


def _product(result: list[int], rest: str, shapes: dict[str, list[int]]) -> float:
    left = shapes[re.findall(r"%?([\w.\-]+)[,)]", rest)[0]]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1]
    axes = [int(axis) for axis in contracted.split(",") if axis]
    return 2.0 * math.prod(result) * math.prod(left[axis] for axis in axes)


def _dimensions(shape: str) -> list[int]:
    """Of an array, as `f32[2,3]{1,0}`; an empty list for a tuple."""
    found = re.match(r"\w+\[([\d,]*)\]", shape)
    return [int(size) for size in found[1].split(",") if size] if found else []
