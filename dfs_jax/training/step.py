"""What one update does: the compiled training step, and the probe of conflict beside it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from dfs_jax.distributed import placement
from dfs_jax.gradients import Problem, Restart, conflict
from dfs_jax.ops import compiler
from dfs_jax.training import freeze
from dfs_jax.training.run import Run
from dfs_jax.training.state import TrainState, state_placement


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

    places = (state_placement(run), placement.replicated(run.mesh))
    side = run.data.spec.image_shape[0]
    return compiler.jit(step, side, donate_argnums=0, out_shardings=places)


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
    return compiler.jit(probe, side, out_shardings=placement.replicated(run.mesh))


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
    return jax.lax.with_sharding_constraint(x, placement.microbatches(run.mesh))


def _ema_decay(config: ml_collections.ConfigDict, step: jax.Array) -> jax.Array:
    """The configured decay, less at first, so that the average soon forgets the initial weights."""
    return jnp.minimum(config.train.ema, (1 + step) / (10 + step))


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    labels = labels if labels.ndim == 1 else jnp.argmax(labels, -1)
    return jnp.sum(jnp.argmax(logits, -1) == labels)
