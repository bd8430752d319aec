"""Whether a confidence means what it says: reliability, calibration error, temperature.

After Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, ICML 2017.
Numpy on whole splits: N exits, B examples, K classes; functions without N are about one exit.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfs_jax.writing.tables import format_table

BINS = 15
TEMPERATURES = (0.05, 20.0)  # where `fit_temperature` looks


class Reliability(NamedTuple):
    """Answers by confidence, in equal bins (low, high] of [0, 1]."""

    count: np.ndarray  # (bins,) answers
    confidence: np.ndarray  # (bins,) their mean confidence, NaN where there are none
    accuracy: np.ndarray  # (bins,) the share that is right, likewise
    error: float  # expected calibration error: the mean of |accuracy - confidence| over answers


class Calibration(NamedTuple):
    """How far confidences are probabilities when the logits are divided by temperatures."""

    temperatures: tuple[float, ...]  # (N,)
    reliability: tuple[Reliability, ...]  # (N,)
    nll: tuple[float, ...]  # (N,) mean cross-entropy in nats


def measure(
    logits: np.ndarray, labels: np.ndarray, correct: np.ndarray, temperatures: Sequence[float]
) -> Calibration:
    """Calibration of answers with `logits` (N, B, K), `correct` (N, B), at `temperatures` (N,)."""
    found, nll = [], []
    for z, right, temperature in zip(logits, correct, temperatures, strict=True):
        found.append(reliability(max_softmax(z, temperature), right))
        nll.append(negative_log_likelihood(z, labels, temperature))
    return Calibration(tuple(temperatures), tuple(found), tuple(nll))


def rows(
    top1: Sequence[float], trained: Calibration, calibrated: Calibration | None
) -> list[dict[str, Any]]:
    """calibration.csv: one row per exit of accuracies `top1` (N,), as trained and `calibrated`.

    Without the latter its columns are None.
    """
    found = []
    for i, accuracy in enumerate(top1):
        before = trained.reliability[i]
        row: dict[str, Any] = {
            "exit": i + 1,
            "top1": accuracy,
            "confidence": float(np.nansum(before.confidence * before.count) / before.count.sum()),
            "ece": before.error,
            "nll": trained.nll[i],
            "temperature": calibrated and calibrated.temperatures[i],
            "ece_calibrated": calibrated and calibrated.reliability[i].error,
            "nll_calibrated": calibrated and calibrated.nll[i],
        }
        found.append(row)
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What people want to know of `rows`."""
    columns = {"confidence": "confidence", "ece": "calibration error"}
    if rows[0]["temperature"] is not None:
        columns |= {"temperature": "temperature", "ece_calibrated": "error with it"}
    lines = [(str(row["exit"]), *(f"{row[name]:.4f}" for name in columns)) for row in rows]
    return format_table(lines, ("exit", *columns.values()))


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
