"""The training loop: one file, top to bottom.

    prepare ─► restore or initialise ─► [evaluate ─► checkpoint ─► next batch ─► step]* ─► test

A run killed at any moment and started again with the same command ends with the same
parameters: the state is a function of the step, batches are a pure function of the step, and
whatever was logged beyond the restored checkpoint is removed. What one update does is in
`step.py`; methods, objectives, networks and data come from their own packages, and a new one
never needs a change here.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping

import jax
import ml_collections
from etils import epath

from dfs_jax.config import ConfigError
from dfs_jax.data.pipeline import DataError, EvalSource
from dfs_jax.distributed import placement, processes
from dfs_jax.models.cost import exit_costs
from dfs_jax.training import checkpoint, footprint, lock, metrics, progress
from dfs_jax.training import workdir as workdirs
from dfs_jax.training.counts import batch_counter, count_split, summarise
from dfs_jax.training.progress import TrainingError
from dfs_jax.training.run import Run, prepare, warn
from dfs_jax.training.save_policy import Preempted, Saves
from dfs_jax.training.state import TrainState, given_weights, restore_or_initialise
from dfs_jax.training.step import Programs, make_programs
from dfs_jax.writing.console import say

log = logging.getLogger(__name__)


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> dict[str, float]:
    """Train as `config` says in `workdir`, going on from its newest checkpoint.

    Returns the final metrics, `test/…` among them, and prints them as a table. Raises
    ConfigError for a configuration or workdir that cannot be used and for a step that does not fit
    into memory, before anything is changed; TrainingError when a loss is not finite or, its state
    saved, data cannot be read; Preempted when the process is told to end, its state saved.
    """
    workdirs.check_writable(workdir)
    run = prepare(config, workdir)
    warn(run)
    _reached(run, workdir)
    with lock.held(workdir):
        workdirs.check(config, workdir)  # again, now that no other run can change it
        final = _train(run, workdir)
    if jax.process_index() == 0:
        say(progress.final_table(run, final))
    return final


def _train(run: Run, workdir: str) -> dict[str, float]:
    """The rest of the run in its workdir; the final metrics."""
    weights, programs = given_weights(run, workdir), make_programs(run)
    if (reached := _reached(run, workdir)) < run.total_steps:
        for first, phase in programs.items():
            if first >= run.taking(reached).first_step:
                footprint.check_step(run.taking(first), phase.step)
    directory = workdirs.create(run.config, workdir, run.data.record)
    say(placement.describe(run.mesh))

    held_out = run.data.validation
    best_metric = run.config.train.best_metric if held_out else None
    if held_out is None:
        log.warning("no validation split: eval/… is the test split, and no best checkpoint is kept")
        held_out = run.data.test
    with checkpoint.Checkpointer(directory / "checkpoints", best_metric=best_metric) as saver:
        state = restore_or_initialise(run, saver, weights)
        del weights  # of which the state has a copy
        start = int(jax.device_get(state.step))
        with metrics.MetricWriter(directory, start_step=start) as writer:
            if start < run.total_steps or _owes_scores(run, start, directory):
                progress.describe(run, state.params, start, directory)
                saves = Saves(run.config, saver, _every(run, "checkpoint"), start)
                reporter = progress.Reporter(run, writer, start)
                with contextlib.closing(saves), _outliving_bad_data(saves, reporter):
                    given = saves, reporter, held_out, programs
                    state = _loop(run, state, start, directory, *given)
            return _test(run, state, writer)


def _loop(
    run: Run,
    state: TrainState,
    start: int,
    directory: epath.Path,
    saves: Saves,
    reporter: progress.Reporter,
    held_out: EvalSource,
    programs: Mapping[int, Programs],
) -> TrainState:
    """Steps `start`+1 … total, with evaluations and checkpoints on their way; the last state."""
    by_batch = placement.batch(run.mesh)
    count = batch_counter(run.network, placement.replicated(run.mesh))
    profile = progress.Profile(run, directory)
    eval_every, probe_every = _every(run, "eval"), run.config.train.conflict_every

    def evaluate(step: int, state: TrainState) -> dict[str, float]:
        with reporter.paused():
            counts = count_split(count, state.variables, held_out, by_batch)
            scores = summarise(counts, "eval")
            reporter.evaluated(step, scores)
        return scores

    if _owes_scores(run, start, directory):
        saves.scored(start, evaluate(start, state))
    if start == run.total_steps:
        return state
    phase = programs[run.taking(start).first_step]
    batches = run.data.train.batches(start, by_batch)
    for step in range(start, run.total_steps):  # so many updates are done
        profile.after(step, reporter)
        if saves.preempted(step):
            reporter.settle()  # only a finite state is saved
            raise Preempted(f"told to end: {saves.kept()}")
        evaluates = step > start and step % eval_every == 0
        scores = evaluate(step, state) if evaluates else {}
        if saves.due(step):
            with reporter.paused():  # settles first, as above
                saves.save(step, state, scores)
        if step in programs:
            phase = programs[step]
            state = phase.enter(state)
        with jax.transfer_guard("disallow"):  # a hidden host transfer would stall every step
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            probes = probe_every and (step + 1) % probe_every == 0
            seen = phase.probe(state, batch) if probes else {}
            state, measured = phase.step(state, batch)
        saves.reached(step + 1, state)
        reporter.step_done(step + 1, measured, waited, seen)

    profile.after(run.total_steps, reporter)
    scores = evaluate(run.total_steps, state)
    with reporter.paused():
        saves.finish(run.total_steps, state, scores)
    if saves.preempted(run.total_steps):
        raise Preempted(f"told to end: {saves.kept()}")
    return state


@contextlib.contextmanager
def _outliving_bad_data(saves: Saves, reporter: progress.Reporter) -> Iterator[None]:
    """Saves the state of a run that a damaged file ends, and tells so; raises TrainingError."""
    try:
        yield
    except DataError as error:
        kept = "the same command goes on from the newest checkpoint"
        if jax.process_count() == 1:  # of several, the others wait in the next step
            reporter.settle()
            kept = saves.kept()
        raise TrainingError(f"{error}; {kept}") from error


def _owes_scores(run: Run, start: int, directory: epath.Path) -> bool:
    """Whether a run that had to end at `start` saved that step without evaluating it."""
    if not start or (start % _every(run, "eval") and start < run.total_steps):
        return False
    return processes.agreed(not metrics.has(directory, start, "eval/mean/top1"))


def _every(run: Run, what: str) -> int:
    """Steps between evaluations ("eval") or checkpoints ("checkpoint")."""
    return run.config.train[f"{what}_every"] or max(1, round(run.steps_per_epoch))


def _reached(run: Run, workdir: str) -> int:
    """The step that `workdir` is at; raises ConfigError if that is past the end of `run`."""
    reached = checkpoint.newest_step(epath.Path(workdir) / "checkpoints") or 0
    if reached > run.total_steps:
        raise ConfigError(
            f"--workdir: {workdir} is at step {reached} already, beyond the {run.total_steps} "
            "steps of this configuration; ask for more, or choose another workdir"
        )
    return reached


def _test(run: Run, state: TrainState, writer: metrics.MetricWriter) -> dict[str, float]:
    """Scores and costs on the test split, which is read once, with the final weights."""
    count = batch_counter(run.network, placement.replicated(run.mesh))
    counts = count_split(count, state.variables, run.data.test, placement.batch(run.mesh))
    scores = summarise(counts, "test")
    for i, cost in enumerate(exit_costs(run.network, run.data.spec.batch(1)).cumulative, 1):
        scores[f"test/exit{i}/cost"] = cost
    writer.write(run.total_steps, scores)
    return scores
