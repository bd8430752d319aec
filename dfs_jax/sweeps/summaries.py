"""Runs grouped by configuration, and two configurations compared seed by seed."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dfs_jax.sweeps.equal import what_trains
from dfs_jax.sweeps.records import Record

_JOINT = "joint"  # the label that methods are compared to where a grid says nothing


class Interval(NamedTuple):
    """A mean over seeds with its 95 % interval by Student's t."""

    mean: float
    halfwidth: float  # NaN for a single seed


class Summary(NamedTuple):
    """One configuration and its runs."""

    labels: Mapping[str, str]  # by axis, without the seeds
    runs: dict[str, Record]  # by seed
    same: tuple[Mapping[str, str], ...] = ()  # labels of those that train the same, shown here

    @property
    def costs(self) -> tuple[float, ...]:
        """(N,) of the exits."""
        return costs(next(iter(self.runs.values())))

    @property
    def top1(self) -> dict[str, np.ndarray]:
        """Accuracies (N + 1,) by seed: all exits and then the ensemble."""
        return {seed: accuracies(record) for seed, record in self.runs.items()}

    @property
    def mean(self) -> np.ndarray:
        """(N + 1,) over the seeds."""
        return np.mean(list(self.top1.values()), axis=0)

    @property
    def title(self) -> str:
        return ", ".join(self.label(axis) for axis in self.labels) or "all runs"

    def label(self, axis: str) -> str:
        """The label of an axis, or all those that train the same."""
        found = [*dict.fromkeys(labels[axis] for labels in (self.labels, *self.same))]
        return " / ".join(found) if len(found) <= 3 else f"{found[0]} … {found[-1]}"

    def answers_to(self, labels: Mapping[str, str]) -> bool:
        return labels == self.labels or labels in self.same


def summaries(records: Sequence[Record]) -> list[Summary]:
    """The runs grouped by configuration, in the order of their first run.

    Configurations that train the same with every seed that both have are one, under the labels
    of the first; it takes the seeds that it lacks from the others.
    """
    found: dict[tuple, Summary] = {}
    for record in records:
        group = found.setdefault(tuple(record.choices.items()), Summary(record.choices, {}))
        group.runs[record.seed] = record
    merged: list[Summary] = []
    for group in found.values():
        for i, first in enumerate(merged):
            if _same(first, group):
                runs = {**group.runs, **first.runs}
                merged[i] = Summary(first.labels, runs, (*first.same, group.labels))
                break
        else:
            merged.append(group)
    return merged


def _same(one: Summary, other: Summary) -> bool:
    shared = one.runs.keys() & other.runs.keys()
    pairs = [(one.runs[seed].config, other.runs[seed].config) for seed in shared]
    return bool(pairs) and all(a and b and what_trains(a) == what_trains(b) for a, b in pairs)


def same_lines(groups: Sequence[Summary]) -> list[str]:
    """A sentence for each configuration that stands for others."""
    return [
        " = ".join(", ".join(labels.values()) for labels in (group.labels, *group.same))
        for group in groups
        if group.same
    ]


def baseline_of(records: Sequence[Record], declared: Mapping[str, str]) -> dict[str, str]:
    """What the others are compared to: as declared, or the label `joint`, or the first one."""
    if declared or len({tuple(record.choices.items()) for record in records}) < 2:
        return {**declared}
    first = records[0].choices
    axes = [axis for axis in first if any(r.choices[axis] == _JOINT for r in records)]
    axis = axes[0] if axes else next(iter(first))
    return {axis: _JOINT if axes else first[axis]}


def reference(
    group: Summary, groups: Sequence[Summary], baseline: Mapping[str, str]
) -> Summary | None:
    """The baseline that `group` is compared to: the same other choices. None for itself."""
    wanted = {**group.labels, **baseline}
    return next((g for g in groups if g.answers_to(wanted) and g is not group), None)


def interval(values: Iterable[float]) -> Interval:
    """The mean of one value a seed, at least one."""
    values = np.array(list(values))
    if len(values) == 1:
        return Interval(float(values[0]), math.nan)
    half = _quantile(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Interval(float(values.mean()), float(half))


def difference(one: Mapping[str, float], other: Mapping[str, float]) -> Interval | None:
    """`one` minus `other`, accuracies by seed; None without a common seed.

    The interval is that of the seeds' differences: what a seed does to both does not count.
    """
    found = gaps(one, other)
    return interval(found.values()) if found else None


def gaps(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """`one` minus `other` by common seed."""
    return {seed: one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())}


@functools.cache
def _quantile(degrees: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.975, degrees))


def accuracies(record: Record) -> np.ndarray:
    """Test accuracies (N + 1,) of a run: its exits and then the ensemble."""
    names = [f"test/exit{i}/top1" for i in range(1, len(costs(record)) + 1)]
    return np.array([record.scores[name] for name in (*names, "test/ensemble/top1")])


def costs(record: Record) -> tuple[float, ...]:
    """(N,) multiply-adds per image."""
    found: list[float] = []
    while (name := f"test/exit{len(found) + 1}/cost") in record.scores:
        found.append(record.scores[name])
    return tuple(found)
