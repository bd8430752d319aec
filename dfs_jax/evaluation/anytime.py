"""Anytime evaluation: how accurate each exit is, and all of them together, against its cost."""

from collections.abc import Sequence
from typing import Any

from dfs_jax.training.counts import ExitCounts


def accuracies(counts: ExitCounts) -> list[float]:
    """Share of right answers of each exit, (N,)."""
    return [int(n) / int(counts.count) for n in counts.top1]


def ensemble(counts: ExitCounts) -> float:
    """Share of right answers of the mean of all exits' softmax."""
    return int(counts.ensemble) / int(counts.count)


def rows(counts: ExitCounts, costs: Sequence[float]) -> list[dict[str, Any]]:
    """anytime.csv: one row per exit and one for the ensemble.

    top5 is None for five classes or fewer. `costs` (N,) are cumulative, in multiply-adds per image.
    """
    size = int(counts.count)
    found = [
        {
            "exit": str(i + 1),
            "cost": cost,
            "top1": top1,
            "top5": None if counts.top5 is None else int(counts.top5[i]) / size,
            "nll": float(counts.loss[i]) / size,
        }
        for i, (cost, top1) in enumerate(zip(costs, accuracies(counts), strict=True))
    ]
    together = {"exit": "ensemble", "cost": costs[-1], "top1": ensemble(counts)}
    return [*found, {**dict.fromkeys(found[0]), **together}]
