"""Conflict, seen: the angle between the gradients of two exits' losses, where they meet.

With g_i the gradient of exit i's loss with respect to some parameters,

    cosine(i, j) = g_i · g_j / (‖g_i‖ ‖g_j‖)

is 1 where the exits agree, negative where a step for one sets the other back, and 0 where surgery
gives each its own channels. Where a gradient is exactly zero (the exit lies before the segment,
or everything between them is cut) there is no angle, and the cosine is NaN: "no gradient" is not
"no conflict". Parameters of the exits themselves have one exit's gradient and are left out.

The passes are those of `per_exit`: about 2.4 times a summed gradient for six exits of VGG7, and
memory for one gradient tree per exit. Nothing here changes the training step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax.gradients.gram import tensor_gram
from dfs_jax.gradients.paths import segments_by_tensor
from dfs_jax.gradients.per_exit import exit_gradients
from dfs_jax.gradients.problem import Problem


class Conflict(NamedTuple):
    """Cosines between the gradients of N exits; every matrix is symmetric, NaN where undefined."""

    segments: jax.Array  # (N, N, N): of the parameters of each segment, by (segment, exit, exit)
    overall: jax.Array  # (N, N): of all segments that both exits see
    # For each segment (N, N) by the path of a module with parameters.
    layers: tuple[dict[str, jax.Array], ...]


def measure(problem: Problem, params: Any) -> Conflict:
    """The conflict on the problem's batch, in training mode; to be traced inside a jit."""
    gradients, _ = exit_gradients(problem, params)
    segment_of = jax.tree.leaves(segments_by_tensor(problem, params))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    tensors = zip(*map(jax.tree.leaves, gradients), strict=True)
    count = problem.num_exits
    segments: list[Any] = [jnp.zeros((count, count))] * count
    layers: list[dict[str, Any]] = [{} for _ in range(count)]
    for path, segment, tensor in zip(paths, segment_of, tensors, strict=True):
        if segment < 0:
            continue
        products = tensor_gram(tensor)
        layer = jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        layers[segment][layer] = layers[segment].get(layer, 0) + products
        segments[segment] = segments[segment] + products
    products = jnp.stack(segments)
    # Exit j's gradient in segments that exit i does not reach has no say in their angle.
    shared = cosines(jnp.cumsum(products, axis=0))
    i, j = np.indices((count, count))
    return Conflict(
        cosines(products),
        shared[np.minimum(i, j), i, j],
        tuple({layer: cosines(p) for layer, p in parts.items()} for parts in layers),
    )


def cosines(products: jax.Array) -> jax.Array:
    """Cosines (..., N, N) from inner products (..., N, N); NaN where a vector is zero."""
    squares = jnp.diagonal(products, axis1=-2, axis2=-1)
    norms = jnp.where(squares > 0, jnp.sqrt(squares), jnp.nan)
    return jnp.clip(products / norms[..., :, None] / norms[..., None, :], -1, 1)


def scalars(conflict: Conflict) -> dict[str, jax.Array]:
    """The metrics of a measurement, each (); NaN where there is nothing to tell.

    conflict/exit2_exit3 over all segments that both see, conflict/segment2/exit2_exit3 in segment
    2, and of a layer there conflict/segment2/layer/PATH, the mean over the pairs of exits. Numbers
    count from 1.
    """
    count = len(conflict.overall)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    found = {_name(i, j): conflict.overall[i, j] for i, j in pairs}
    upper = np.triu_indices(count, 1)
    for s in range(count):
        where = f"segment{s + 1}/"
        found |= {_name(i, j, where): conflict.segments[s, i, j] for i, j in pairs if i >= s}
        for layer, matrix in conflict.layers[s].items():
            found[f"conflict/{where}layer/{layer}"] = jnp.nanmean(matrix[upper])
    return found


def _name(i: int, j: int, where: str = "") -> str:
    return f"conflict/{where}exit{i + 1}_exit{j + 1}"
