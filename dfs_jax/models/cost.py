"""Cost and parameters of every exit, counted in the traced computation.

A network is traced with abstract values, and its layers are found by their tags (`ops/tags.py`), so
that no network is described twice and no weights are made. What it is traced on is given as to
`network.init`, arrays or shapes alone, for instance `Spec.batch(1)` of a data set: costs are those
of that batch, so that a batch of one gives the cost of an example. Conventions:

    published        multiply-adds of convolutions (biases not counted), dense layers and other
                     matrix products; one per bias of a dense layer, one per element of a ReLU,
                     one per element of every pooling window
    multiply_adds    the multiply-adds alone

Normalisation, addition, concatenation, other activations and products with a fixed matrix
(`jax.image.resize` traces to them) count 0. Every window of a convolution counts in full, its
padding included; the compiler's own cost analysis leaves the padding out, and counts 2 FLOPs per
multiply-add. Adapters are no part of any cost: they feed the distilled feature only.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from dfs_jax.models import traced
from dfs_jax.ops import tags

CONVENTIONS = ("published", "multiply_adds")


@dataclasses.dataclass(frozen=True)
class PerExit:
    """Integers per exit, shallow to deep, counted in four ways."""

    cumulative: tuple[int, ...]  # as published: backbone and all heads up to the exit's own
    path: tuple[int, ...]  # backbone up to the exit, and of the heads those that it needs: its own,
    # all before it as well where exits see the previous answer
    segments: tuple[int, ...]  # the part of the backbone between the exit before and this one
    heads: tuple[int, ...]  # the exit's own head alone


@dataclasses.dataclass(frozen=True)
class ExitCosts(PerExit):
    """Cost of each exit, and the number of parameters that it executes."""

    convention: str
    parameters: PerExit  # batch norm's included, running statistics not


def exit_costs(network: Any, batch: Any, *, convention: str = "published") -> ExitCosts:
    """Cost and parameters of every exit of `network` (a `MultiExit`) on `batch`, its input.

    Everything that a segment runs counts, as in the published columns, even where this exit
    does not need it (the finer scales of MSDNet). A parameter counts once however often it is
    used. Raises ValueError for an unknown convention and for input that the network refuses.
    """
    if convention not in CONVENTIONS:
        raise ValueError(
            f"unknown convention {convention!r} of cost; known: {', '.join(CONVENTIONS)}"
        )
    sizes, segments, heads, all_heads = _counted(network, batch)

    def flops(cost: _Cost) -> int:
        return cost.products + (cost.others if convention == "published" else 0)

    def parameters(cost: _Cost) -> int:
        return sum(size for k, size in enumerate(sizes) if cost.reads & _parameter(k))

    return ExitCosts(
        **_per_exit(segments, heads, flops, all_heads=all_heads),
        convention=convention,
        parameters=PerExit(**_per_exit(segments, heads, parameters, all_heads=all_heads)),
    )


@traced.once
def minimal_training_multiply_adds(network: Any, batch: Any) -> int:
    """The fewest multiply-adds with which `batch` can train all exits of `network` together.

    That is forward, kernel gradients, and input gradients of the channels that surgery leaves
    live, over all convolutions, dense layers and other products, heads included, adapters not.
    Where nothing trainable lies before a layer (the first one) there is no input gradient.
    Windows count in full, padding included: compare with nothing but this count itself.
    """
    logits = functools.partial(_all_logits, network)
    cost, _ = _trace(logits, _variables(network, batch), batch, prune=True)
    return cost.products + cost.gradients


def training_flops(network: Any, batch: Any) -> int:
    """`minimal_training_multiply_adds`, at 2 FLOPs each."""
    return 2 * minimal_training_multiply_adds(network, batch)


# What a computation costs.
class _Cost(NamedTuple):
    """Counts of a computation. Sets of inputs are bit masks: see `_DATA` and `_parameter`."""

    products: int = 0  # multiply-adds
    others: int = 0  # dense biases, ReLU elements, elements of pooling windows
    gradients: int = 0  # multiply-adds of the gradients of the products
    reads: int = 0  # the inputs that some operation uses

    def plus(self, other: "_Cost") -> "_Cost":
        numbers = map(operator.add, self[:3], other[:3])
        return _Cost(*numbers, self.reads | other.reads)

    def times(self, count: int) -> "_Cost":
        return _Cost(*(count * number for number in self[:3]), self.reads)


class _Counted(NamedTuple):
    """What a network costs, whatever the convention."""

    sizes: list[int]  # of the parameters
    segments: list[_Cost]
    heads: list[_Cost]
    all_heads: bool  # whether an exit needs those of the exits before it


@traced.once
def _counted(network: Any, batch: Any) -> _Counted:
    variables, carry = _variables(network, batch), batch
    segments, heads = [], []
    told: tuple[Any, ...] = ()  # logits of the exit before, where exits see them
    for i in itertools.count():
        advance = functools.partial(_advance, network, i)
        cost, (carry, exit_input) = _trace(advance, variables, carry)
        segments.append(cost)
        # Without what only the feature needs: the adapters.
        head = functools.partial(_logits, network, i)
        cost, logits = _trace(head, variables, (exit_input, *told), prune=True)
        heads.append(cost)
        if getattr(network, "sees_previous", False):
            told = (logits,)
        if carry is None:
            break
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(variables[0])]
    return _Counted(sizes, segments, heads, bool(told))


# A value's sources say which inputs it depends on: bit 0 for all that is not a parameter, bit
# k + 1 for parameter k. A value without sources is a constant of the program.
_DATA = 1


def _parameter(k: int) -> int:
    return 1 << (k + 1)


def _advance(network: Any, i: int, params: Any, others: Any, carry: Any) -> Any:
    return network.apply({"params": params, **others}, carry, i, train=False, method="advance")


def _logits(network: Any, i: int, params: Any, others: Any, seen: tuple[Any, ...]) -> jax.Array:
    """Of exit i, from its input and, where it sees them, the logits of the exit before it."""
    exit_input, *told = seen
    variables, previous = {"params": params, **others}, {"previous": told[0]} if told else {}
    return network.apply(variables, exit_input, i, train=False, method="classify", **previous)[0]


def _all_logits(network: Any, params: Any, others: Any, batch: Any) -> tuple[jax.Array, ...]:
    return network.apply({"params": params, **others}, batch, train=False).logits


def _variables(network: Any, batch: Any) -> tuple[Any, Any]:
    """(parameters, other variables) as shapes and types."""
    variables = dict(traced.variables(network, batch))
    return variables.pop("params", {}), variables


def _trace(
    function: Callable, variables: tuple[Any, Any], x: Any, *, prune: bool = False
) -> tuple[_Cost, Any]:
    """Cost and abstract result of function(parameters, other variables, x).

    With `prune`, what the result does not need is not counted.
    """
    closed, result = jax.make_jaxpr(function, return_shape=True)(*variables, x)
    jaxpr = closed.jaxpr
    if prune:
        everything = [True] * len(jaxpr.outvars)
        jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, everything, instantiate=True)
    parameters = len(jax.tree.leaves(variables[0]))
    sources = [_parameter(k) for k in range(parameters)]
    sources += [_DATA] * (len(jaxpr.invars) - parameters)
    cost, returned = _walk(jaxpr, sources)
    # A parameter that is handed on as it is counts too.
    return cost._replace(reads=functools.reduce(operator.or_, returned, cost.reads)), result


def _walk(jaxpr: core.Jaxpr, sources: Sequence[int]) -> tuple[_Cost, list[int]]:
    """Cost of `jaxpr`, and the sources of its results, given those of its arguments."""
    known = dict(zip(jaxpr.invars, sources, strict=True))

    def of(atom) -> int:
        return 0 if isinstance(atom, core.Literal) else known.get(atom, 0)

    total = _Cost()
    for equation in jaxpr.eqns:
        cost, results = _equation(equation, [of(atom) for atom in equation.invars])
        total = total.plus(cost)
        known.update(zip(equation.outvars, results, strict=True))
    return total, [of(atom) for atom in jaxpr.outvars]


def _equation(equation: core.JaxprEqn, sources: list[int]) -> tuple[_Cost, list[int]]:
    """`_walk` of one equation; a tagged one is counted and not entered."""
    union = functools.reduce(operator.or_, sources, 0)
    results = [union] * len(equation.outvars)
    name, shapes = equation.primitive.name, [atom.aval.shape for atom in equation.invars]
    size = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
    called = str(equation.params.get("name", ""))
    if called.startswith(tags.PREFIX):
        return _layer(called.removeprefix(tags.PREFIX), size, shapes, sources), results
    if name == "conv_general_dilated":
        out_axis = equation.params["dimension_numbers"].rhs_spec[0]
        products = size * math.prod(shapes[1]) // shapes[1][out_axis]
        return _product(products, sources), results
    if name == "dot_general":
        contracted = equation.params["dimension_numbers"][0][0]
        # A product with a constant matrix is interpolation, which counts nothing.
        products = size * math.prod(shapes[0][axis] for axis in contracted) * all(sources)
        return _product(products, sources), results
    if name == "stop_gradient":
        return _Cost(reads=union), [_DATA if union else 0] * len(results)
    if name == "scan":
        return _scan(equation, sources)
    if name == "cond":
        index, *operands = sources
        walks = [_walk(branch.jaxpr, operands) for branch in equation.params["branches"]]
        costs, returned = zip(*walks, strict=True)
        largest = (max(numbers) for numbers in zip(*(cost[:3] for cost in costs), strict=True))
        reads = functools.reduce(operator.or_, (cost.reads for cost in costs), index)
        merged = [functools.reduce(operator.or_, r, index) for r in zip(*returned, strict=True)]
        return _Cost(*largest, reads), merged
    inner = list(core.jaxprs_in_params(equation.params))
    if len(inner) == 1 and name != "while" and len(inner[0].invars) == len(sources):
        cost, returned = _walk(inner[0], sources)  # jit, remat, custom_jvp, custom_vjp, ...
        return cost, returned if len(returned) == len(results) else results
    for jaxpr in inner:
        if any(_walk(jaxpr, [_DATA] * len(jaxpr.invars))[0][:3]):
            raise ValueError(f"cannot count layers inside {name!r}: how often they run is unknown")
    return _Cost(reads=union), results


def _layer(tag: str, size: int, shapes: list[tuple[int, ...]], sources: list[int]) -> _Cost:
    """Cost of the tagged layer with operands of `shapes` and `size` elements of output."""
    kind, _, number = tag.partition(":")
    if kind in ("conv", "dense"):
        x, kernel, *bias = shapes
        products = size * math.prod(kernel[:-1])
        live = int(number) if number else x[-1]
        biases = size if bias else 0
        return _product(products, sources, live=(live, x[-1]))._replace(others=biases)
    reads = functools.reduce(operator.or_, sources, 0)
    if kind == "relu":
        return _Cost(others=size, reads=reads)
    if kind == "pool":
        return _Cost(others=size * int(number), reads=reads)
    raise ValueError(f"the tag {tag!r} of a layer is unknown; known ones are listed in tags.py")


def _product(products: int, sources: list[int], live: tuple[int, int] = (1, 1)) -> _Cost:
    """A product of two operands, of which `live[0]` in `live[1]` channels of the first are live.

    The gradient for an operand costs as much as the product; only trainable ones have it.
    """
    trainable = [source & ~_DATA != 0 for source in sources[:2]]
    gradients = trainable[0] * products * live[0] // live[1] + trainable[1] * products
    return _Cost(products, 0, gradients, functools.reduce(operator.or_, sources, 0))


def _scan(equation: core.JaxprEqn, sources: list[int]) -> tuple[_Cost, list[int]]:
    body = equation.params["jaxpr"].jaxpr
    # Arguments are constants, what is carried, and slices; results what is carried, and slices.
    # Only slices gain an axis. (How the parameters tell them apart depends on JAX's version.)
    sliced = _gaining_an_axis(body.invars, equation.invars)
    carried = len(body.outvars) - _gaining_an_axis(body.outvars, equation.outvars)
    after = len(sources) - sliced
    first = after - carried
    carry = sources[first:after]
    while True:  # until a further round adds no source to what is carried
        cost, results = _walk(body, [*sources[:first], *carry, *sources[after:]])
        merged = list(map(operator.or_, carry, results))
        if merged == carry:
            return cost.times(equation.params["length"]), results
        carry = merged


def _gaining_an_axis(inner: Sequence[Any], outer: Sequence[Any]) -> int:
    pairs = zip(inner, outer, strict=True)
    return sum(a.aval.ndim != b.aval.ndim for a, b in pairs)


def _per_exit(
    segments: list[_Cost], heads: list[_Cost], measure: Callable[[_Cost], int], *, all_heads: bool
) -> dict[str, tuple[int, ...]]:
    """The fields of a `PerExit`: sums of costs, in which a parameter stays one.

    `all_heads`: whether an exit needs those of the exits before it.
    """
    backbone = list(itertools.accumulate(segments, _Cost.plus))
    heads_so_far = list(itertools.accumulate(heads, _Cost.plus))
    cumulative = tuple(measure(a.plus(b)) for a, b in zip(backbone, heads_so_far, strict=True))
    path = tuple(measure(a.plus(b)) for a, b in zip(backbone, heads, strict=True))
    return {
        "cumulative": cumulative,
        "path": cumulative if all_heads else path,
        "segments": tuple(map(measure, segments)),
        "heads": tuple(map(measure, heads)),
    }


# As a table.


def cost_table(network: Any, batch: Any) -> str:
    """Cumulative cost (M) and parameters (M) per exit of `network`, as aligned lines."""
    published = exit_costs(network, batch)
    plain = exit_costs(network, batch, convention="multiply_adds")
    rows = [("exit", "cost (M)", "multiply-adds (M)", "parameters (M)", "share of the last")]
    for i, cost in enumerate(published.cumulative):
        rows.append(
            (
                str(i + 1),
                f"{cost / 1e6:.2f}",
                f"{plain.cumulative[i] / 1e6:.2f}",
                f"{published.parameters.cumulative[i] / 1e6:.2f}",
                f"{100 * cost / published.cumulative[-1]:.1f} %",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.rjust, row, widths)) for row in rows)
    return "\n".join(lines)
