"""Which exits and which segment a parameter tensor belongs to, read from the traced computation."""

from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval

from dfs_jax.gradients.problem import Problem
from dfs_jax.models import inputs


def exits_by_tensor(problem: Problem, params: Any) -> Any:
    """A tree like `params` of constant arrays (N,) bool: whether exit i uses the tensor.

    An exit uses what its logits or its feature depend on; it need not train it. Nothing is
    compiled or computed.
    """
    given = (params, inputs.of_batch(problem.batch))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
    closed = jax.make_jaxpr(lambda *given: problem.run(*given)[0])(*shapes)
    count, tensors = problem.num_exits, jax.tree.leaves(params)
    used = []
    for i in range(count):
        wanted = [k % count == i for k in range(2 * count)]  # of all logits, then all features
        _, needed = partial_eval.dce_jaxpr(closed.jaxpr, wanted)
        used.append(needed[: len(tensors)])
    columns = [np.array(column) for column in zip(*used, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), columns)


def segments_by_tensor(problem: Problem, params: Any) -> Any:
    """A tree like `params`: the segment (from 0) that a tensor is part of, -1 for exits' own.

    Nothing is compiled or computed.
    """
    given = (params, problem.batch_stats, inputs.of_batch(problem.batch))
    params, statistics, carry = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given
    )
    leaves, structure = jax.tree.flatten(params)
    owners = [-1] * len(leaves)
    for i in range(problem.num_exits):

        def advance(params, carry, statistics, i=i):
            return problem.run(params, carry, i, batch_stats=statistics, method="advance")[0]

        closed, (carry, _) = jax.make_jaxpr(advance, return_shape=True)(params, carry, statistics)
        _, needed = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
        for k, used in enumerate(needed[: len(leaves)]):
            if used and owners[k] < 0:
                owners[k] = i
    return jax.tree.unflatten(structure, owners)
