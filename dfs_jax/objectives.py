"""The loss of each exit: cross-entropy, label smoothing, logit and feature distillation.

With z_i, f_i the logits and feature of exit i of N, (zT, fT) those of the deepest exit taken as
constants, a the weight and T the temperature of logit distillation, b the weight of feature
distillation and w_i the exit's own weight:

    L_N = w_N CE(z_N, y)
    L_i = w_i [(1 - a) CE(z_i, y) + a s H(softmax(zT / T), softmax(z_i / T)) + b D(f_i, fT)]

H is the cross-entropy of the second distribution under the first and s is 1, or T² on request
(BYOT, ICCV 2019, and the official DFS code have 1; IMTA, ICCV 2019, has T²). D is the Euclidean
distance per example, or the official code's norm of the whole batch's difference. How the N
losses become one update is the business of `gradients/`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

REDUCTIONS = ("mean", "batch_norm")


class Teacher(NamedTuple):
    """What the deepest exit said, as constants."""

    logits: jax.Array  # (B, K)
    feature: jax.Array  # whatever the network's features are


@dataclasses.dataclass(frozen=True)
class Objective:
    """Choice of the exits' losses; see the module's equations.

    Attributes:
      exit_weights: w_i, shallow to deep; empty for all 1.
      label_smoothing: share of the label's probability that is spread over all classes.
      logit_weight: a. Soft labels and smoothing apply to the cross-entropy part only.
      temperature: T.
      scale_by_temperature: s = T² instead of 1.
      feature_weight: b.
      feature_reduction: "mean" over examples, or "batch_norm": one norm over the whole batch,
        which grows with the square root of its size (official code).

    Raises ValueError for values out of range.
    """

    exit_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    logit_weight: float = 0.0
    temperature: float = 3.0
    scale_by_temperature: bool = False
    feature_weight: float = 0.0
    feature_reduction: str = "mean"

    def __post_init__(self):
        numbers = all(isinstance(w, (int, float)) and 0 <= w < math.inf for w in self.exit_weights)
        reduction = self.feature_reduction in REDUCTIONS
        for field, fits, wanted in (
            ("exit_weights", numbers, "be numbers of 0 or more"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "lie in [0, 1)"),
            ("logit_weight", 0 <= self.logit_weight <= 1, "lie in [0, 1]"),
            ("temperature", self.temperature > 0, "be positive"),
            ("feature_weight", self.feature_weight >= 0, "not be negative"),
            ("feature_reduction", reduction, f"be one of {', '.join(REDUCTIONS)}"),
        ):
            if not fits:
                raise ValueError(f"objective.{field} must {wanted}, got {getattr(self, field)!r}")

    @property
    def needs_teacher(self) -> bool:
        """Whether earlier exits' losses depend on the deepest exit."""
        return self.logit_weight > 0 or self.feature_weight > 0

    def check(self, num_exits: int) -> None:
        """Raise ValueError if this objective does not fit a network of `num_exits` exits."""
        if self.exit_weights and len(self.exit_weights) != num_exits:
            raise ValueError(
                f"objective.exit_weights has {len(self.exit_weights)} values, "
                f"the network has {num_exits} exits"
            )

    def check_features(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Raise ValueError if features (B, …) of these shapes, one per exit, do not compare."""
        different = [i for i, shape in enumerate(shapes, 1) if shape != shapes[-1]]
        if self.feature_weight and different:
            exit_shape, last_shape = shapes[different[0] - 1][1:], shapes[-1][1:]
            raise ValueError(
                f"objective.feature_weight compares every exit's features with the last one's, "
                f"but those of exit {different[0]} have shape {exit_shape} and the last one's "
                f"{last_shape}; model.options.adapters=True brings them together"
            )

    def example_losses(
        self,
        i: int,
        num_exits: int,
        logits: jax.Array,
        feature: jax.Array,
        labels: jax.Array,
        teacher: Teacher | None = None,
    ) -> jax.Array:
        """Loss (B,) of exit i (from 0) for each example; its mean is the exit's loss.

        `labels` are classes (B,) or distributions (B, K). `teacher` is needed for every exit
        but the last if `needs_teacher`; no gradient flows into it.
        """
        loss = cross_entropy(logits, labels, self.label_smoothing)
        if i < num_exits - 1 and self.needs_teacher:
            zt, ft = jax.lax.stop_gradient(teacher)
            if self.logit_weight:
                scale = self.temperature**2 if self.scale_by_temperature else 1.0
                soft = soft_cross_entropy(logits, zt, self.temperature)
                loss = (1 - self.logit_weight) * loss + self.logit_weight * scale * soft
            if self.feature_weight:
                apart = feature_distance(feature, ft, self.feature_reduction)
                loss = loss + self.feature_weight * apart
        return self.exit_weights[i] * loss if self.exit_weights else loss


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy (B,) of logits (B, K) with classes (B,) or distributions (B, K)."""
    log_probs = jax.nn.log_softmax(logits)
    if labels.ndim == 1:
        # A product with one-hot labels would be NaN where a log probability is -inf.
        hard = jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
    else:
        hard = jnp.sum(labels * log_probs, axis=-1)
    if not smoothing:
        return -hard
    return -((1 - smoothing) * hard + smoothing * jnp.mean(log_probs, axis=-1))


def soft_cross_entropy(logits: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """-Σ_c softmax(teacher / T)_c · log softmax(logits / T)_c for each example: (B,)."""
    target = jax.nn.softmax(teacher / temperature)
    return -jnp.sum(target * jax.nn.log_softmax(logits / temperature), axis=-1)


def feature_distance(feature: jax.Array, teacher: jax.Array, reduction: str = "mean") -> jax.Array:
    """Euclidean distance (B,) of features (B, …), with gradient 0 where they are equal.

    "batch_norm" gives every example the norm of the whole batch's difference. Raises
    ValueError for features of different shapes.
    """
    if feature.shape != teacher.shape:
        raise ValueError(
            f"feature distillation compares features of one shape, got {feature.shape[1:]} and "
            f"{teacher.shape[1:]} at the last exit; a network option adapters=True brings them "
            "together"
        )
    difference = feature - teacher
    axes = tuple(range(0 if reduction == "batch_norm" else 1, difference.ndim))
    squared = jnp.sum(jnp.square(difference), axis=axes)
    positive = squared > 0
    # The inner where keeps sqrt away from 0, where its gradient is infinite.
    distance = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)
    return jnp.broadcast_to(distance, feature.shape[:1])
