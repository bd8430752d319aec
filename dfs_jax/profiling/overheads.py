"""What a run spends time on besides the step of its method.

    per-exit gradients   one `grad` per prefix network, which the multi-task methods use, and
                         `jacrev` of the losses, each over one gradient of the summed losses
    reporting            the host's work for the measurements of a step: fetch, check, write
    evaluation           counting a batch at every exit, over training on as many images
    compilation          tracing and compiling the step, and fetching it from the cache on disk

Waiting for data is measured by `dfs_jax.benchmark --input_only`, on the configured data.
"""

import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax.distributed import placement
from dfs_jax.gradients.per_exit import exit_gradients
from dfs_jax.profiling import compiled, timing
from dfs_jax.training import metrics, progress
from dfs_jax.training.counts import batch_counter
from dfs_jax.training.run import Run
from dfs_jax.training.state import initial_state
from dfs_jax.training.step import Measurements, jit, make_train_step, step_problem
from dfs_jax.writing.tables import format_table


@dataclasses.dataclass(frozen=True)
class Overheads:
    """Seconds are medians; FLOPs the compiler's, of one device."""

    step_seconds: float
    gradient_flops: dict[str, float]  # "summed", "prefix", "jacrev"
    gradient_seconds: dict[str, float]
    report_seconds: float  # of the host, per step, lines of metrics included
    evaluation_seconds: float  # of one batch of train.batch_size
    trace_seconds: float
    compile_seconds: float
    cached_seconds: float  # to fetch the same program from the persistent cache

    @property
    def report_share(self) -> float:
        """Of the step. An upper bound: training does this work while the next step runs."""
        return self.report_seconds / self.step_seconds

    @property
    def evaluation_share(self) -> float:
        """Time to evaluate an image, over that to train on one."""
        return self.evaluation_seconds / self.step_seconds

    def as_json(self) -> dict[str, Any]:
        """Every field and share, as JSON takes it."""
        shares = {name: getattr(self, name) for name in ("report_share", "evaluation_share")}
        return dataclasses.asdict(self) | shares

    def table(self) -> str:
        """Aligned lines."""
        rows = [("training step", _ms(self.step_seconds), "")]
        flops, seconds = self.gradient_flops, self.gradient_seconds
        evaluation = f"{self.evaluation_share:.1%}"
        for name, words in (("prefix", "by prefix networks"), ("jacrev", "by jacrev")):
            times = seconds[name] / seconds["summed"]
            ratio = f"{flops[name] / flops['summed']:.2f} FLOPs, {times:.2f} time of one gradient"
            rows.append((f"per-exit gradients {words}", _ms(seconds[name]), ratio))
        rows += [
            ("reporting, per step", _ms(self.report_seconds), f"{self.report_share:.2%} of a step"),
            ("evaluation of a batch", _ms(self.evaluation_seconds), f"{evaluation} of a step"),
            ("tracing the step", f"{self.trace_seconds:.1f} s", ""),
            ("compiling it", f"{self.compile_seconds:.1f} s", "without a persistent cache"),
            ("fetching it", f"{self.cached_seconds:.1f} s", "from the persistent cache"),
        ]
        return format_table(rows, ("", "time", ""))


def measure(run: Run, repeats: int) -> Overheads:
    """The overheads of `run` (on random images), medians of `repeats` measurements each."""
    batch = next(run.data.train.batches(0, placement.batch(run.mesh)))
    state = initial_state(run)
    gradient_flops, gradient_seconds = _per_exit(run, state, batch, repeats)
    evaluation = _evaluation(run, state, batch, repeats)
    step = make_train_step(run)
    cost, cached = _compilation(step, state, batch)
    seconds, reporting = _reporting(run, step, state, batch, repeats)
    return Overheads(
        step_seconds=seconds,
        gradient_flops=gradient_flops,
        gradient_seconds=gradient_seconds,
        report_seconds=reporting,
        evaluation_seconds=evaluation,
        trace_seconds=cost.trace_seconds,
        compile_seconds=cost.compile_seconds,
        cached_seconds=cached,
    )


def exit_gradient_functions(run: Run) -> dict[str, Callable[..., Any]]:
    """Functions (state, batch) -> gradients: of the sum, and two ways per exit."""

    def summed(state, batch):
        problem, _ = step_problem(run, state, batch)
        return jax.grad(lambda p: jnp.sum(problem.losses(p)[0]))(state.params)

    def prefix(state, batch):
        problem, _ = step_problem(run, state, batch)
        return exit_gradients(problem, state.params)[0]

    def jacrev(state, batch):
        problem, _ = step_problem(run, state, batch)
        return jax.jacrev(lambda p: problem.losses(p)[0])(state.params)

    return {"summed": summed, "prefix": prefix, "jacrev": jacrev}


def _per_exit(run: Run, state: Any, batch: Any, repeats: int):
    """FLOPs and seconds by function; the functions take turns."""
    flops, calls = {}, {}
    for name, function in exit_gradient_functions(run).items():
        program, cost = compiled.compiled_cost(jit(run, function), state, batch)
        flops[name], calls[name] = cost.flops, timing.repeating(program, state, batch)
    times = timing.time_pairs({"": calls}, "summed", repeats)[""]
    return flops, {name: samples.median for name, samples in times.items()}


def _evaluation(run: Run, state: Any, batch: Any, repeats: int) -> float:
    count = batch_counter(run.network, placement.replicated(run.mesh))
    labels = batch["label"] if batch["label"].ndim == 1 else jnp.argmax(batch["label"], -1)
    masked = {**batch, "label": labels, "mask": jnp.ones_like(labels, bool)}
    return timing.median(timing.repeating(count, state.variables, masked), repeats)


def _compilation(step: Any, state: Any, batch: Any) -> tuple[compiled.Cost, float]:
    """What the step costs to compile, and the seconds to have it from the persistent cache."""
    cost = compiled.compiled_cost(step, state, batch)[1]
    with tempfile.TemporaryDirectory() as directory, compiled.persistent_cache(directory):
        for _ in range(2):  # the first writes what the second reads
            jax.clear_caches()
            lowered = step.lower(state, batch)
            _, seconds = timing.timed(lowered.compile)
    return cost, seconds


def _reporting(run: Run, step: Any, state: Any, batch: Any, repeats: int) -> tuple[float, float]:
    """Seconds of a step, and of reporting it: the mean over one line of metrics and those between.

    The step is done before it is reported, so that nothing but the host's work is counted.
    """
    every = run.config.train.log_every
    steps, reports = [], []
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))  # the lines of progress
        writer = stack.enter_context(metrics.MetricWriter(directory, start_step=0))
        reporter = progress.Reporter(run, writer, 0)
        for number in range(timing.WARMUP + repeats):
            (state, measured), seconds = timing.timed(lambda state=state: step(state, batch))
            reported = 2 * every * (number + 1)  # a step that gets a line; the one after does not
            with_line = _seconds_to_report(reporter, reported, measured)
            without = _seconds_to_report(reporter, reported + 1, measured)
            if number >= timing.WARMUP:
                steps.append(seconds)
                reports.append((with_line + (every - 1) * without) / every)
    return float(np.median(steps)), float(np.median(reports))


def _seconds_to_report(reporter: progress.Reporter, step: int, measured: Measurements) -> float:
    measured = jax.tree.map(jnp.copy, measured)  # JAX keeps the host's copy of what was fetched
    jax.block_until_ready(measured)

    def report():
        reporter.step_done(step, measured, 0.0)
        reporter.settle()

    return timing.timed(report)[1]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
