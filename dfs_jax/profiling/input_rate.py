"""How fast the input is: batches alone, the step alone, and both, as training runs them."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from dfs_jax.data.pipeline import Batch
from dfs_jax.distributed import placement
from dfs_jax.profiling.timing import WARMUP, timed
from dfs_jax.training.run import Run
from dfs_jax.training.state import TrainState, initial_state
from dfs_jax.training.step import make_train_step
from dfs_jax.writing.tables import format_table


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


@dataclasses.dataclass(frozen=True)
class InputRate:
    """Seconds until the batch of step `start` came, and paces: "input", "step" and "both"."""

    start: int
    first_seconds: float
    paces: dict[str, Pace]

    def as_json(self) -> dict[str, Any]:
        """Every figure, as JSON takes it."""
        paces = {
            name: {
                "images_per_second": pace.images_per_second,
                "seconds_per_batch": pace.seconds / pace.batches,
                "data_wait": pace.data_wait,
            }
            for name, pace in self.paces.items()
        }
        return {"start": self.start, "first_batch_seconds": self.first_seconds, **paces}

    def table(self) -> str:
        """Aligned lines, and a sentence on the first batch."""
        rows = [
            (
                name,
                f"{pace.images_per_second:,.0f}",
                f"{1e3 * pace.seconds / pace.batches:.1f}",
                "" if name == "step" else f"{pace.data_wait:.1%}",
            )
            for name, pace in self.paces.items()
        ]
        lines = format_table(rows, ("", "images/s", "ms per batch", "waiting for data"))
        first = f"the first batch, of step {self.start}, came after {self.first_seconds:.1f} s"
        return f"{lines}\n\n{first}"


def measure_input(run: Run, batches: int, steps: int, start: int = 0) -> InputRate:
    """The pace of so many batches of `run` from step `start` on, and of so many steps.

    With `steps` 0 the `input` alone is measured.
    """
    by_batch = placement.batch(run.mesh)
    source = run.data.train.batches(start, by_batch)
    _, first = timed(lambda: next(source))
    paces = {"input": _time_input(source, batches)}
    del source  # what it reads ahead would slow the steps down
    if steps:
        step, state = make_train_step(run), initial_state(run)
        source = run.data.train.batches(0, by_batch)
        same = next(source)
        state, paces["step"] = _time_steps(step, state, iter(lambda: same, None), steps)
        state, paces["both"] = _time_steps(step, state, source, steps)
    return InputRate(start, first, paces)


def _time_input(source: Iterator[Batch], batches: int) -> Pace:
    times = []
    for _ in range(WARMUP + batches):
        batch, seconds = timed(lambda: next(source))
        times.append(seconds)
    seconds = sum(times[WARMUP:])
    return Pace(batches, len(batch["label"]), seconds, waited=seconds)


def _time_steps(
    step: Callable[..., Any], state: TrainState, source: Iterator[Batch], steps: int
) -> tuple[TrainState, Pace]:
    """As the training loop does it: measurements are fetched while the next step runs."""
    waited, pending = 0.0, None
    for done in range(WARMUP + steps):
        if done == WARMUP:
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
    return state, Pace(steps, len(batch["label"]), seconds, waited)
