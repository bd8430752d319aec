"""Which exits a parameter tensor has an influence on, read from the traced computation."""

from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval

from dfs_jax.gradients.problem import Problem


def exits_by_tensor(problem: Problem, params: Any) -> Any:
    """A tree like `params` of constant arrays (N,) bool: whether exit i uses the tensor.

    An exit uses what its logits or its feature depend on; it need not train it. Nothing is
    compiled or computed.
    """
    images = problem.batch["image"]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, images))
    closed = jax.make_jaxpr(problem.outputs)(*shapes)
    count, tensors = problem.num_exits, jax.tree.leaves(params)
    used = []
    for i in range(count):
        wanted = [k % count == i for k in range(2 * count)]  # of all logits, then all features
        _, needed = partial_eval.dce_jaxpr(closed.jaxpr, wanted)
        used.append(needed[: len(tensors)])
    columns = [np.array(column) for column in zip(*used, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), columns)
