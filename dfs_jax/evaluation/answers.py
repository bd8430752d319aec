"""What every exit says about every example of a split."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax.data.pipeline import EvalSource
from dfs_jax.early_exit import confidence
from dfs_jax.models import MultiExit, inputs
from dfs_jax.training.counts import ExitCounts, Variables, count_batch, one_behind, total_counts


class SplitAnswers(NamedTuple):
    """What every exit says about every example of a split: N exits, B examples, on the host."""

    counts: ExitCounts
    labels: np.ndarray  # (B,) int32
    logits: np.ndarray  # (N, B, K)
    confidences: np.ndarray  # (N, B) of the score that was asked for
    classes: np.ndarray  # (N, B, min(5, K)) int32, the largest logits' first

    @property
    def correct(self) -> np.ndarray:
        """Whether each exit's answer is right, (N, B)."""
        return self.classes[..., 0] == self.labels

    @property
    def correct5(self) -> np.ndarray | None:
        """Whether the label is among the first five, (N, B); None for five classes or fewer."""
        if self.logits.shape[-1] <= 5:
            return None
        return np.any(self.classes == self.labels[:, None], axis=-1)


def answerer(
    network: MultiExit, score: str, everywhere: jax.sharding.NamedSharding
) -> Callable[..., Any]:
    """The compiled function (variables, batch) -> counts and all answers of one masked batch."""

    def answer(variables, batch):
        logits = network.apply(variables, inputs.of_batch(batch), train=False).logits
        counts = count_batch(logits, batch["label"], batch["mask"])
        stacked = jnp.stack(logits)
        classes = jax.lax.top_k(stacked, min(5, stacked.shape[-1]))[1]
        confidences = [
            confidence.score(score, z, previous_predictions=classes[:i, :, 0])
            for i, z in enumerate(logits)
        ]
        examples = (batch["label"], stacked, jnp.stack(confidences), classes)
        return counts, batch["mask"], examples

    return jax.jit(answer, out_shardings=everywhere)


def answer_split(
    answer: Callable[..., Any],
    variables: Variables,
    source: EvalSource,
    sharding: jax.sharding.NamedSharding,
) -> SplitAnswers:
    """The answers to every example of `source`, in its order.

    All stay in memory: 1 GB for 50,000 images, 1,000 classes and 5 exits.
    """
    counts, kept = [], []
    for batch_counts, mask, (labels, *by_exit) in one_behind(answer, variables, source, sharding):
        counts.append(batch_counts)
        mask = jax.device_get(mask).astype(bool)
        kept.append([jax.device_get(labels)[mask], *(jax.device_get(x)[:, mask] for x in by_exit)])
    labels, *by_exit = zip(*kept, strict=True)
    return SplitAnswers(
        total_counts(counts), np.concatenate(labels), *(np.concatenate(x, 1) for x in by_exit)
    )
