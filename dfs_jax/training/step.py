"""What one update does: the compiled training step, and the probe of conflict beside it.

    step_problem ─► apply_method (forward, backward) ─► optimizer ─► averages, measurements

What else looks at a step (the probe, the benchmark) is made from the same pieces.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from dfs_jax.distributed import placement
from dfs_jax.gradients import Problem, Update, conflict
from dfs_jax.ops import compiler
from dfs_jax.training import freeze
from dfs_jax.training.run import Run
from dfs_jax.training.state import TrainState, state_placement

Batch = Mapping[str, jax.Array]


class Measurements(NamedTuple):
    """What a step tells of itself, arrays on the device; N exits."""

    losses: jax.Array  # (N,)
    correct: jax.Array  # (N,) examples
    gradient_norm: jax.Array  # ()
    update_norm: jax.Array  # ()
    finite: jax.Array  # () bool, whether all of the new state is


class Passes(NamedTuple):
    """What the forward and backward passes of a step have found, before the optimizer."""

    update: Update
    losses: jax.Array  # (N,)
    correct: jax.Array  # (N,) examples


def make_train_step(run: Run) -> Callable[[TrainState, Batch], tuple[TrainState, Measurements]]:
    """The compiled update (state, batch) -> (state, measurements); the state is donated.

    With `train.accumulation` the method sees one microbatch after the other, each with its own
    batch statistics, surgery and dropout, and the gradients are averaged.
    """

    def step(state: TrainState, batch: Batch):
        if run.config.train.accumulation == 1:
            state, passes = apply_method(run, state, batch)
        else:
            state, passes = _accumulated(run, state, batch)
        params, opt_state, updates = _descend(run.optimizer, passes.update, state)
        ema = state.ema
        if ema is not None:
            newest = {"params": params, "batch_stats": state.batch_stats}
            ema = optax.incremental_update(newest, ema, 1 - _ema_decay(run.config, state.step))
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        return state, Measurements(
            losses=passes.losses,
            correct=passes.correct,
            gradient_norm=optax.global_norm(passes.update.gradients),
            update_norm=optax.global_norm(updates),
            # A variance can overflow while the loss, which divides by it, looks well.
            finite=_all_finite((state.params, state.batch_stats, state.opt_state)),
        )

    places = (state_placement(run), placement.replicated(run.mesh))
    return jit(run, step, donate_argnums=0, out_shardings=places)


def make_conflict_probe(run: Run) -> Callable[[TrainState, Batch], dict[str, jax.Array]]:
    """The compiled function (state, batch) -> cosines between the exits' gradients, by name.

    They are those of the step that is about to be taken, of its first microbatch if there are
    several. A program of its own: whether it runs changes no bit of the step.
    """

    def probe(state: TrainState, batch: Batch):
        part = None
        if run.config.train.accumulation > 1:
            batch, part = jax.tree.map(lambda x: _microbatches(run, x)[0], batch), 0
        problem, _ = step_problem(run, state, batch, part)
        return conflict.scalars(conflict.measure(problem, state.params))

    return jit(run, probe, out_shardings=placement.replicated(run.mesh))


class Programs(NamedTuple):
    """What the steps of a run, or of one of its phases, are taken with."""

    enter: Callable[[TrainState], TrainState]  # before the first of them
    step: Callable[[TrainState, Batch], tuple[TrainState, Measurements]]
    probe: Callable[[TrainState, Batch], dict[str, jax.Array]]


def make_programs(run: Run) -> dict[int, Programs]:
    """The programs of a run's phases, by the step that each begins at; nothing is compiled."""
    found = {}
    for phase in run.phases or (run,):
        same = phase.goes_on or not phase.first_step
        enter = (lambda state: state) if same else _fresh_optimizer(phase)
        programs = Programs(enter, make_train_step(phase), make_conflict_probe(phase))
        found[phase.first_step] = programs
    return found


def _fresh_optimizer(run: Run) -> Callable[[TrainState], TrainState]:
    """The compiled function that gives a state the optimizer's first state of `run`."""
    places = state_placement(run).opt_state
    begin = jit(run, run.optimizer.init, out_shardings=places)
    return lambda state: state.replace(opt_state=begin(state.params))


def jit(run: Run, function: Callable, **choices: Any) -> compiler.jit:
    """`function` jitted as the training step of `run` is."""
    return compiler.jit(function, run.data.spec.side, **choices)


def step_problem(
    run: Run, state: TrainState, batch: Batch, part: int | jax.Array | None = None
) -> tuple[Problem, jax.Array]:
    """What the method works on in the step after `state`, and its own random key.

    `part` is the microbatch that `batch` is, from 0, if there are several.
    """
    rng = jax.random.fold_in(jax.random.key(run.config.seed), state.step)
    if part is not None:
        rng = jax.random.fold_in(rng, part)
    dropout_rng, method_rng = jax.random.split(rng)
    return Problem(run.network, run.objective, batch, state.batch_stats, dropout_rng), method_rng


def apply_method(
    run: Run, state: TrainState, batch: Batch, part: int | jax.Array | None = None
) -> tuple[TrainState, Passes]:
    """All passes of a step, or of its microbatch `part`: no parameter has moved yet.

    In the state returned running statistics and the method's own state are new.
    """
    problem, rng = step_problem(run, state, batch, part)
    update, aux, method_state = run.method.apply(problem, state.params, state.method_state, rng)
    correct = jnp.stack([_correct(z, batch["label"]) for z in aux.logits])
    batch_stats = freeze.keep(run.config.train.freeze, state.batch_stats, aux.batch_stats)
    state = state.replace(batch_stats=batch_stats, method_state=method_state)
    return state, Passes(update, aux.losses, correct)


def _accumulated(run: Run, state: TrainState, batch: Batch) -> tuple[TrainState, Passes]:
    """`apply_method` over `train.accumulation` microbatches: means of gradients and losses."""
    count = run.config.train.accumulation

    def body(carry, part):
        state, total = carry
        index, batch = part
        state, passes = apply_method(run, state, batch, index)
        total = jax.tree.map(lambda t, g: t + g / count, total, passes.update)
        return (state, total), (passes.losses, passes.correct)

    zeros = Update(jax.tree.map(jnp.zeros_like, state.params))
    parts = (jnp.arange(count), jax.tree.map(lambda x: _microbatches(run, x), batch))
    (state, update), (losses, correct) = jax.lax.scan(body, (state, zeros), parts)
    return state, Passes(update, jnp.mean(losses, axis=0), jnp.sum(correct, axis=0))


def _descend(optimizer: optax.GradientTransformation, update: Update, state: TrainState):
    """New parameters and optimizer state, and what the optimizer added to the parameters."""
    start = update.start(state.params)
    updates, opt_state = optimizer.update(update.gradients, state.opt_state, start)
    if update.descend is not None:

        def held(new, old):
            # Counters go on, so that the schedule keeps to the step.
            counts = jnp.issubdtype(new.dtype, jnp.integer)
            return new if counts else jnp.where(update.descend, new, old)

        updates = jax.tree.map(lambda u: jnp.where(update.descend, u, 0), updates)
        opt_state = jax.tree.map(held, opt_state, state.opt_state)
    return optax.apply_updates(start, updates), opt_state, updates


def _microbatches(run: Run, x: jax.Array) -> jax.Array:
    """Examples (B, …) as (train.accumulation, B / train.accumulation, …)."""
    count = run.config.train.accumulation
    # Every device cuts its own examples, whatever their number: none moves.
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, placement.microbatches(run.mesh))


def _ema_decay(config: ml_collections.ConfigDict, step: jax.Array) -> jax.Array:
    """The configured decay, less at first, so that the average soon forgets the initial weights."""
    return jnp.minimum(config.train.ema, (1 + step) / (10 + step))


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    labels = labels if labels.ndim == 1 else jnp.argmax(labels, -1)
    return jnp.sum(jnp.argmax(logits, -1) == labels)
