"""Exact evaluation of every exit: counts over a whole split, and the command for a workdir.

    python -m dfs_jax.evaluate --workdir DIR [--split test] [--step best]

Every example counts exactly once, on any number of devices and hosts: the last batch is padded
and masked, and counts are integers added on the host.
"""

from collections.abc import Callable
from typing import Any

import jax

from dfs_jax import metrics
from dfs_jax.data.pipeline import EvalSource
from dfs_jax.models import MultiExit

Variables = Any  # {"params": …, "batch_stats": …}


def counter(
    network: MultiExit, everywhere: jax.sharding.NamedSharding
) -> Callable[..., metrics.ExitCounts]:
    """The compiled function (variables, batch) -> counts of one masked batch."""

    def count(variables, batch):
        outputs = network.apply(variables, batch["image"], train=False)
        return metrics.count_batch(outputs.logits, batch["label"], batch["mask"])

    return jax.jit(count, out_shardings=everywhere)


def evaluate(
    count: Callable[..., metrics.ExitCounts],
    variables: Variables,
    source: EvalSource,
    sharding: jax.sharding.NamedSharding,
) -> metrics.ExitCounts:
    """Counts over every example of `source`, once each, as host integers and floats."""

    def results():
        # One batch behind, so that fetching a result never stalls the device, and at most two
        # batches are in flight.
        waiting = None
        for batch in source.batches(sharding):
            running = count(variables, batch)
            if waiting is not None:
                yield waiting
            waiting = running
        yield waiting

    return metrics.total(results())
