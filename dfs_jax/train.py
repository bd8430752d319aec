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
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from etils import epath

from dfs_jax import (
    checkpoint,
    compiler,
    evaluate,
    experiment,
    flops,
    freeze,
    metrics,
    report,
    sharding,
)
from dfs_jax import workdir as workdirs
from dfs_jax.config import ConfigError
from dfs_jax.experiment import Run
from dfs_jax.gradients import Problem, Restart, conflict
from dfs_jax.saving import Preempted, Saves

log = logging.getLogger(__name__)


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds. `step` counts completed updates."""

    step: jax.Array  # () int32
    params: Any
    batch_stats: Any
    opt_state: Any
    method_state: Any
    ema: Any  # averaged parameters and statistics, as `variables`; or None

    @property
    def variables(self) -> dict[str, Any]:
        """What is evaluated: the averages where they are kept."""
        if self.ema is not None:
            return self.ema
        return {"params": self.params, "batch_stats": self.batch_stats}


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> dict[str, float]:
    """Train as `config` says in `workdir`, going on from its newest checkpoint.

    Returns the final metrics, `test/…` among them, and prints them as a table. Raises
    ConfigError for a configuration or workdir that cannot be used, before anything is compiled
    or changed; TrainingError when a loss is not finite.
    """
    run = experiment.prepare(config, workdir)
    _refuse_longer_run(run, workdir)
    directory = workdirs.create(config, workdir)
    print(sharding.describe(run.mesh), flush=True)

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
                report.describe(run, state.params, start, directory)
                with contextlib.closing(Saves(config, saver, _every(run, "checkpoint"))) as saves:
                    state = _loop(run, state, start, directory, saves, writer, held_out)
            final = _test(run, state, writer)
    if jax.process_index() == 0:
        print(report.final_table(run, final), flush=True)
    return final


def _loop(run: Run, state: TrainState, start: int, directory, saves, writer, held_out):
    """Steps `start`+1 … total, with evaluation and checkpoints on their way."""
    eval_every = _every(run, "eval")
    by_batch, everywhere = sharding.batch(run.mesh), sharding.replicated(run.mesh)
    train_step, probe = make_train_step(run), make_conflict_probe(run)
    probe_every = run.config.train.conflict_every
    count = evaluate.counter(run.network, everywhere)
    reporter = report.Reporter(run, writer, start)
    profile = report.Profile(run, directory)

    # Told to end at a step that was to be evaluated, a run saved it without.
    owed = sharding.agreed(start > 0 and not metrics.has(directory, start, "eval/mean/top1"))
    batches = run.data.train.batches(start, by_batch)
    for step in range(start, run.total_steps + 1):
        profile.after(step, reporter)
        last = step == run.total_steps
        preempted = not last and saves.preempted(step)
        scores: dict[str, float] = {}
        new = step > start
        if (new or owed) and (last or step % eval_every == 0) and not preempted:
            with reporter.paused():
                counts = evaluate.evaluate(count, state.variables, held_out, by_batch)
                scores = metrics.summarise(counts, "eval")
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


def make_train_step(run: Run) -> Callable[[TrainState, Mapping[str, jax.Array]], Any]:
    """The compiled update (state, batch) -> (state, measurements); the state is donated.

    Measurements are device arrays: `losses` (N,), `correct` (N,) examples, `gradient_norm` and
    `update_norm` (), and `finite` (), whether all of the new state is. With `train.accumulation`
    the method sees one microbatch after the other, each with its own batch statistics, surgery
    and dropout, and the gradients are averaged.
    """
    config, optimizer = run.config, run.optimizer

    def gradients(state, batch, rng):
        problem, method_rng = _problem(run, state, batch, rng)
        result, aux, method_state = run.method.apply(
            problem, state.params, state.method_state, method_rng
        )
        correct = jnp.stack([_correct(z, batch["label"]) for z in aux.logits])
        batch_stats = freeze.keep(config.train.freeze, state.batch_stats, aux.batch_stats)
        state = state.replace(batch_stats=batch_stats, method_state=method_state)
        return state, (result, aux.losses, correct)

    def step(state: TrainState, batch):
        rng = _step_rng(run, state)
        if config.train.accumulation == 1:
            state, (result, losses, correct) = gradients(state, batch, rng)
        else:
            state, (result, losses, correct) = _accumulated(run, gradients, state, batch, rng)
        params, opt_state, gradient, updates = _descend(optimizer, result, state)
        ema = state.ema
        if ema is not None:
            newest = {"params": params, "batch_stats": state.batch_stats}
            ema = optax.incremental_update(newest, ema, 1 - _ema_decay(config, state.step))
        measured = {
            "losses": losses,
            "correct": correct,
            "gradient_norm": optax.global_norm(gradient),
            "update_norm": optax.global_norm(updates),
        }
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        # A variance can overflow while the loss, which divides by it, looks well.
        measured["finite"] = _all_finite((state.params, state.batch_stats, state.opt_state))
        return state, measured

    placement = (state_placement(run), sharding.replicated(run.mesh))
    side = run.data.spec.image_shape[0]
    return compiler.jit(step, side, donate_argnums=0, out_shardings=placement)


def make_conflict_probe(run: Run) -> Callable[[TrainState, Mapping[str, jax.Array]], Any]:
    """The compiled function (state, batch) -> cosines between the exits' gradients, by name.

    They are those of the step that is about to be taken, of its first microbatch if there are
    several. A program of its own: whether it runs changes no bit of the step.
    """

    def probe(state: TrainState, batch):
        rng = _step_rng(run, state)
        if run.config.train.accumulation > 1:
            batch = jax.tree.map(lambda x: _microbatches(run, x)[0], batch)
            rng = jax.random.fold_in(rng, 0)
        problem, _ = _problem(run, state, batch, rng)
        return conflict.scalars(conflict.measure(problem, state.params))

    side = run.data.spec.image_shape[0]
    return compiler.jit(probe, side, out_shardings=sharding.replicated(run.mesh))


def _step_rng(run: Run, state: TrainState) -> jax.Array:
    return jax.random.fold_in(jax.random.key(run.config.seed), state.step)


def _problem(run: Run, state: TrainState, batch: Any, rng: jax.Array) -> tuple[Problem, jax.Array]:
    """What a method works on, and the method's own random key."""
    dropout_rng, method_rng = jax.random.split(rng)
    return Problem(run.network, run.objective, batch, state.batch_stats, dropout_rng), method_rng


def _descend(optimizer: optax.GradientTransformation, result: Any, state: TrainState):
    """New parameters and optimizer state from a method's result, its gradients, the updates."""
    if not isinstance(result, Restart):
        updates, opt_state = optimizer.update(result, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state, result, updates

    def held(new, old):
        # Counters go on, so that the schedule keeps to the step.
        counts = jnp.issubdtype(new.dtype, jnp.integer)
        return new if counts else jnp.where(result.descend, new, old)

    updates, opt_state = optimizer.update(result.gradients, state.opt_state, result.params)
    updates = jax.tree.map(lambda u: jnp.where(result.descend, u, 0), updates)
    opt_state = jax.tree.map(held, opt_state, state.opt_state)
    return optax.apply_updates(result.params, updates), opt_state, result.gradients, updates


def _accumulated(run: Run, gradients: Callable, state: TrainState, batch: Any, rng: jax.Array):
    """`gradients` over `train.accumulation` microbatches: means of gradients and losses."""
    count = run.config.train.accumulation

    def body(carry, part):
        state, total = carry
        index, batch = part
        state, (gradient, losses, correct) = gradients(state, batch, jax.random.fold_in(rng, index))
        total = jax.tree.map(lambda t, g: t + g / count, total, gradient)
        return (state, total), (losses, correct)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    parts = (jnp.arange(count), jax.tree.map(lambda x: _microbatches(run, x), batch))
    (state, gradient), (losses, correct) = jax.lax.scan(body, (state, zeros), parts)
    return state, (gradient, jnp.mean(losses, axis=0), jnp.sum(correct, axis=0))


def _microbatches(run: Run, x: jax.Array) -> jax.Array:
    """Examples (B, …) as (train.accumulation, B / train.accumulation, …)."""
    count = run.config.train.accumulation
    # Every device cuts its own examples, whatever their number: none moves.
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, sharding.microbatches(run.mesh))


def _ema_decay(config: ml_collections.ConfigDict, step: jax.Array) -> jax.Array:
    """The configured decay, less at first, so that the average soon forgets the initial weights."""
    return jnp.minimum(config.train.ema, (1 + step) / (10 + step))


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    labels = labels if labels.ndim == 1 else jnp.argmax(labels, -1)
    return jnp.sum(jnp.argmax(logits, -1) == labels)


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


def restore_or_initialise(run: Run, saver: checkpoint.Checkpointer) -> TrainState:
    """The state to go on from, placed on the mesh."""
    restored = saver.restore(abstract_state(run))
    if restored is not None:
        log.info("going on from the checkpoint of step %d", restored.step)
        return restored.state
    state = initial_state(run)
    if run.config.train.init_from:
        state = with_weights(state, *read_weights(run.config.train.init_from))
    return state


def restore(run: Run, workdir: str, which: str = "latest") -> tuple[int, TrainState]:
    """Step and state of the checkpoint "latest", "best" or a number of a trained `workdir`.

    Nothing there is changed. Raises ConfigError if there is no such checkpoint.
    """
    directory = epath.Path(workdir) / "checkpoints"
    if not directory.exists():
        raise ConfigError(f"--workdir: {workdir} holds no checkpoint")
    with checkpoint.Checkpointer(
        directory, best_metric=run.config.train.best_metric, read_only=True
    ) as saver:
        if which not in ("latest", "best") and not which.isdecimal():
            raise ConfigError(f"--step must be latest, best or a number, got {which!r}")
        step = {"latest": None, "best": saver.best_step()}.get(which, which)
        if which == "best" and step is None:
            raise ConfigError(
                f"--step: no checkpoint in {workdir} was scored on a validation split"
            )
        if step is not None and int(step) not in saver.all_steps():
            steps = ", ".join(map(str, saver.all_steps()))
            raise ConfigError(f"--step: {workdir} has no checkpoint of step {step}; it has {steps}")
        restored = saver.restore(abstract_state(run), step=None if step is None else int(step))
    if restored is None:
        raise ConfigError(f"--workdir: {workdir} holds no checkpoint")
    return restored.step, restored.state


def read_weights(workdir: str) -> tuple[str, dict[str, Any]]:
    """Where the weights of a trained `workdir` come from, and what its evaluation would use.

    Takes any network; nothing there is changed.
    """
    directory = epath.Path(workdir) / "checkpoints"
    with checkpoint.Checkpointer(directory, best_metric=None, read_only=True) as saver:
        step = saver.latest_step()
        saved = saver.restore(saver.metadata(step), step).state
    weights = saved.get("ema") or {name: saved.get(name) for name in ("params", "batch_stats")}
    return f"step {step} of {workdir}", weights


def with_weights(state: TrainState, source: str, weights: Mapping[str, Any]) -> TrainState:
    """`state` with the `weights` of `source`, matched by name and shape; the log tells the rest.

    Raises ConfigError if none fits.
    """
    given = dict(jax.tree_util.tree_leaves_with_path(weights))
    fresh = []

    def choose(path, leaf):
        value = given.pop(path, None)
        if value is None or value.shape != leaf.shape:
            fresh.append(jax.tree_util.keystr(path, simple=True, separator="/"))
            return leaf
        return jax.device_put(np.asarray(value).astype(leaf.dtype), leaf.sharding)

    before = {"params": state.params, "batch_stats": state.batch_stats}
    after = jax.tree_util.tree_map_with_path(choose, before)
    total = len(jax.tree.leaves(before))
    if len(fresh) == total:
        raise ConfigError(f"train.init_from: no array of {source} fits this network")
    log.info("%d of %d arrays are those of %s", total - len(fresh), total, source)
    if fresh:
        log.info("these start fresh: %s", ", ".join(fresh))
    ema = state.ema if state.ema is None else jax.tree.map(jnp.copy, after)
    return state.replace(**after, ema=ema)


def initial_state(run: Run) -> TrainState:
    """Fresh weights, drawn from the configuration's seed, placed on the mesh."""
    # Hundreds of small random draws that run once: compiling them well would take longer.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    placement = state_placement(run)
    return jax.jit(_create_state(run), out_shardings=placement, compiler_options=quick)()


def abstract_state(run: Run) -> TrainState:
    """Shapes, types and placement of the state, without computing it."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(_create_state(run)),
        state_placement(run),
    )


def state_placement(run: Run) -> TrainState:
    """Where each array of the state lives: spread over the fsdp axis, statistics replicated."""
    state = jax.eval_shape(_create_state(run))
    return sharding.spread(run.mesh, state).replace(
        batch_stats=jax.tree.map(lambda _: sharding.replicated(run.mesh), state.batch_stats)
    )


def _create_state(run: Run) -> Callable[[], TrainState]:
    def create():
        images = jnp.zeros((1, *run.data.spec.image_shape), jnp.float32)
        variables = run.network.init(jax.random.key(run.config.seed), images)
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        averages = {"params": params, "batch_stats": batch_stats}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=run.optimizer.init(params),
            method_state=run.method.init(params),
            ema=jax.tree.map(jnp.copy, averages) if run.config.train.ema else None,
        )

    return create


# The end: the test split, read once with the final weights.


def _test(run: Run, state: TrainState, writer: metrics.MetricWriter) -> dict[str, float]:
    count = evaluate.counter(run.network, sharding.replicated(run.mesh))
    counts = evaluate.evaluate(count, state.variables, run.data.test, sharding.batch(run.mesh))
    scores = metrics.summarise(counts, "test")
    for i, cost in enumerate(
        flops.exit_costs(run.network, run.data.spec.image_shape).cumulative, 1
    ):
        scores[f"test/exit{i}/cost"] = cost
    writer.write(run.total_steps, scores)
    return scores
