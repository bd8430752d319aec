"""Which exit answers: thresholds on the confidence, what they cost, and how they are fitted.

An image leaves at the first exit k whose confidence is at least the threshold T_k; the deepest
exit answers all that are left. So ties leave together, and a NaN confidence never leaves early.
Thresholds that keep a promise about the accuracy are made in `risk`.

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
        """The inverse of `to_json`. Raises ValueError for anything else."""
        fields = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(saved, Mapping) or set(saved) != set(fields):
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
