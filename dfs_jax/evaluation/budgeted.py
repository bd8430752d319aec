"""Budgeted evaluation: early exit by threshold, at a given mean cost per image.

Thresholds are fitted on the answers to a validation split and applied to those that are shown. How
they are fitted is in `early_exit/budget.py` and `early_exit/risk.py`. P budgets, N exits.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfs_jax.early_exit import budget
from dfs_jax.early_exit.budget import Outcome, Thresholds
from dfs_jax.evaluation.answers import SplitAnswers
from dfs_jax.writing.tables import format_table

_SHOWN = 5  # of the 40 budgets, every fifth is printed; the file holds all


class Budgeted(NamedTuple):
    """What thresholds do."""

    examples: int  # of the validation split
    values: np.ndarray  # (P, N) thresholds of the published protocol's budgets
    fitted: Outcome  # of these thresholds, where they were fitted
    outcome: Outcome  # of these thresholds, on the split that is shown
    family: tuple[Thresholds, ...]  # for any budget
    chosen: Thresholds | None  # those of the target, if there is one
    chosen_outcome: Outcome | None  # P = 1
    warning: str  # why the thresholds may promise too much, in a sentence; "": nothing is known


def measure(
    shown: SplitAnswers,
    validation: SplitAnswers,
    costs: Sequence[float],
    score: str,
    fitted: Mapping[str, Any],
    chosen: Thresholds | None = None,
) -> Budgeted:
    """Early exit of the answers `shown`, by thresholds on `score` that fit those to `validation`.

    Args:
      costs: (N,) multiply-adds per image that leaves at each exit.
      fitted: the fields of `Thresholds` about the checkpoint: step, weights and warning.
      chosen: thresholds to try besides.
    """

    def outcome(of: SplitAnswers, values: np.ndarray) -> Outcome:
        return budget.outcome(of.confidences, values, costs, of.correct, of.correct5)

    size = len(validation.labels)
    values = budget.fit(validation.confidences, budget.quotas(size, len(costs)))
    family = budget.family(score, validation.confidences, validation.correct, costs)
    return Budgeted(
        examples=size,
        values=values,
        fitted=outcome(validation, values),
        outcome=outcome(shown, values),
        family=tuple(dataclasses.replace(t, **fitted) for t in family),
        chosen=chosen,
        chosen_outcome=None if chosen is None else outcome(shown, np.array([chosen.values])),
        warning=fitted["warning"],
    )


def shares(outcome: Outcome) -> np.ndarray:
    """Share (P, N) of the images that leave at each exit."""
    return outcome.leaving / outcome.leaving.sum(axis=1, keepdims=True)


def rows(found: Budgeted) -> list[dict[str, Any]]:
    """budgeted.csv: per budget costs, accuracies, images that leave at each exit, thresholds."""
    outcome, fitted = found.outcome, found.fitted
    result = []
    for p, ratio in enumerate(budget.PROTOCOL):
        row = {
            "ratio": ratio,
            "cost": outcome.cost[p],
            "top1": outcome.top1[p],
            "top5": None if outcome.top5 is None else outcome.top5[p],
            "validation_cost": fitted.cost[p],
            "validation_top1": fitted.top1[p],
        }
        row |= {f"leave{i}": int(n) for i, n in enumerate(outcome.leaving[p], 1)}
        row |= {f"threshold{i}": t for i, t in enumerate(found.values[p], 1)}
        row |= {"warning": found.warning} if found.warning else {}
        result.append(row)
    return result


def table(found: Budgeted) -> str:
    """Some of the budgets, for people."""
    outcome = found.outcome
    lines = [
        (f"{outcome.cost[p] / 1e6:.3f}", f"{outcome.top1[p]:.2%}", _leaving(outcome, p))
        for p in range(_SHOWN - 1, len(outcome.cost), _SHOWN)
    ]
    return format_table(lines, ("mean cost (M)", "accuracy", "leaving at each exit"))


def chosen_lines(chosen: Thresholds, outcome: Outcome) -> str:
    """The thresholds of a target and what they do, for people."""
    words = {budget.NEVER: "never", budget.ALWAYS: "rest"}
    values = " ".join(words.get(value, f"{value:.5g}") for value in chosen.values)
    return (
        f"thresholds for {chosen.fitted_for}: {values}\n"
        f"validation: {chosen.expected_accuracy:.2%} for {chosen.expected_cost / 1e6:.3f} M; here: "
        f"{outcome.top1[0]:.2%} for {outcome.cost[0] / 1e6:.3f} M, leaving "
        f"{_leaving(outcome, 0)}"
    )


def _leaving(outcome: Outcome, p: int) -> str:
    return " ".join(f"{share:4.0%}" for share in shares(outcome)[p])
