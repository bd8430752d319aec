"""Exact evaluation of every exit: counts over a whole split, and the command for a workdir.

    python -m dfs_jax.evaluate --workdir DIR [--split test|validation] [--step latest|best|N]

Every example counts exactly once, on any number of devices and hosts: the last batch is padded
and masked, and counts are integers added on the host.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dfs_jax import command, metrics
from dfs_jax.config import ConfigError
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


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the evaluation command with arguments `argv`."""
    parser = command.parser(__doc__)
    command.add_workdir(parser)
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--step", default="latest", metavar="latest|best|N", help="checkpoint")
    return command.run(parser, argv, lambda arguments, _: _evaluate_workdir(arguments))


def _evaluate_workdir(arguments: Any) -> None:
    from dfs_jax import experiment, report, sharding, train

    config = command.saved_config(arguments.workdir)
    run = experiment.prepare(config)
    source = run.data.test if arguments.split == "test" else run.data.validation
    if source is None:
        raise ConfigError("--split: this run has no validation split")
    step, state = train.restore(run, arguments.workdir, arguments.step)
    count = counter(run.network, sharding.replicated(run.mesh))
    counts = evaluate(count, state.variables, source, sharding.batch(run.mesh))
    print(f"{arguments.split} split, {int(counts.count)} images, checkpoint of step {step}")
    scores = metrics.summarise(counts, arguments.split)
    print(report.final_table(run, scores, arguments.split), flush=True)


if __name__ == "__main__":
    sys.exit(main())
