"""How fast the input of a configuration is, and whether its training step has to wait for it.

    python -m dfs_jax.benchmark --config FILE[:preset] --input_only [--batches N] [--steps N]
        [--start STEP] [--out FILE]

Three figures: batches alone, the training step alone (on one batch again and again), and both
together, as training runs them. With `--start`, how long a run that goes on at that step waits for
its first batch. Nothing is written but the table and `--out`.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from dfs_jax import command, experiment, metrics, sharding, train
from dfs_jax.data.pipeline import Batch
from dfs_jax.experiment import Run

_WARMUP = 2  # batches or steps that are not counted: they compile, and fill what is read ahead


@dataclasses.dataclass(frozen=True)
class Pace:
    """What a number of batches took, in seconds; `waited` of them for the next batch to come."""

    batches: int
    batch_size: int
    seconds: float
    waited: float

    @property
    def images_per_second(self) -> float:
        """Over all devices and processes."""
        return self.batches * self.batch_size / self.seconds

    @property
    def data_wait(self) -> float:
        """Share of the time, in [0, 1], in which the host waited for a batch."""
        return self.waited / self.seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command with arguments `argv`."""
    parser = command.parser(__doc__)
    command.add_config(parser)
    parser.add_argument(
        "--input_only", action="store_true", required=True, help="measure the input"
    )
    parser.add_argument(
        "--batches", type=_positive, default=30, metavar="N", help="batches alone to measure"
    )
    parser.add_argument(
        "--steps", type=_count, default=10, metavar="N", help="training steps to measure; 0: none"
    )
    parser.add_argument(
        "--start", type=_count, default=0, metavar="STEP", help="the first batch's step"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the figures as JSON")
    return command.run(parser, argv, _report_input)


def _report_input(arguments: argparse.Namespace, config: ml_collections.ConfigDict) -> None:
    run = experiment.prepare(config)
    first, paces = measure_input(run, arguments.batches, arguments.steps, arguments.start)
    print(sharding.describe(run.mesh))
    print(f"{run.data.spec.name}, batches of {config.train.batch_size}, {config.model.name}\n")
    rows = [
        (
            name,
            f"{pace.images_per_second:,.0f}",
            f"{1e3 * pace.seconds / pace.batches:.1f}",
            "" if name == "step" else f"{pace.data_wait:.1%}",
        )
        for name, pace in paces.items()
    ]
    print(metrics.format_table(rows, ("", "images/s", "ms per batch", "waiting for data")))
    print(f"\nthe first batch, of step {arguments.start}, came after {first:.1f} s")
    if arguments.out is not None:
        figures = _as_json(arguments, run, first, paces)
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")


def measure_input(
    run: Run, batches: int, steps: int, start: int = 0
) -> tuple[float, dict[str, Pace]]:
    """Seconds until the batch of step `start` came, and the paces.

    These are of the `input` alone and, where `steps` is above 0, of the `step` alone and `both`.
    """
    by_batch = sharding.batch(run.mesh)
    began = time.perf_counter()
    source = run.data.train.batches(start, by_batch)
    jax.block_until_ready(next(source))
    first = time.perf_counter() - began
    paces = {"input": _time_input(source, batches)}
    del source  # what it reads ahead would slow the steps down
    if steps:
        step, state = train.make_train_step(run), train.initial_state(run)
        source = run.data.train.batches(0, by_batch)
        same = next(source)
        state, paces["step"] = _time_steps(step, state, iter(lambda: same, None), steps)
        state, paces["both"] = _time_steps(step, state, source, steps)
    return first, paces


def _time_input(source: Iterator[Batch], batches: int) -> Pace:
    for _ in range(_WARMUP):
        batch = jax.block_until_ready(next(source))
    began = time.perf_counter()
    for _ in range(batches):
        batch = jax.block_until_ready(next(source))
    seconds = time.perf_counter() - began
    return Pace(batches, len(batch["image"]), seconds, waited=seconds)


def _time_steps(step, state: Any, source: Iterator[Batch], steps: int) -> tuple[Any, Pace]:
    """As the training loop does it: measurements are fetched while the next step runs."""
    waited, pending = 0.0, None
    for done in range(_WARMUP + steps):
        if done == _WARMUP:
            jax.block_until_ready(state)
            began, waited = time.perf_counter(), 0.0
        asked = time.perf_counter()
        batch = next(source)
        waited += time.perf_counter() - asked
        state, measured = step(state, batch)
        if pending is not None:
            jax.device_get(pending)
        pending = measured
    jax.block_until_ready(state)
    seconds = time.perf_counter() - began
    return state, Pace(steps, len(batch["image"]), seconds, waited)


def _as_json(
    arguments: argparse.Namespace, run: Run, first: float, paces: dict[str, Pace]
) -> dict[str, Any]:
    return {
        "config": arguments.config,
        "data": run.data.spec.name,
        "network": run.config.model.name,
        "batch_size": run.config.train.batch_size,
        "devices": sharding.describe(run.mesh),
        "jax": jax.__version__,
        "start": arguments.start,
        "first_batch_seconds": first,
        **{
            name: {
                "images_per_second": pace.images_per_second,
                "seconds_per_batch": pace.seconds / pace.batches,
                "data_wait": pace.data_wait,
            }
            for name, pace in paces.items()
        },
    }


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _positive(text: str) -> int:
    value = _count(text)
    if value == 0:
        raise argparse.ArgumentTypeError("give at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
