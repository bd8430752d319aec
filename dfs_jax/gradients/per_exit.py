"""The gradient of every exit's loss by itself, which the multi-task methods combine.

One `grad` per prefix network: exit i touches segments ≤ i, so nothing deeper is computed for it.
For six exits of VGG7 that costs 2.4 times the gradient of the summed loss; one backward pass per
exit through a single forward pass of the whole network costs 3.1 times, `jacrev` 4.3 times.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dfs_jax.gradients.problem import Aux, Problem


def exit_gradients(problem: Problem, params: Any) -> tuple[list[Any], Aux]:
    """N gradients shaped as `params`, shallow to deep, and the by-products of the step.

    The gradient of exit i is zero beyond segment i. An objective that distils gets the deepest
    exit's answer from one more forward pass.
    """
    teacher = problem.teacher(params)
    gradients, losses = [], []
    for i in range(problem.num_exits):
        loss_and_gradient = jax.grad(problem.exit_loss, has_aux=True)
        gradient, aux = loss_and_gradient(params, i, teacher=teacher)
        gradients.append(gradient)
        losses.append(aux.losses)
    return gradients, aux._replace(losses=jnp.concatenate(losses))
