"""Exact counts of every exit over a whole split.

Every example counts exactly once, on any number of devices and hosts: the last batch is padded
and masked, and counts are integers added on the host. Accuracies are fractions in [0, 1].
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dfs_jax.data.pipeline import EvalSource
from dfs_jax.models import MultiExit, inputs

Variables = Any  # {"params": …, "batch_stats": …}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExitCounts:
    """Sums over examples, N exits from shallow to deep; they add up across batches."""

    top1: Any  # (N,) correct answers
    top5: Any  # (N,) labels among the five largest logits; None for five classes or fewer
    loss: Any  # (N,) cross-entropy, summed
    ensemble: Any  # () correct answers of the mean of all exits' softmax
    count: Any  # () examples


def batch_counter(
    network: MultiExit, everywhere: jax.sharding.NamedSharding
) -> Callable[..., ExitCounts]:
    """The compiled function (variables, batch) -> counts of one masked batch."""

    def count(variables, batch):
        outputs = network.apply(variables, inputs.of_batch(batch), train=False)
        return count_batch(outputs.logits, batch["label"], batch["mask"])

    return jax.jit(count, out_shardings=everywhere)


def count_split(
    count: Callable[..., ExitCounts],
    variables: Variables,
    source: EvalSource,
    sharding: jax.sharding.NamedSharding,
) -> ExitCounts:
    """Counts over every example of `source`, once each, as host integers and floats."""
    return total_counts(one_behind(count, variables, source, sharding))


def one_behind(compiled, variables, source, sharding) -> Iterator[Any]:
    """Results of all batches, each handed out when its successor runs.

    So fetching a result never stalls the device, and at most two batches are in flight.
    """
    waiting = None
    for batch in source.batches(sharding):
        running = compiled(variables, batch)
        if waiting is not None:
            yield waiting
        waiting = running
    yield waiting


def count_batch(logits: Sequence[jax.Array], labels: jax.Array, mask: jax.Array) -> ExitCounts:
    """The counts of one batch; can be jitted, and used under any sharding of the batch.

    Among equal logits the lower class comes first, as in `jax.lax.top_k`.

    Args:
      logits: one (B, K) array per exit, shallow to deep.
      labels: (B,) integers; of any value where the mask is 0.
      mask: (B,) 1 or True for examples that count, 0 for padding.

    Returns:
      int32 counts, and losses in float32 (or wider, as the logits).
    """
    mask = mask.astype(bool)
    labels = jnp.where(mask, labels, 0)
    stacked = jnp.stack(logits)  # (N, B, K)
    stacked = stacked.astype(jnp.promote_types(jnp.float32, stacked.dtype))
    classes = stacked.shape[-1]

    def correct(scores, k):
        hit = jnp.any(lax.top_k(scores, k)[1] == labels[:, None], axis=-1)
        return jnp.sum(hit & mask, axis=-1, dtype=jnp.int32)

    log_probabilities = jax.nn.log_softmax(stacked)
    index = jnp.broadcast_to(labels[:, None], (*stacked.shape[:-1], 1))
    loss = -jnp.take_along_axis(log_probabilities, index, axis=-1)[..., 0]
    return ExitCounts(
        top1=correct(stacked, 1),
        top5=correct(stacked, 5) if classes > 5 else None,
        loss=jnp.sum(jnp.where(mask, loss, 0), axis=-1),
        ensemble=correct(jnp.mean(jnp.exp(log_probabilities), axis=0), 1),
        count=jnp.sum(mask, dtype=jnp.int32),
    )


def total_counts(batches: Iterable[ExitCounts]) -> ExitCounts:
    """The sum of the counts of all `batches`, on the host in int64 and float64.

    Raises ValueError if there is no batch.
    """

    def wide(x):
        x = np.asarray(jax.device_get(x))
        return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)

    sums = [jax.tree.map(wide, batch) for batch in batches]
    if not sums:
        raise ValueError("there are no batches to count")
    return jax.tree.map(lambda *parts: sum(parts[1:], start=parts[0]), *sums)


def summarise(counts: ExitCounts, prefix: str) -> dict[str, float]:
    """Metrics of `counts`, e.g. for prefix "eval": eval/exit1/top1, …/top5, …/loss for every
    exit from 1, eval/ensemble/top1, and eval/mean/top1, the mean over exits.

    top5 is there only for more than five classes. Raises ValueError if nothing was counted.
    """
    count = int(counts.count)
    if count == 0:
        raise ValueError(f"{prefix}: no examples were counted")
    top1 = np.asarray(counts.top1, np.float64) / count
    metrics = {}
    for i in range(len(top1)):
        metrics[f"{prefix}/exit{i + 1}/top1"] = float(top1[i])
        if counts.top5 is not None:
            metrics[f"{prefix}/exit{i + 1}/top5"] = int(counts.top5[i]) / count
        metrics[f"{prefix}/exit{i + 1}/loss"] = float(counts.loss[i]) / count
    metrics[f"{prefix}/ensemble/top1"] = int(counts.ensemble) / count
    metrics[f"{prefix}/mean/top1"] = float(np.mean(top1))
    return metrics
