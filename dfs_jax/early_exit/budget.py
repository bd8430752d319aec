"""Which exit answers: thresholds on the confidence, what they cost, and how they are fitted.

An image leaves at the first exit k whose confidence is at least the threshold T_k; the deepest
exit answers all that are left. So ties leave together, and a NaN confidence never leaves early.
Thresholds that keep a promise about the accuracy are made in `risk`.

`fit` is the published protocol, whose thresholds equal one image's confidence. The thresholds to
use, those of `family`, lie between two confidences, far enough from both that the last bits, which
change with the batch size and the machine, send no image to another exit.

Everything here is numpy on whole splits: N exits from shallow to deep, B images, P settings.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfs_jax.early_exit import confidence as scores

# No score of `confidence` comes near these; JSON and float32 hold them exactly.
NEVER = 1e8  # nobody leaves here
ALWAYS = -1e8  # the threshold of the deepest exit

# Each image count of an exit over that of the exit before: the published protocol's 40 budgets,
# and a finer range up to both ends, everybody at the first exit and everybody at the last.
PROTOCOL = tuple(p / 20 for p in range(1, 41))
FINE = (0.0, *np.geomspace(1 / 50, 50, 200).tolist(), math.inf)

# Confidences that are no further apart count as equal: 4 units in the last place of a float32 at
# magnitudes from 1 on, and what they are at 1 below it, since softmax is no more exact than that.
_APART = 4 * float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """When images leave: one threshold per exit, the last one `ALWAYS`.

    Infinities are stored as `NEVER` and `ALWAYS`. Raises ValueError for values that are no
    thresholds and for an unknown confidence.
    """

    confidence: str  # the score that is compared, one of `confidence.names()`
    values: tuple[float, ...]  # (N,) shallow to deep
    expected_cost: float | None = None  # per image, on the data they were fitted to
    expected_accuracy: float | None = None  # in [0, 1], likewise
    fitted_for: str = ""  # the target in words, for people
    step: int | None = None  # of the checkpoint whose answers they were fitted to
    weights: str = ""  # the fingerprint of its weights
    warning: str = ""  # why what is expected of them may be untrue, in a sentence; "": nothing is

    def __post_init__(self):
        if self.confidence not in scores.names():
            raise ValueError(
                f"unknown confidence {self.confidence!r}; known: {', '.join(scores.names())}"
            )
        values = tuple(min(max(float(v), ALWAYS), NEVER) for v in self.values)
        if any(math.isnan(v) for v in values) or not values or values[-1] != ALWAYS:
            raise ValueError(
                f"thresholds must be numbers, one per exit and the last one -inf, got {self.values}"
            )
        object.__setattr__(self, "values", values)

    def to_json(self) -> dict[str, Any]:
        """The fields by name, for `json.dumps`."""
        return {**dataclasses.asdict(self), "values": list(self.values)}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Thresholds":
        """The inverse of `to_json`. Raises ValueError for anything else.

        What earlier versions saved lacks the fields about the checkpoint, and is taken.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        before = set(fields) - {"step", "weights", "warning"}
        if not isinstance(saved, Mapping) or not before <= set(saved) <= set(fields):
            raise ValueError(f"saved thresholds have the fields {', '.join(fields)}")
        try:
            return cls(**{**saved, "values": tuple(saved["values"])})
        except TypeError as error:
            raise ValueError(f"these are no saved thresholds: {error}") from None


def choose(confidences: np.ndarray, values: np.ndarray | Sequence[float]) -> np.ndarray:
    """The exit (…, B), from 0, at which each image leaves.

    Args:
      confidences: (N, B).
      values: thresholds (…, N), of one setting or of several.
    """
    values = np.asarray(values)
    num_exits, size = confidences.shape
    if values.shape[-1:] != (num_exits,):
        raise ValueError(f"{num_exits} exits need as many thresholds, got shape {values.shape}")
    exits = np.full((*values.shape[:-1], size), num_exits - 1, np.int16)
    for k in reversed(range(num_exits - 1)):
        exits[confidences[k] >= values[..., k, None]] = k
    return exits


class Outcome(NamedTuple):
    """What P settings of thresholds do on B images."""

    leaving: np.ndarray  # (P, N) images that leave at each exit
    cost: np.ndarray  # (P,) per image, in the unit of the exits' costs
    top1: np.ndarray  # (P,) share of right answers, in [0, 1]
    top5: np.ndarray | None  # (P,) likewise; None where it was not asked for


def outcome(
    confidences: np.ndarray,
    values: np.ndarray,
    costs: Sequence[float],
    correct: np.ndarray,
    correct5: np.ndarray | None = None,
) -> Outcome:
    """What the thresholds `values` (P, N) do on images with `confidences` (N, B).

    Args:
      costs: (N,) of an image that leaves at each exit.
      correct: (N, B) bool, whether each exit's answer is right; `correct5` among its first five.
    """
    exits = choose(confidences, values)
    if not exits.shape[-1]:
        raise ValueError("there are no images")
    images = np.arange(exits.shape[-1])
    leaving = np.stack([np.sum(exits == k, axis=-1) for k in range(len(costs))], axis=-1)
    return Outcome(
        leaving=leaving,
        cost=leaving @ np.asarray(costs, np.float64) / len(images),
        top1=correct[exits, images].mean(axis=-1),
        top5=None if correct5 is None else correct5[exits, images].mean(axis=-1),
    )


def quotas(size: int, num_exits: int, ratios: Sequence[float] = PROTOCOL) -> np.ndarray:
    """How many (P, N) of `size` images should leave at each exit, one row per ratio.

    Exit k = 1..N gets floor(size * q^k / (q + ... + q^N)): shares that grow by the factor q from
    exit to exit, as in the budgeted batch evaluation of Huang et al., Multi-Scale Dense
    Networks, ICLR 2018. Ratio 0 sends everybody to the first exit, infinity to the last.
    """
    k = np.arange(num_exits)
    # Powers of at most 1, so that no ratio overflows; the factor between the two cancels.
    weights = np.array([q**k if q <= 1 else (1 / q) ** k[::-1] for q in map(float, ratios)])
    return np.floor(size * weights / weights.sum(axis=1, keepdims=True)).astype(np.int64)


def fit(confidences: np.ndarray, quotas: np.ndarray) -> np.ndarray:
    """Thresholds (P, N) at which about `quotas` (P, N) of the images leave at each exit.

    T_k is the confidence of the m-th surest image at exit k among those that have not left
    yet, m the quota; every image with at least that confidence leaves, so more than m where
    confidences tie. `NEVER` where m is 0, or greater than the number of images left.

    Args:
      confidences: (N, n) of held-out images; those that are NaN are never counted.
    """
    num_exits, size = confidences.shape
    values = np.full((len(quotas), num_exits), NEVER)
    values[:, -1] = ALWAYS
    waiting = np.ones((len(quotas), size), bool)
    for k in range(num_exits - 1):
        order = np.argsort(-confidences[k])  # NaN comes last
        ranked = confidences[k][order]
        rank = np.cumsum(waiting[:, order] & ~np.isnan(ranked), axis=1, dtype=np.int32)
        wanted = quotas[:, k, None]
        place = np.argmax(rank >= wanted, axis=1)  # of the m-th waiting image
        found = (quotas[:, k] > 0) & (rank[:, -1] >= quotas[:, k])
        values[found, k] = ranked[place[found]]
        waiting &= ~(confidences[k] >= values[:, k, None])
    return values


def family(
    confidence: str, confidences: np.ndarray, correct: np.ndarray, costs: Sequence[float]
) -> tuple[Thresholds, ...]:
    """Thresholds worth choosing, from cheap to costly, each more accurate than those before.

    Fitted to the `FINE` range of quotas, and to a common threshold for all exits, without which
    "patience", whose few values tie, would have no thresholds between the extremes. Each lies
    between two confidences: changes of all confidences by up to two units in the last place of a
    float32 move no image to another exit. Expected costs and accuracies are those on the same
    images, the accuracies therefore slightly hopeful. Arguments as in `outcome`.
    """
    tied = _tied(confidences)
    by_quota = fit(tied, quotas(confidences.shape[1], len(confidences), FINE))
    values = np.concatenate([by_quota, _common(tied)])
    measured = outcome(tied, values, costs, correct)
    chosen: list[Thresholds] = []
    for p in np.lexsort((-measured.top1, measured.cost)):
        cost, accuracy = float(measured.cost[p]), float(measured.top1[p])
        if not chosen or accuracy > chosen[-1].expected_accuracy:
            between = tuple(_between(confidences, choose(tied, values[p]), values[p]))
            chosen.append(Thresholds(confidence, between, cost, accuracy, f"cost {cost:.6g}"))
    return tuple(chosen)


def _tied(confidences: np.ndarray) -> np.ndarray:
    """`confidences` (N, B) in float64, those too close to be told apart made equal.

    In each row a run of values of which every one is within `_apart` of the next gets the least.
    """
    tied = np.array(confidences, np.float64)
    for row in tied:
        order = np.argsort(row)  # NaN comes last
        ranked = row[order]
        starts = np.concatenate([[True], ~(np.diff(ranked) <= _apart(ranked[:-1]))])[: len(row)]
        row[order] = ranked[starts][np.cumsum(starts) - 1]
    return tied


def _between(confidences: np.ndarray, exits: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Thresholds (N,) that send images of `confidences` (N, B) to `exits` (B,) as `values` do.

    Each lies halfway between the least sure image that leaves and the surest that stays. Where all
    or none leave it keeps its value, or as much distance as a change of the last bits asks for.
    """
    moved = np.array(values, np.float64)
    for k, own in enumerate(np.asarray(confidences, np.float64)[:-1]):
        leave, stay = own[exits == k], own[(exits > k) & ~np.isnan(own)]
        if leave.size and stay.size:
            moved[k] = (leave.min() + stay.max()) / 2
        elif leave.size:
            moved[k] = min(moved[k], leave.min() - _apart(leave.min()))
        elif stay.size:
            moved[k] = max(moved[k], stay.max() + _apart(stay.max()))
    return moved


def _apart(confidence: np.ndarray) -> np.ndarray:
    return _APART * np.maximum(1, np.abs(confidence))


def _common(confidences: np.ndarray) -> np.ndarray:
    """Settings (P, N) of one threshold for all exits, at up to 101 quantiles of confidence."""
    early = confidences[:-1]
    present = early[~np.isnan(early)]
    values = np.empty(0)
    if present.size:
        values = np.unique(np.quantile(present, np.linspace(0, 1, 101), method="nearest"))
    result = np.repeat(values.astype(np.float64)[:, None], len(confidences), axis=1)
    result[:, -1] = ALWAYS
    return result


def within(candidates: Sequence[Thresholds], cost: float) -> Thresholds:
    """The most accurate of `candidates` whose expected cost is at most `cost`.

    Raises ValueError, naming the smallest cost there is, if all are dearer.
    """
    affordable = [t for t in candidates if t.expected_cost <= cost]
    if not affordable:
        least = min(t.expected_cost for t in candidates)
        raise ValueError(
            f"no thresholds cost {cost:.6g} or less per image; the cheapest cost {least:.6g}"
        )
    best = max(affordable, key=lambda t: (t.expected_accuracy, -t.expected_cost))
    return dataclasses.replace(best, fitted_for=f"a cost of at most {cost:.6g} per image")


def reaching(candidates: Sequence[Thresholds], accuracy: float) -> Thresholds:
    """The cheapest of `candidates` whose expected accuracy is at least `accuracy`, in [0, 1].

    Raises ValueError, naming the highest accuracy there is, if none is that accurate.
    """
    good = [t for t in candidates if t.expected_accuracy >= accuracy]
    if not good:
        most = max(t.expected_accuracy for t in candidates)
        raise ValueError(f"no thresholds reach an accuracy of {accuracy:g}; the best is {most:.4f}")
    cheapest = min(good, key=lambda t: t.expected_cost)
    return dataclasses.replace(cheapest, fitted_for=f"an accuracy of at least {accuracy:g}")
