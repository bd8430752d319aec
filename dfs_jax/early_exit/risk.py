"""Thresholds that keep a promise: at most e less accurate than the full network, surely enough.

The promise holds with probability d, for any network and any distribution of images, as long
as the validation images are drawn like those to come and took no part in training. It is Learn
then Test (Angelopoulos, Bates, Candès, Jordan and Lei, 2021): Theorem 1 with fixed sequence
testing and the exact binomial p-value. In this setting:

- The loss of an image is 1 if the full network (its deepest exit) is right and the early
  answer is wrong, else 0. Its mean, the risk, is at least the accuracy that early exit costs:
  an image that only the early answer gets right may not make up for one that it gets wrong.
- The candidates are one threshold for all exits, at levels that are fixed beforehand; had they
  been fitted to the validation images, as in `budget`, the bound would not hold.
- If the risk at a level exceeds e, then so few losses among n images that
  P[Binomial(n, e) <= losses] <= 1 - d have a probability of at most 1 - d. Levels are tested from
  the safest to the boldest and the first failure ends it: to break the promise, the first
  level whose risk exceeds e must have passed. So no correction for many tests is due, and the
  risk need not grow with the level (which Risk-Controlling Prediction Sets, Bates et al.,
  2021, would ask for, and which early exit cannot promise).
"""

import math
from collections.abc import Sequence

import numpy as np

from dfs_jax.early_exit import budget
from dfs_jax.early_exit.budget import Thresholds


def thresholds(
    confidence: str,
    confidences: np.ndarray,
    correct: np.ndarray,
    costs: Sequence[float],
    *,
    num_classes: int,
    risk: float,
    probability: float,
) -> Thresholds:
    """The boldest thresholds that lose at most `risk` of accuracy with `probability`.

    Args:
      confidence: name of the score that `confidences` (N, n) hold, of n validation images.
      correct: (N, n) bool, whether each exit's answer is right.
      costs: (N,) of an image that leaves at each exit.
      num_classes: of the network; it fixes the range of the score.
      risk: e in (0, 1), a share of all images.
      probability: d in (0, 1), over the draw of the validation images.

    Raises:
      ValueError: a value out of range, or too few images to show so small a risk.
    """
    num_exits, size = confidences.shape
    allowed = allowed_losses(size, risk, probability)
    if allowed < 0:
        needed = math.ceil(math.log(1 - probability) / math.log(1 - risk))
        raise ValueError(
            f"{size} validation images cannot show a loss of at most {risk:g} with probability "
            f"{probability:g}, even if none of them were lost; at least {needed} can"
        )
    common = levels(confidence, num_classes, num_exits)
    values = np.repeat(common[:, None], num_exits, axis=1)
    values[:, -1] = budget.ALWAYS
    losses = count_losses(confidences, correct, values)
    chosen = values[passing(losses, allowed) - 1]
    measured = budget.outcome(confidences, chosen[None], costs, correct)
    return Thresholds(
        confidence,
        tuple(chosen),
        expected_cost=float(measured.cost[0]),
        expected_accuracy=float(measured.top1[0]),
        fitted_for=f"an accuracy at most {risk:g} below the full network's, with probability "
        f"{probability:g}",
    )


def levels(confidence: str, num_classes: int, num_exits: int) -> np.ndarray:
    """Thresholds (L,) to test, from the safest (`NEVER`) to the boldest; they see no data.

    Scores that are probabilities or entropies crowd at the sure end, hence seven decades of
    distance from it, 20 levels each. All are float32 numbers.
    """
    distance = np.logspace(-7, 0, 141)
    by_score = {
        "max_softmax": 1 - distance * (1 - 1 / num_classes),
        "margin": 1 - distance,
        "entropy": -distance * math.log(num_classes),
        "patience": np.arange(num_exits - 2, -1, -1),
    }
    if confidence not in by_score:
        raise ValueError(f"unknown confidence {confidence!r}; known: {', '.join(by_score)}")
    rounded = by_score[confidence].astype(np.float32).astype(np.float64)
    return np.concatenate([[budget.NEVER], rounded])


def count_losses(confidences: np.ndarray, correct: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Images (L,) that the deepest exit gets right and thresholds `values` (L, N) get wrong."""
    exits = budget.choose(confidences, values)
    early = correct[exits, np.arange(correct.shape[1])]
    return np.sum(correct[-1] & ~early, axis=-1)


def allowed_losses(size: int, risk: float, probability: float) -> int:
    """The most losses k among `size` images with P[Binomial(size, risk) <= k] <= 1 - probability.

    -1 if there is none. Raises ValueError for a risk or probability outside (0, 1).
    """
    for name, value in (("risk", risk), ("probability", probability)):
        if not 0 < value < 1:
            raise ValueError(f"the {name} must lie between 0 and 1, got {value:g}")
    k = np.arange(size)
    # From P[k] to P[k + 1] by their ratio, in logarithms: P[0] alone can be 1e-300.
    steps = np.log((size - k) / (k + 1)) + math.log(risk) - math.log1p(-risk)
    mass = size * math.log1p(-risk) + np.concatenate([[0.0], np.cumsum(steps)])
    tail = np.logaddexp.accumulate(mass)
    return int(np.searchsorted(tail, math.log1p(-probability), side="right")) - 1


def passing(losses: np.ndarray, allowed: int) -> int:
    """How many of the levels (L,), tested in order, pass before the first that fails."""
    failed = np.flatnonzero(losses > allowed)
    return int(failed[0]) if len(failed) else len(losses)
