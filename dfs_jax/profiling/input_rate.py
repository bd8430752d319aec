"""How fast the input is: batches alone, the step alone, and both, as training runs them."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax

from dfs_jax.data.pipeline import Batch
from dfs_jax.distributed import placement
from dfs_jax.training.run import Run
from dfs_jax.training.state import initial_state
from dfs_jax.training.step import make_train_step

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


def measure_input(
    run: Run, batches: int, steps: int, start: int = 0
) -> tuple[float, dict[str, Pace]]:
    """Seconds until the batch of step `start` came, and the paces.

    These are of the `input` alone and, where `steps` is above 0, of the `step` alone and `both`.
    """
    by_batch = placement.batch(run.mesh)
    began = time.perf_counter()
    source = run.data.train.batches(start, by_batch)
    jax.block_until_ready(next(source))
    first = time.perf_counter() - began
    paces = {"input": _time_input(source, batches)}
    del source  # what it reads ahead would slow the steps down
    if steps:
        step, state = make_train_step(run), initial_state(run)
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
