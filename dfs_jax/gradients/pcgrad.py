"""PCGrad: what two exits' gradients have against each other is projected away.

Gradient Surgery for Multi-Task Learning (NeurIPS 2020, arXiv 2001.06782). Starting from g_i' =
g_i, for each exit i and over the other exits j in random order:

    if g_i' · g_j < 0:    g_i' ← g_i' - (g_i' · g_j / ‖g_j‖²) g_j        with the original g_j

    g = Σ_i g_i'

Every g_i' is a combination of the original gradients, so the projections run on their N×N
Gram matrix and the trees are summed once. Cost: N prefix gradients (`per_exit.py`), 2.4× for six
exits of VGG7; memory N gradients.
"""

import jax
import jax.numpy as jnp

from dfs_jax.gradients.gram import exact, gram, weighted_sum
from dfs_jax.gradients.method import GradientMethod, Update
from dfs_jax.gradients.per_exit import exit_gradients


def pcgrad() -> GradientMethod:
    """The sum of the projected gradients; no state."""

    def apply(problem, params, state, rng):
        exits, aux = exit_gradients(problem, params)
        keys = jax.random.split(rng, len(exits))
        orders = jax.vmap(lambda key: jax.random.permutation(key, len(exits)))(keys)
        gradients = weighted_sum(exits, projected(gram(exits), orders))
        return Update(gradients), aux, state

    return GradientMethod(lambda params: (), apply)


@exact
def projected(gram: jax.Array, orders: jax.Array) -> jax.Array:
    """Weights (N,) of the gradients in the sum of the projected ones.

    `gram` (N, N) holds their inner products; row i of `orders` (N, N) is the order in which
    exit i meets the exits, itself being passed over.
    """
    count = gram.shape[0]
    squared = jnp.diagonal(gram)

    def project(i, order):
        def meet(k, share):  # share: g_i' as a combination of the gradients, (N,)
            j = order[k]
            inner = share @ gram[:, j]
            against = (inner < 0) & (squared[j] > 0) & (j != i)
            step = jnp.where(against, inner / jnp.where(against, squared[j], 1), 0)
            return share.at[j].add(-step)

        return jax.lax.fori_loop(0, count, meet, jnp.eye(count, dtype=gram.dtype)[i])

    return jnp.sum(jax.vmap(project)(jnp.arange(count), orders), axis=0)
