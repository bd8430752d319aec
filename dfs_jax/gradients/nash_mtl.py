"""Nash-MTL: the exits bargain over the direction of the update.

Multi-Task Learning as a Bargaining Game (ICML 2022, arXiv 2202.01017). With G the Gram matrix of
the N gradients over its Frobenius norm, the Nash bargaining solution is

    α > 0 with G α = 1 / α (elementwise),        g = Σ_i α_i g_i

and the part of g that belongs to tensors which several exits train is scaled down to length
`max_norm` if it is longer. α minimises the convex ½ αᵀGα - Σ log α_i, solved inside the step
from the step before's. Where there is no agreement (gradients that cancel each other), the last
α stays, as in the official code. An exit whose gradient is zero has nothing to bargain for.
Cost: N prefix gradients (`per_exit.py`), 2.4× for six exits of VGG7; memory N gradients.
"""

import jax
import jax.numpy as jnp

from dfs_jax.gradients.gram import exact, gram, tensor_gram, weighted_sum
from dfs_jax.gradients.method import GradientMethod, Update
from dfs_jax.gradients.per_exit import exit_gradients


def nash_mtl(num_exits: int, *, max_norm: float = 1.0, iterations: int = 20) -> GradientMethod:
    """The bargained gradient; the state is the last α (N,).

    Args:
      num_exits: N.
      max_norm: greatest length of the shared part of the update.
      iterations: Newton steps on α.

    Raises:
      ValueError: for values out of range.
    """
    if not max_norm > 0:
        raise ValueError(f"gradients.options.max_norm must be positive, got {max_norm}")
    if not 1 <= iterations <= 10_000:  # each waits for the one before
        raise ValueError(f"gradients.options.iterations must be 1 to 10,000, got {iterations}")

    def init(params):
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
        return jnp.ones(num_exits, dtype)

    def apply(problem, params, state, rng):
        exits, aux = exit_gradients(problem, params)
        if len(exits) == 1:
            return Update(exits[0]), aux, state
        alpha = bargain(gram(exits), state, iterations).astype(state.dtype)
        gradients = _clipped(weighted_sum(exits, alpha), _shared(exits), max_norm)
        return Update(gradients), aux, alpha

    return GradientMethod(init, apply)


@exact
def bargain(gram: jax.Array, previous: jax.Array, iterations: int = 20) -> jax.Array:
    """α (N,) of the inner products (N, N), or `previous` (N,) if there is no agreement."""
    size = jnp.linalg.norm(gram)
    gram = gram / jnp.where(size > 0, size, 1)
    # In β_i = α_i ‖g_i‖ the problem is the same, with gradients of length 1: (C β)_i = 1 / β_i.
    lengths = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
    bargains = lengths > 0
    safe = jnp.where(bargains, lengths, 1)
    cosines = jnp.where(jnp.outer(bargains, bargains), gram / jnp.outer(safe, safe), 0)
    # A zero gradient gets an equation of its own; the others' diagonal is 1 but for rounding.
    cosines = jnp.where(jnp.eye(len(gram), dtype=bool), 1, cosines)
    beta = _solve(cosines, jnp.where(bargains, previous * safe, 1), iterations)
    agreed = jnp.max(jnp.abs(beta * (cosines @ beta) - 1)) < 1e-2  # False for NaN
    return jnp.where(agreed, jnp.where(bargains, beta / safe, 0), previous)


def _solve(cosines: jax.Array, start: jax.Array, iterations: int) -> jax.Array:
    """Damped Newton steps on the self-concordant ½ βᵀCβ - Σ log β_i, whose descent is certain."""
    count = len(cosines)
    # Opposed gradients have no minimum; this keeps their β finite, and they do not agree.
    cosines = cosines + 10 * jnp.finfo(cosines.dtype).eps * jnp.eye(count, dtype=cosines.dtype)

    def rescaled(beta):  # the minimum on the ray through β
        return beta * jnp.sqrt(count / (beta @ cosines @ beta))

    def objective(beta):
        return 0.5 * beta @ cosines @ beta - jnp.sum(jnp.log(beta))

    def newton(_, beta):
        gradient = cosines @ beta - 1 / beta
        hessian = cosines + jnp.diag(1 / beta**2)
        step = jnp.linalg.solve(hessian, -gradient)
        decrement = jnp.sqrt(jnp.maximum(-step @ gradient, 0))
        stride = jnp.where(decrement > 0.25, 1 / (1 + decrement), 1)
        return beta + stride * step

    fresh = rescaled(jnp.ones_like(start))
    warm = rescaled(jnp.where(start > 0, start, 1))
    beta = jnp.where(objective(warm) < objective(fresh), warm, fresh)
    return jax.lax.fori_loop(0, iterations, newton, beta)


def _shared(exits):
    """Tree of () bool: tensors for which more than one exit has a gradient."""

    def several(*tensors):
        return jnp.sum(jnp.diagonal(tensor_gram(tensors)) > 0) > 1

    return jax.tree.map(several, *exits)


def _clipped(gradients, shared, max_norm: float):
    squares = jax.tree.map(lambda g, s: jnp.where(s, jnp.sum(jnp.square(g)), 0), gradients, shared)
    length = jnp.sqrt(sum(jax.tree.leaves(squares)))
    factor = max_norm / jnp.maximum(length, max_norm)
    return jax.tree.map(lambda g, s: jnp.where(s, factor, 1).astype(g.dtype) * g, gradients, shared)
