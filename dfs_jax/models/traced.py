"""What is known of a network by tracing it, without weights: each question is traced once.

Tracing a deep network takes a second or more, and several parts of a run ask for the same.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax


def once(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`function(network, batch)`, which looks at the shapes of `batch` alone, kept for later.

    What it returns is shared: nobody may change it.
    """

    @functools.lru_cache(maxsize=64)
    def kept(network, structure, leaves, x64):
        del x64  # types depend on it
        return function(network, structure.unflatten(leaves))

    @functools.wraps(function)
    def call(network, batch):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        try:
            hash(network)
        except TypeError:  # an option is a list
            return function(network, shapes)
        leaves, structure = jax.tree.flatten(shapes)
        return kept(network, structure, tuple(leaves), jax.config.jax_enable_x64)

    return call


@once
def variables(network: Any, batch: Any) -> Any:
    """Shapes and types of the variables of `network` for its input `batch`."""
    return jax.eval_shape(lambda x: network.init(jax.random.key(0), x), batch)
