"""Confidence-gated training, CGT: a deeper exit learns from what the shallower ones leave to it.

Confidence-Gated Training for Efficient Early-Exit Neural Networks (arXiv 2509.17885). With ℓ_bi the
loss of example b at exit i = 1..N,

    g = ∇ Σ_i mean_b λ_bi ℓ_bi,     λ_b1 = 1,     λ_bi = Π_{k<i} r_bk

where r_bk is what exit k has left of example b, and p_bk are its softmax probabilities:

    soft    r_bk = 1 - p_bk[y_b]
    hard    r_bk = 0 where argmax p_bk = y_b and max p_bk ≥ threshold, else 1

There is no published code, and our reading is this: the soft gate is a product over all
shallower exits; the hard one asks for the right class as well as for confidence; no gradient flows
through λ; the mean is over all examples, gated ones too. `threshold` is our choice. A label that
is a distribution (mixup) has p[y] = Σ_c y_c p_c, and its largest class is the right one.
Distillation and exit weights are part of ℓ. One forward and one backward pass: cost 1×.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dfs_jax.gradients.method import GradientMethod, Update, weighting_examples

GATES = ("soft", "hard")


def confidence_gated(*, gate: str = "soft", threshold: float = 0.9) -> GradientMethod:
    """The gradient of the gated losses; no state.

    Args:
      gate: "soft" or "hard".
      threshold: confidence from which on the hard gate takes an exit's right answer as final.
        Above 1 no answer is, which is joint training; "soft" has no use for it.

    Raises:
      ValueError: for an unknown gate or a threshold below 0.
    """
    if gate not in GATES:
        raise ValueError(f"gradients.options.gate must be one of {', '.join(GATES)}, got {gate!r}")
    if not threshold >= 0:
        raise ValueError(f"gradients.options.threshold must be 0 or more, got {threshold}")

    def apply(problem, params, state, rng):

        def total(params):
            losses, aux = problem.forward(params)
            weights = example_weights(aux.logits, problem.batch["label"], gate, threshold)
            return jnp.sum(jnp.mean(weights * losses, axis=0)), aux

        gradients, aux = jax.grad(total, has_aux=True)(params)
        return Update(gradients), aux, state

    return GradientMethod(lambda params: (), apply, weighting_examples("confidence_gated"))


def example_weights(
    logits: Sequence[jax.Array], labels: jax.Array, gate: str, threshold: float
) -> jax.Array:
    """λ (B, N), constants, of the exits' logits (B, K) and labels (B,) or (B, K)."""
    if labels.ndim == 1:
        labels = jax.nn.one_hot(labels, logits[0].shape[-1], dtype=logits[0].dtype)
    weights = [jnp.ones(len(labels), logits[0].dtype)]
    for z in logits[:-1]:
        weights.append(weights[-1] * _left(jax.nn.softmax(z), labels, gate, threshold))
    return jax.lax.stop_gradient(jnp.stack(weights, axis=-1))


def _left(probabilities: jax.Array, labels: jax.Array, gate: str, threshold: float) -> jax.Array:
    """r (B,) of an exit's probabilities (B, K) for labels (B, K)."""
    if gate == "soft":
        return jnp.sum(labels * (1 - probabilities), axis=-1)  # never below 0, whatever is rounded
    right = jnp.argmax(probabilities, axis=-1) == jnp.argmax(labels, axis=-1)
    sure = jnp.max(probabilities, axis=-1) >= threshold
    return 1 - (right & sure).astype(probabilities.dtype)
