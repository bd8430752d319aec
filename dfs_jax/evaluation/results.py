"""From the answers of a test and a validation split to calibration and early exit."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dfs_jax.early_exit import budget
from dfs_jax.early_exit.budget import Thresholds
from dfs_jax.evaluation import calibration
from dfs_jax.evaluation.answers import Answers
from dfs_jax.training.counts import ExitCounts


class Calibration(NamedTuple):
    """How far confidences are probabilities when the logits are divided by temperatures."""

    temperatures: tuple[float, ...]  # (N,)
    reliability: tuple[calibration.Reliability, ...]  # (N,)
    nll: tuple[float, ...]  # (N,) mean cross-entropy in nats


class EarlyExit(NamedTuple):
    """What needed a validation split: temperatures and thresholds. P budgets."""

    examples: int  # of the validation split
    calibrated: Calibration  # with the temperatures fitted there
    values: np.ndarray  # (P, N) thresholds of the budgeted evaluation
    fitted: budget.Outcome  # of these thresholds, where they were fitted
    outcome: budget.Outcome  # of these thresholds, on the split that is shown
    family: tuple[Thresholds, ...]
    chosen: Thresholds | None  # those of the target, if there is one
    chosen_outcome: budget.Outcome | None  # P = 1


class Results(NamedTuple):
    """What the command measures. N exits."""

    counts: ExitCounts
    costs: tuple[float, ...]  # (N,) multiply-adds per image, cumulative
    trained: Calibration  # as trained: every temperature is 1
    early: EarlyExit | None  # None without a validation split


def measure(
    shown: Answers,
    validation: Answers | None,
    costs: Sequence[float],
    score: str,
    chosen: Thresholds | None = None,
) -> Results:
    """Calibration and early exit of the answers `shown`, with what `validation` has to fit."""
    costs = tuple(costs)
    trained = _calibration(shown, (1.0,) * len(costs))
    if validation is None:
        return Results(shown.counts, costs, trained, None)
    temperatures = tuple(
        calibration.fit_temperature(z, validation.labels) for z in validation.logits
    )
    values = budget.fit(validation.confidences, budget.quotas(len(validation.labels), len(costs)))

    def outcome(of: Answers, values: np.ndarray) -> budget.Outcome:
        return budget.outcome(of.confidences, values, costs, of.correct, of.correct5)

    early = EarlyExit(
        examples=len(validation.labels),
        calibrated=_calibration(shown, temperatures),
        values=values,
        fitted=outcome(validation, values),
        outcome=outcome(shown, values),
        family=budget.family(score, validation.confidences, validation.correct, costs),
        chosen=chosen,
        chosen_outcome=None if chosen is None else outcome(shown, np.array([chosen.values])),
    )
    return Results(shown.counts, costs, trained, early)


def _calibration(shown: Answers, temperatures: tuple[float, ...]) -> Calibration:
    reliability, nll = [], []
    for z, correct, temperature in zip(shown.logits, shown.correct, temperatures, strict=True):
        sure = calibration.max_softmax(z, temperature)
        reliability.append(calibration.reliability(sure, correct))
        nll.append(calibration.negative_log_likelihood(z, shown.labels, temperature))
    return Calibration(temperatures, tuple(reliability), tuple(nll))
