"""Seconds of calls, alone and in turns, and how they are summed up; what is timed is elsewhere."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

WARMUP = 2  # calls that are not counted: they compile, open files, fill what is read ahead

Clock = Callable[[], float]


def timed(call: Callable[[], Any], clock: Clock = time.perf_counter) -> tuple[Any, float]:
    """What `call` returned, and the seconds until its arrays were there."""
    began = clock()
    result = jax.block_until_ready(call())
    return result, clock() - began


def repeating(function: Callable[..., Any], *arguments: Any, calls: int = 1) -> Callable[[], int]:
    """A call for `time_pairs`: `function` of `arguments`, so many times in a row, to its end."""

    def call() -> int:
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        return calls

    return call


class Samples(NamedTuple):
    """Seconds of one call: a method's (P,), and the baseline's (P,) just before each of them.

    The baseline itself has all of its own and nothing to compare with.
    """

    own: tuple[float, ...]
    baseline: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return float(np.median(self.own))

    @property
    def ratios(self) -> np.ndarray:
        """Time over the baseline's, pair by pair: (P,)."""
        return np.array(self.own[: len(self.baseline)]) / np.array(self.baseline)


class Spread(NamedTuple):
    """Median and quartiles."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> "Spread":
        return cls(*map(float, np.quantile(values, (0.25, 0.5, 0.75))))


def median(call: Callable[[], int], samples: int, clock: Clock = time.perf_counter) -> float:
    """The median of so many times of `call`, as `time_pairs` takes it."""
    return time_pairs({"": {"": call}}, "", samples, clock)[""][""].median


def time_pairs(
    groups: Mapping[str, Mapping[str, Callable[[], int]]],
    baseline: str,
    pairs: int,
    clock: Clock = time.perf_counter,
) -> dict[str, dict[str, Samples]]:
    """Seconds of every call of every group, each paired with the `baseline` just before it.

    A call runs to its end and returns how often it did its work. A round takes one group after
    the other, so that whatever else the machine does meets all alike; in a group every call in
    turn, with the baseline again before each: A B A C.
    """
    own = {group: {name: [] for name in calls} for group, calls in groups.items()}
    before = {group: {name: [] for name in calls} for group, calls in groups.items()}
    for calls in groups.values():
        for call in calls.values():
            for _ in range(WARMUP):
                call()
    for _ in range(pairs):
        for group, calls in groups.items():
            others = [name for name in calls if name != baseline]
            for other in others or [None]:
                reference = _seconds(calls[baseline], clock)
                own[group][baseline].append(reference)
                if other is not None:
                    before[group][other].append(reference)
                    own[group][other].append(_seconds(calls[other], clock))
    return {
        group: {
            name: Samples(tuple(own[group][name]), tuple(before[group][name])) for name in calls
        }
        for group, calls in groups.items()
    }


def _seconds(call: Callable[[], int], clock: Clock) -> float:
    count, seconds = timed(call, clock)
    return seconds / count
