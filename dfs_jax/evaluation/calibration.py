"""Whether a confidence means what it says: reliability, calibration error, temperature.

After Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, ICML 2017.
Everything here is about one exit; numpy on whole splits.
"""

import math
from typing import NamedTuple

import numpy as np

BINS = 15
TEMPERATURES = (0.05, 20.0)  # where `fit_temperature` looks


class Reliability(NamedTuple):
    """Answers by confidence, in equal bins (low, high] of [0, 1]."""

    count: np.ndarray  # (bins,) answers
    confidence: np.ndarray  # (bins,) their mean confidence, NaN where there are none
    accuracy: np.ndarray  # (bins,) the share that is right, likewise
    error: float  # expected calibration error: the mean of |accuracy - confidence| over answers


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Reliability:
    """The reliability of probabilities `confidence` (B,) for answers that are `correct` (B,).

    A NaN among the confidences makes the error NaN. Raises ValueError if there are no answers.
    """
    if not len(confidence):
        raise ValueError("there are no answers")
    with np.errstate(invalid="ignore"):
        place = np.ceil(np.asarray(confidence, np.float64) * bins) - 1
    place = np.nan_to_num(place).clip(0, bins - 1).astype(int)
    count, sure, right = (
        np.bincount(place, weights, bins) for weights in (None, confidence, correct)
    )
    with np.errstate(invalid="ignore"):
        return Reliability(
            count, sure / count, right / count, float(np.abs(right - sure).sum() / len(confidence))
        )


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Mean cross-entropy, in nats, of softmax(`logits` / `temperature`): (B, K), labels (B,)."""
    shifted = _shifted(logits) / temperature
    own = np.take_along_axis(shifted, labels[:, None], axis=-1)[:, 0]
    return float(np.mean(np.log(np.sum(np.exp(shifted), axis=-1)) - own, dtype=np.float64))


def max_softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """The largest probability (B,) of softmax(`logits` / `temperature`)."""
    return 1 / np.sum(np.exp(_shifted(logits) / temperature), axis=-1)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature within `TEMPERATURES` that minimises the cross-entropy.

    The cross-entropy is convex in the inverse temperature, so its derivative has one sign
    change: Newton's steps find it, and bisection takes over whenever one leaves the bracket.
    The end of the range is returned where there is none inside, as for logits that are right
    every time (the colder the better).

    Args:
      logits: (B, K); examples with a logit that is not finite are left out.
      labels: (B,) integers.
    """
    kept = np.all(np.isfinite(logits), axis=-1)
    if not kept.any():
        return 1.0
    shifted = _shifted(logits[kept])
    own = np.take_along_axis(shifted, labels[kept][:, None], axis=-1)[:, 0]
    goal = np.mean(own, dtype=np.float64)

    def derivatives(inverse):
        weights = np.exp(shifted * inverse)
        weights /= weights.sum(axis=-1, keepdims=True)
        mean = np.sum(weights * shifted, axis=-1)
        second = np.sum(weights * np.square(shifted), axis=-1) - np.square(mean)
        return np.mean(mean, dtype=np.float64) - goal, np.mean(second, dtype=np.float64)

    low, high = (1 / t for t in reversed(TEMPERATURES))  # of the inverse
    if derivatives(low)[0] >= 0:
        return TEMPERATURES[1]
    if derivatives(high)[0] <= 0:
        return TEMPERATURES[0]
    inverse = 1.0
    for _ in range(60):
        slope, curvature = derivatives(inverse)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        new = inverse - slope / curvature if curvature > 0 else math.inf
        if not low < new < high:
            new = math.sqrt(low * high)
        if abs(new - inverse) <= 1e-6 * inverse:
            break
        inverse = new
    return 1 / inverse


def _shifted(logits: np.ndarray) -> np.ndarray:
    """Logits whose largest is 0, so that no exponential overflows."""
    with np.errstate(invalid="ignore"):
        return logits - np.max(logits, axis=-1, keepdims=True)
