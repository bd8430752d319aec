"""CAGrad: near the mean gradient, the direction that helps the worst-off exit most.

Conflict-Averse Gradient Descent (NeurIPS 2021, arXiv 2110.14048). With g_0 the mean of the N
gradients, c = a ‖g_0‖ and g_w = Σ_i w_i g_i,

    max over ‖d - g_0‖ ≤ c of min_i g_i · d
    w = argmin over the simplex of  g_0 · g_w + c ‖g_w‖
    g = N (g_0 + c / ‖g_w‖ · g_w) / (1 + a²)

The factor N is ours: it makes g a sum over the exits, as joint training has it, so that one
learning rate serves both. One exit is plain training. The minimisation sees nothing but the N×N
Gram matrix and is solved inside the step. Cost: N prefix gradients (`per_exit.py`), 2.4× for six
exits of VGG7; memory N gradients.
"""

import jax
import jax.numpy as jnp

from dfs_jax.gradients.gram import exact, gram, weighted_sum
from dfs_jax.gradients.method import GradientMethod, Update
from dfs_jax.gradients.per_exit import exit_gradients


def cagrad(radius: float = 0.5) -> GradientMethod:
    """The conflict-averse gradient; no state.

    Args:
      radius: a, how far the direction may be from the mean, over the mean's length, in [0, 1).

    Raises:
      ValueError: for a radius out of range.
    """
    if not 0 <= radius < 1:
        raise ValueError(f"gradients.options.radius must lie in [0, 1), got {radius}")

    def apply(problem, params, state, rng):
        exits, aux = exit_gradients(problem, params)
        if len(exits) == 1:
            return Update(exits[0]), aux, state
        gradients = weighted_sum(exits, averse_weights(gram(exits), radius))
        return Update(gradients), aux, state

    return GradientMethod(lambda params: (), apply)


@exact
def averse_weights(gram: jax.Array, radius: float) -> jax.Array:
    """Weights (N,) of the gradients in g, from their inner products (N, N)."""
    count = gram.shape[0]
    w = simplex_argmin(gram, radius)
    length = jnp.sqrt(jnp.maximum(w @ gram @ w, 0))
    ball = radius * jnp.sqrt(jnp.maximum(jnp.mean(gram), 0))
    # Where gradients cancel, what is left of g_w is rounding and has no direction to add.
    rounding = jnp.sqrt(jnp.finfo(gram.dtype).eps * jnp.max(jnp.diagonal(gram)))
    pull = jnp.where(length > rounding, ball / jnp.maximum(length, rounding), 0)
    return (1 + count * pull * w) / (1 + radius**2)


@exact
def simplex_argmin(gram: jax.Array, radius: float, iterations: int = 32) -> jax.Array:
    """argmin over the simplex of g_0 · g_w + a ‖g_0‖ ‖g_w‖ for the Gram matrix (N, N): (N,).

    An interior-point method: Newton steps on the objective with the barrier -μ Σ log w_i, μ
    halved at each. In units of the mean ‖g_i‖², the objective ends within N·1e-9 of its minimum,
    or a few 1e-6 in float32.
    """
    count = gram.shape[0]
    size = jnp.mean(jnp.diagonal(gram))
    gram = gram / jnp.where(size > 0, size, 1)
    slope = jnp.mean(gram, axis=0)  # g_0 · g_i
    ball = radius * jnp.sqrt(jnp.maximum(jnp.mean(gram), 0))
    # ‖g_w‖ = ‖root w‖: where gradients cancel, wᵀ G w would be rounding alone.
    values, vectors = jnp.linalg.eigh(gram)
    root = jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T
    least = max(1e-9, float(jnp.finfo(gram.dtype).eps))

    def barrier(w, mu):
        norm = jnp.sqrt(jnp.sum(jnp.square(root @ w)) + mu**2)  # smooth at g_w = 0
        return slope @ w + ball * norm - mu * jnp.sum(jnp.log(w))

    def newton(k, w):
        mu = jnp.maximum(0.5 ** (k + 1.0), least).astype(w.dtype)
        along = root @ w
        norm = jnp.sqrt(along @ along + mu**2)
        along = along / norm
        gradient = slope + ball * along @ root
        hessian = ball / norm * root.T @ (identity - jnp.outer(along, along)) @ root
        # In relative steps, w ← w (1 + q), the barrier's part is μ times the identity.
        matrix = w[:, None] * hessian * w + mu * identity
        sides = jnp.stack([mu - w * gradient, w], axis=1)
        free, tilt = jnp.linalg.solve(matrix, sides).T
        q = free - (w @ free) / (w @ tilt) * tilt  # keeps Σ w_i
        longest = jnp.minimum(1, 0.95 / jnp.maximum(jnp.max(-q), 1e-6))
        moved = w * (1 + longest * strides[:, None] * q)
        moved = moved / jnp.sum(moved, axis=1, keepdims=True)
        choices = jnp.concatenate([w[None], moved])  # w itself where rounding spoils the step
        values = jax.vmap(barrier, (0, None))(choices, mu)
        return choices[jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))]

    identity = jnp.eye(count, dtype=gram.dtype)
    strides = 0.5 ** jnp.arange(12.0, dtype=gram.dtype)
    start = jnp.full(count, 1 / count, gram.dtype)
    return jax.lax.fori_loop(0, iterations, newton, start)
