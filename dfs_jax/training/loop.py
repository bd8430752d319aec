"""The training loop: one file, top to bottom.

    prepare ─► restore or initialise ─► [evaluate ─► checkpoint ─► next batch ─► step]* ─► test

A run killed at any moment and started again with the same command ends with the same
parameters: the state is a function of the step, batches are a pure function of the step, and
whatever was logged beyond the restored checkpoint is removed. What one update does is in
`make_train_step`; methods, objectives, networks and data come from their own packages, and a
new one never needs a change here.
"""

import contextlib
import logging
import time

import jax
import ml_collections
from etils import epath

from dfs_jax.config import ConfigError
from dfs_jax.distributed import placement, processes
from dfs_jax.models.cost import exit_costs
from dfs_jax.training import checkpoint, metrics, progress
from dfs_jax.training import workdir as workdirs
from dfs_jax.training.counts import batch_counter, count_split, summarise
from dfs_jax.training.run import Run, prepare
from dfs_jax.training.save_policy import Preempted, Saves
from dfs_jax.training.state import TrainState, restore_or_initialise
from dfs_jax.training.step import make_conflict_probe, make_train_step

log = logging.getLogger(__name__)


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> dict[str, float]:
    """Train as `config` says in `workdir`, going on from its newest checkpoint.

    Returns the final metrics, `test/…` among them, and prints them as a table. Raises
    ConfigError for a configuration or workdir that cannot be used, before anything is compiled
    or changed; TrainingError when a loss is not finite.
    """
    run = prepare(config, workdir)
    _refuse_longer_run(run, workdir)
    directory = workdirs.create(config, workdir)
    print(placement.describe(run.mesh), flush=True)

    held_out = run.data.validation
    best_metric = config.train.best_metric if held_out else None
    if held_out is None:
        log.warning("no validation split: eval/… is the test split, and no best checkpoint is kept")
        held_out = run.data.test
    with checkpoint.Checkpointer(directory / "checkpoints", best_metric=best_metric) as saver:
        state = restore_or_initialise(run, saver)
        start = int(jax.device_get(state.step))
        with metrics.MetricWriter(directory, start_step=start) as writer:
            if start < run.total_steps:
                progress.describe(run, state.params, start, directory)
                with contextlib.closing(Saves(config, saver, _every(run, "checkpoint"))) as saves:
                    state = _loop(run, state, start, directory, saves, writer, held_out)
            final = _test(run, state, writer)
    if jax.process_index() == 0:
        print(progress.final_table(run, final), flush=True)
    return final


def _loop(run: Run, state: TrainState, start: int, directory, saves, writer, held_out):
    """Steps `start`+1 … total, with evaluation and checkpoints on their way."""
    eval_every = _every(run, "eval")
    by_batch, everywhere = placement.batch(run.mesh), placement.replicated(run.mesh)
    train_step, probe = make_train_step(run), make_conflict_probe(run)
    probe_every = run.config.train.conflict_every
    count = batch_counter(run.network, everywhere)
    reporter = progress.Reporter(run, writer, start)
    profile = progress.Profile(run, directory)

    # Told to end at a step that was to be evaluated, a run saved it without.
    owed = processes.agreed(start > 0 and not metrics.has(directory, start, "eval/mean/top1"))
    batches = run.data.train.batches(start, by_batch)
    for step in range(start, run.total_steps + 1):
        profile.after(step, reporter)
        last = step == run.total_steps
        preempted = not last and saves.preempted(step)
        scores: dict[str, float] = {}
        new = step > start
        if (new or owed) and (last or step % eval_every == 0) and not preempted:
            with reporter.paused():
                counts = count_split(count, state.variables, held_out, by_batch)
                scores = summarise(counts, "eval")
                reporter.evaluated(step, scores)
            if not new:
                saves.scored(step, scores)
        if new and (last or preempted):
            with reporter.paused():
                saves.finish(step, state, scores)
        elif new and saves.due(step):
            with reporter.paused():  # settles first: only a finite state is saved
                saves.save(step, state, scores)
        if preempted:
            raise Preempted(f"told to end: step {step} is saved; the same command goes on from it")
        if last:
            break
        with jax.transfer_guard("disallow"):  # a hidden host transfer would stall every step
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            due = probe_every and (step + 1) % probe_every == 0
            seen = probe(state, batch) if due else {}
            state, measured = train_step(state, batch)
        reporter.step_done(step + 1, measured, waited, seen)
    return state


def _every(run: Run, what: str) -> int:
    """Steps between evaluations ("eval") or checkpoints ("checkpoint")."""
    return run.config.train[f"{what}_every"] or max(1, round(run.steps_per_epoch))


# Where the first state comes from: the workdir's newest checkpoint, else the weights of
# train.init_from, else fresh weights.
def _refuse_longer_run(run: Run, workdir: str) -> None:
    """Raise ConfigError, changing nothing, for a workdir that is past the end of `run`."""
    reached = checkpoint.newest_step(epath.Path(workdir) / "checkpoints") or 0
    if reached > run.total_steps:
        raise ConfigError(
            f"--workdir: {workdir} is at step {reached} already, beyond the {run.total_steps} "
            "steps of this configuration; ask for more, or choose another workdir"
        )


# The end: the test split, read once with the final weights.
def _test(run: Run, state: TrainState, writer: metrics.MetricWriter) -> dict[str, float]:
    count = batch_counter(run.network, placement.replicated(run.mesh))
    counts = count_split(count, state.variables, run.data.test, placement.batch(run.mesh))
    scores = summarise(counts, "test")
    for i, cost in enumerate(exit_costs(run.network, run.data.spec.image_shape).cumulative, 1):
        scores[f"test/exit{i}/cost"] = cost
    writer.write(run.total_steps, scores)
    return scores
