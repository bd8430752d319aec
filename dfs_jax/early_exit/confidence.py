"""How sure an exit is of its answer: scores by name, larger meaning surer.

What is done with a score (thresholds, which exit answers) is `budget`'s matter. A score is NaN
wherever a logit is, and NaN never reaches a threshold: such an image goes to the deepest exit.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Predictions = jax.Array | Sequence[jax.Array]


def score(
    name: str, logits: jax.Array, previous_predictions: Predictions | None = None
) -> jax.Array:
    """Confidence (B,) of one exit in its answers, by the score `name`; can be jitted.

    Args:
      name: one of `names()`.
      logits: (B, K) of this exit.
      previous_predictions: (i, B) classes answered by the i exits before this one, shallow to
        deep, or a sequence of i arrays (B,); empty at the first exit. Only "patience" reads it.

    Returns:
      float32, or wider where the logits are.

    Raises:
      ValueError: an unknown name, fewer than two classes, or "patience" without predictions.
    """
    if name not in _SCORES:
        raise ValueError(f"unknown confidence {name!r}; known: {', '.join(names())}")
    if logits.shape[-1] < 2:
        raise ValueError(f"confidence needs at least two classes, got logits {logits.shape}")
    logits = logits.astype(jnp.promote_types(jnp.float32, logits.dtype))
    return _SCORES[name](logits, previous_predictions)


def names() -> tuple[str, ...]:
    """The scores that `score` knows."""
    return tuple(_SCORES)


def _max_softmax(logits, _):
    return jnp.max(jax.nn.softmax(logits), axis=-1)


def _margin(logits, _):
    """Between the two largest probabilities."""
    first, second = jnp.moveaxis(jax.lax.top_k(jax.nn.softmax(logits), 2)[0], -1, 0)
    return first - second


def _entropy(logits, _):
    """Of the softmax, negative, in nats: between -log K and 0 (Teerapittayanon et al., 2016)."""
    log_probabilities = jax.nn.log_softmax(logits)
    probabilities = jnp.exp(log_probabilities)
    # A logit of -inf has probability 0, where 0 * -inf would make the sum NaN.
    terms = jnp.where(probabilities == 0, 0, probabilities * log_probabilities)
    return jnp.sum(terms, axis=-1)


def _patience(logits, previous_predictions):
    """How many exits just before this one gave the same answer without a break (PABEE, 2020)."""
    if previous_predictions is None:
        raise ValueError("patience needs previous_predictions; an empty sequence at the first exit")
    prediction = jnp.argmax(logits, axis=-1)
    agreed = jnp.ones(prediction.shape, bool)
    count = jnp.zeros(prediction.shape, logits.dtype)
    for i in reversed(range(len(previous_predictions))):
        agreed &= previous_predictions[i] == prediction
        count += agreed
    return jnp.where(jnp.any(jnp.isnan(logits), axis=-1), jnp.nan, count)


_SCORES: dict[str, Callable[[jax.Array, Predictions | None], jax.Array]] = {
    "max_softmax": _max_softmax,
    "margin": _margin,
    "entropy": _entropy,
    "patience": _patience,
}
