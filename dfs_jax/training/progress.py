"""What a person sees of a run: its description, progress, and the final table.

Measurements of step n are fetched while step n+1 runs, so that reporting never stalls the
device; they are checked here, since they are first on the host here.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np
from etils import epath

from dfs_jax.models.cost import cost_table, exit_costs, training_flops
from dfs_jax.training import metrics
from dfs_jax.training.run import Run
from dfs_jax.training.step import Measurements
from dfs_jax.writing.files import write_whole
from dfs_jax.writing.tables import format_table

log = logging.getLogger(__name__)

_PARAMETERS = "parameters.txt"  # of the workdir: name, shape and size of every parameter

# What a progress line says of the speed, in this order.
_SPEED = {
    "train/images_per_second": "{:,.0f} images/s",
    "train/images_per_second_per_device": "{:,.0f} a device",
    "train/step_seconds": "{:.3g} s a step",
    "train/data_wait": "{:.0%} waiting for data",
    "train/device_memory_gb": "{:.1f} GB a device",
    "train/mfu": "MFU {:.1%}",
}


class Progress:
    """Prints one line per call: where the run is, how fast it goes and when it will end.

    Plain lines without escape codes, so that they read the same in a terminal and in a log;
    only process 0 prints.
    """

    def __init__(self, total_steps: int, *, start_step: int = 0, stream: TextIO | None = None):
        """The time to go is estimated from the steps since this call, evaluations included.

        Args:
          total_steps: length of the whole run.
          start_step: where this process starts.
          stream: standard error if None, looked up at every call.
        """
        self._total = total_steps
        self._start_step = start_step
        self._stream = stream
        self._start = time.monotonic()

    def training(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints loss, training accuracy by exit and speed, as far as `metrics` has them:
        train/loss, train/exit1/top1 …, those of `_SPEED`; and the time to go.
        """
        parts = []
        if "train/loss" in metrics:
            parts.append(f"loss {metrics['train/loss']:.4f}")
        parts += _by_exit("train", metrics)
        for name, text in _SPEED.items():
            if name in metrics:
                parts.append(text.format(metrics[name]))
        done = step - self._start_step
        if done > 0:
            left = (time.monotonic() - self._start) / done * max(self._total - step, 0)
            parts.append(f"ETA {_clock(left)}")
        self._print(step, parts)

    def evaluation(self, step: int, metrics: Mapping[str, float], *, prefix: str = "eval") -> None:
        """Prints the accuracy by exit, of the ensemble and the mean, from `summarise`."""
        parts = _by_exit(prefix, metrics)
        for name in ("ensemble", "mean"):
            if f"{prefix}/{name}/top1" in metrics:
                parts.append(f"{name} {metrics[f'{prefix}/{name}/top1']:.4f}")
        self._print(step, parts)

    def _print(self, step: int, parts: Sequence[str]) -> None:
        if jax.process_index() == 0:
            where = f"step {step}/{self._total} ({step / max(self._total, 1):.1%})"
            # A log on a full disk, or a closed terminal, must not end the training.
            with contextlib.suppress(OSError):
                print("  ".join([where, *parts]), file=self._stream or sys.stderr, flush=True)


def _by_exit(prefix: str, metrics: Mapping[str, float]) -> list[str]:
    exits: list[str] = []
    while (name := f"{prefix}/exit{len(exits) + 1}/top1") in metrics:
        exits.append(f"{metrics[name]:.3f}")
    return [f"{prefix} top1 by exit {' '.join(exits)}"] if exits else []


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


def describe(run: Run, params: Any, start: int, directory: epath.Path) -> None:
    """Tell what will be trained on what, and list the parameters in the workdir.

    Process 0 speaks for all.
    """
    from clu import parameter_overview

    if jax.process_index() != 0:
        return
    overview = parameter_overview.get_parameter_overview(params, include_stats=False)
    try:
        write_whole(directory / _PARAMETERS, overview + "\n")
    except OSError as error:
        log.warning("%s cannot be written (%s)", directory / _PARAMETERS, error.strerror)
    spec = run.data.spec
    log.info("%s", spec)
    log.info("%s with %s", run.config.model.name, run.network.surgery)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    log.info("%s parameters, listed in %s", f"{count:,}", _PARAMETERS)
    if run.config.train.ema:
        log.info("evaluated are averaged weights (decay %s)", run.config.train.ema)
    log.info("%s", cost_table(run.network, spec.batch(1)))
    log.info(
        "steps %d to %d of %d images",
        start + 1,
        run.total_steps,
        run.config.train.batch_size,
    )
    for number, phase in enumerate(run.phases, 1):
        log.info(
            "phase %d, from step %d: %s, exit weights %s, frozen %s",
            number,
            phase.first_step + 1,
            phase.network.surgery,
            phase.objective.exit_weights or "1",
            ", ".join(phase.config.train.freeze) or "nothing",
        )


def final_table(run: Run, scores: Mapping[str, float], split: str = "test") -> str:
    """Accuracy on `split` and cost of every exit, and the ensemble of all of them."""
    costs = exit_costs(run.network, run.data.spec.batch(1))
    rows = []
    for i in range(1, run.network.num_exits + 1):
        cost = costs.cumulative[i - 1]
        rows.append((f"exit {i}", f"{scores[f'{split}/exit{i}/top1']:.2%}", f"{cost / 1e6:.3f}"))
    rows.append(("ensemble", f"{scores[f'{split}/ensemble/top1']:.2%}", rows[-1][2]))
    headers = ("", f"{split} accuracy", "cost (M multiply-adds)")
    return f"\n{format_table(rows, headers)}"


class Reporter:
    """Fetches the measurements of step n while step n+1 runs, checks and reports them."""

    def __init__(self, run: Run, writer: metrics.MetricWriter, start: int):
        self._run, self._writer = run, writer
        self._progress = Progress(run.total_steps, start_step=start)
        self._pending: tuple[int, Measurements, Mapping[str, jax.Array]] | None = None
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0
        train = run.config.train
        self._step_flops = 0
        if train.peak_flops:
            self._step_flops = training_flops(run.network, run.data.spec.batch(train.batch_size))

    def step_done(
        self,
        step: int,
        measured: Measurements,
        waited: float,
        seen: Mapping[str, jax.Array] | None = None,
    ) -> None:
        """Take the device arrays of `step`, for whose batch the host waited that many seconds.

        `seen` are further metrics of the step, () each; one that is NaN does not exist.
        """
        self._waited += waited  # within the time that the report of the step before covers
        self.settle()
        self._pending = (step, measured, seen or {})

    def settle(self) -> None:
        """Wait for the last step's measurements; raises TrainingError if one is not finite."""
        if self._pending is None:
            return
        step, measured, seen = self._pending
        self._pending = None
        measured, seen = jax.device_get((measured, seen))
        _check_finite(step, measured)
        self._steps += 1
        if seen:
            self._writer.write(step, {k: float(v) for k, v in seen.items() if not np.isnan(v)})
        if step % self._run.config.train.log_every == 0 or step == self._run.total_steps:
            self._report(step, measured)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Settles, and keeps what happens inside out of the throughput."""
        self.settle()
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None:
        """Record the scores of an evaluation after `step`."""
        self._writer.write(step, scores)
        self._progress.evaluation(step, scores)

    def _report(self, step: int, measured: Measurements) -> None:
        batch_size = self._run.config.train.batch_size
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        line = {"train/loss": float(measured.losses.sum())}
        for i, loss in enumerate(measured.losses, 1):
            line[f"train/exit{i}/loss"] = float(loss)
        for i, correct in enumerate(measured.correct, 1):
            line[f"train/exit{i}/top1"] = float(correct) / batch_size
        line["train/gradient_norm"] = float(measured.gradient_norm)
        line["train/learning_rate"] = float(self._run.taking(step - 1).schedule(step - 1))
        seconds, devices = elapsed / self._steps, self._run.mesh.size
        line["train/step_seconds"] = seconds
        line["train/images_per_second"] = batch_size / seconds
        line["train/images_per_second_per_device"] = batch_size / seconds / devices
        line["train/data_wait"] = self._waited / elapsed
        if self._step_flops:
            peak = devices * self._run.config.train.peak_flops
            line["train/mfu"] = self._step_flops / seconds / peak
        memory = _device_memory()
        if memory is not None:
            line["train/device_memory_gb"] = memory / 1e9
        self._writer.write(step, line)
        self._progress.training(step, line)
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0


class Profile:
    """The profiler trace of the steps `train.profile_steps`, in the workdir's folder `profile`.

    TensorBoard's profile plugin and Perfetto show it. Process 0 traces its own devices.
    """

    def __init__(self, run: Run, directory: epath.Path):
        steps = tuple(run.config.train.profile_steps)
        self._wanted = bool(steps) and jax.process_index() == 0
        self._first, self._last = steps or (0, 0)
        self._last = min(self._last, run.total_steps)
        self._directory = directory / "profile"
        self._tracing = False

    def after(self, step: int, reporter: Reporter) -> None:
        """Start or stop the trace; `step` updates have been dispatched."""
        if self._tracing and step >= self._last:
            reporter.settle()  # the last step has run to its end
            jax.profiler.stop_trace()
            self._wanted = self._tracing = False
            log.info("the profile of steps %d to %d is in %s", self._first, step, self._directory)
        elif self._wanted and not self._tracing and self._first - 1 <= step < self._last:
            reporter.settle()
            self._first, self._tracing = step + 1, True
            jax.profiler.start_trace(str(self._directory))


def _device_memory() -> int | None:
    """The most bytes that any device here has had in use; None where it does not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)


def _check_finite(step: int, measured: Measurements) -> None:
    bad = [str(i) for i, loss in enumerate(measured.losses, 1) if not np.isfinite(loss)]
    if bad:
        raise TrainingError(
            f"step {step}: the loss of exit {', '.join(bad)} is not finite; nothing of this step "
            "was saved. A smaller optimizer.learning_rate or a warm-up is the usual cure"
        )
    for name in ("gradient_norm", "update_norm"):
        if not np.isfinite(getattr(measured, name)):
            raise TrainingError(f"step {step}: {name} is not finite; nothing of it was saved")
    if not measured.finite:
        raise TrainingError(
            f"step {step}: the losses are finite, but a parameter or a batch statistic is not; "
            "nothing of this step was saved. Images of huge values are the usual cause"
        )
