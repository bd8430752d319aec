"""A multi-exit network as a chain of stages: functions of flat tuples of arrays.

A stage is a segment and its exit. The router runs stages and does not ask where they come from:
`from_network` makes them from a network and its variables, `bundle.py` from exported programs.
Flat tuples, because an exported program knows no other containers.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """A traceable function (weights, arguments) -> results of flat tuples, and its weights.

    Arguments and results lead with the batch axis; weights do not.
    """

    call: Callable[[Arrays, Arrays], Arrays]
    weights: Arrays
    names: tuple[str, ...]  # of the weights, unique in the whole network


@dataclasses.dataclass(frozen=True)
class Stage:
    """Segment and exit i of a network.

    `segment` takes what the stage before carried on (the input for the first one) and returns
    `carried` arrays for the stage after it, then those for the exit; `head` takes the latter and
    returns the logits (B, K) alone. With `tells` the logits are carried on too, as the last array,
    for the exit of the stage after it to see. The last stage carries nothing.
    """

    segment: Program
    head: Program
    carried: int
    tells: bool = False

    def run(self, weights: tuple[Arrays, Arrays], carry: Arrays) -> tuple[Arrays, jax.Array]:
        """(carry for the next stage, logits (B, K)); to be traced with `self.weights`."""
        results = self.segment.call(weights[0], carry)
        (logits,) = self.head.call(weights[1], results[self.carried :])
        return self.onwards(results, (logits,)), logits

    def onwards(self, results: Sequence[Any], logits: Sequence[Any]) -> tuple[Any, ...]:
        """What the next stage gets of what segment and head returned."""
        return (*results[: self.carried], *(logits if self.tells else ()))

    @property
    def weights(self) -> tuple[Arrays, Arrays]:
        """Of the segment and of the head."""
        return self.segment.weights, self.head.weights


def named_weights(stages: Sequence[Stage]) -> dict[str, np.ndarray]:
    """Every weight of `stages` once, by name."""
    return {
        name: np.asarray(weight)
        for stage in stages
        for program in (stage.segment, stage.head)
        for name, weight in zip(program.names, program.weights, strict=True)
    }


def from_network(network: Any, variables: Any, batch: Any) -> tuple[Stage, ...]:
    """The stages of `network` (a `MultiExit`) on its input: `batch`, of which shapes are enough.

    Every program holds only the weights that it reads, so that calling it costs no more
    dispatch than it must. Raises ValueError for input that the network refuses.
    """
    stages: list[Stage] = []
    carry = batch
    told: Arrays = ()  # logits of the exit before, where exits see them
    while carry is not None:
        i = len(stages)
        segment = functools.partial(_segment, network, i)
        head = functools.partial(_head, network, i)
        given = (carry, told)
        onwards, seen = jax.eval_shape(segment, variables, given)
        tells = getattr(network, "sees_previous", False) and onwards is not None
        stages.append(
            Stage(
                _pruned(segment, variables, given),
                _pruned(head, variables, seen),
                len(jax.tree.leaves(onwards)),
                tells,
            )
        )
        carry, told = onwards, jax.eval_shape(head, variables, seen) if tells else ()
    return tuple(stages)


def _segment(network: Any, i: int, variables: Any, given: tuple[Any, Arrays]) -> Any:
    """(carry for the next segment, what exit i sees), from the carry and what was told."""
    carry, told = given
    onwards, exit_input = network.apply(variables, carry, i, train=False, method="advance")
    return onwards, (exit_input, told)


def _head(network: Any, i: int, variables: Any, seen: tuple[Any, Arrays]) -> Arrays:
    exit_input, told = seen
    previous = {"previous": told[0]} if told else {}
    return (network.apply(variables, exit_input, i, train=False, method="classify", **previous)[0],)


def _pruned(function: Callable[[Any, Any], Any], variables: Any, argument: Any) -> Program:
    """The leaves of `function(variables, argument)`: a program of the weights they depend on."""
    paths, weights_tree = jax.tree.flatten_with_path(variables)
    argument_tree = jax.tree.structure(argument)
    jaxpr = jax.make_jaxpr(function)(variables, argument).jaxpr
    everything = [True] * len(jaxpr.outvars)
    used = partial_eval.dce_jaxpr(jaxpr, everything)[1][: len(paths)]
    # What is not read may still be looked up; a stride of 0 keeps it from taking memory.
    absent = [np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for _, leaf in paths]

    def call(weights: Arrays, arguments: Arrays) -> Arrays:
        given = iter(weights)
        leaves = [next(given) if u else a for u, a in zip(used, absent, strict=True)]
        variables = jax.tree.unflatten(weights_tree, leaves)
        return tuple(
            jax.tree.leaves(function(variables, jax.tree.unflatten(argument_tree, arguments)))
        )

    chosen = [pair for pair, u in zip(paths, used, strict=True) if u]
    return Program(
        call,
        tuple(jnp.asarray(leaf) for _, leaf in chosen),
        tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in chosen),
    )
