"""When a run saves its state, and what happens when a save fails or the machine is taken away.

How a checkpoint is written, verified and kept is `checkpoint.py`'s; the training loop asks here
after every step.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
from jax.experimental import multihost_utils

from dfs_jax.config import signals
from dfs_jax.distributed import processes
from dfs_jax.training.checkpoint import Checkpointer, CheckpointError

log = logging.getLogger(__name__)

# Tries of the last save of a run, and the seconds between them.
_TRIES, _PAUSE = 5, 10.0


class SavingError(RuntimeError):
    """The last state of a run could not be saved."""


class Preempted(RuntimeError):
    """The process was told to end; what there was to save is saved."""


class Saves:
    """Saves every so many steps and minutes, at the end, and when the process is told to end.

    A save that fails is reported and training goes on; the checkpoints before it stay as they
    are, and the next save is tried as usual. Only the last save of a run must succeed. Every
    process of a run makes the same calls in the same order.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, saver: Checkpointer, every: int, start: int = 0
    ):
        """`every` is the number of steps between saves; minutes come from `config`.

        The state of step `start`, from which the run goes on, needs no save.
        """
        self._saver, self._every, self._start = saver, every, start
        self._seconds = 60 * config.train.checkpoint_minutes
        self._clock_steps = config.train.log_every
        self._last = time.monotonic()
        self._told_to_end = threading.Event()
        self._taken = contextlib.ExitStack()  # the signals, once there is something to save
        self._here: tuple[int, Any] = (start, None)

    def reached(self, step: int, state: Any) -> None:
        """The run is at `step`, whose `state` is saved if it must end here."""
        if self._here[0] == self._start < step:
            self._taken.enter_context(self._signals())
        self._here = step, state

    def due(self, step: int) -> bool:
        """Whether the state after `step` is to be saved by steps or by minutes."""
        if step == self._start:
            return False
        if step % self._every == 0:
            return True
        if not self._seconds or step % self._clock_steps:
            return False
        late = time.monotonic() - self._last >= self._seconds
        return processes.agreed(late)  # one clock decides for all

    def preempted(self, step: int) -> bool:
        """Whether this run is to save and end after `step`; the same answer on all processes."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._told_to_end.is_set()

    def _signals(self) -> contextlib.AbstractContextManager:
        if jax.process_count() == 1:
            return signals.taken(self._told_to_end.set)
        # JAX listens for SIGTERM itself and has all processes agree on a step.
        others = [number for number in signals.ENDING if number != signal.SIGTERM]
        return signals.taken(lambda: os.kill(os.getpid(), signal.SIGTERM), others)

    def save(self, step: int, state: Any, scores: Mapping[str, float]) -> None:
        """Start saving `state`; a failure, of this save or of the one before, is reported."""
        self._last = time.monotonic()
        with self._reported():
            self._saver.wait()
        with self._reported():
            self._saver.save(step, state, {"step": step}, scores)

    def scored(self, step: int, scores: Mapping[str, float]) -> None:
        """Takes the scores of `step`, which was saved in a hurry without them."""
        self._saver.scored(step, scores)

    def finish(self, step: int, state: Any, scores: Mapping[str, float]) -> None:
        """Save the last state and wait for it, several times if need be; raises SavingError."""
        if step == self._start:
            return
        with self._reported():
            self._saver.wait()
        for left in reversed(range(_TRIES)):
            try:
                self._saver.save(step, state, {"step": step}, scores)
                self._saver.wait()
                return
            except CheckpointError as error:
                failure = error
            if left:
                log.warning("%s; it is tried again, up to %d times", failure, left)
                time.sleep(_PAUSE)
        raise SavingError(
            f"{failure}; the newest checkpoint is that of step {self._saver.latest_step()}, from "
            "which the same command goes on"
        ) from failure

    def kept(self) -> str:
        """Saves the state that was `reached`, for a run that ends early; a sentence of that."""
        step, state = self._here
        if not step:
            return "nothing was lost; the same command starts again"
        self.finish(step, state, {})
        return f"step {step} is saved; the same command goes on from it"

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        self._taken.close()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            log.warning(
                "%s; training goes on, and the newest checkpoint is that of step %s",
                error,
                self._saver.latest_step(),
            )
