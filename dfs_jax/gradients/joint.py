"""Joint training: the gradient of the sum of all exits' losses (deep supervision).

    g = ∇ Σ_i L_i

What MSDNet (arXiv 1703.09844), DSN and BYOT train with; the exits' weights are part of the
objective. One forward and one backward pass: cost 1×, to which every other method compares.
"""

import jax
import jax.numpy as jnp

from dfs_jax.gradients.method import GradientMethod, Update


def joint() -> GradientMethod:
    """The gradient of the summed loss; no state."""

    def apply(problem, params, state, rng):

        def total(params):
            losses, aux = problem.losses(params)
            return jnp.sum(losses), aux

        gradients, aux = jax.grad(total, has_aux=True)(params)
        return Update(gradients), aux, state

    return GradientMethod(lambda params: (), apply)
