"""What the benchmark times is what training runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from tiny_run import few_digits  # noqa: F401

from dfs_jax.distributed import placement
from dfs_jax.profiling import overheads, step_cost
from dfs_jax.profiling.random_images import random_run
from dfs_jax.training.run import prepare
from dfs_jax.training.state import abstract_state, initial_state
from dfs_jax.training.step import make_train_step


def test_the_step_is_the_program_that_training_compiles_for_its_data(monkeypatch):
    monkeypatch.setattr(step_cost, "compiled_cost", lambda f, *x: (f.lower(*x).as_text(), None))
    config = tiny_run.config()
    timed = step_cost.programs(random_run(config), 1)["step"].compiled
    assert timed == _trained(config)
    assert timed != _trained(tiny_run.config("optimizer.nesterov=True"))


def _trained(config):
    """The text of the step that training lowers, on the configured data."""
    run = prepare(config)
    batch = next(run.data.train.batches(0, placement.batch(run.mesh)))
    return make_train_step(run).lower(abstract_state(run), batch).as_text()


def _recording():
    """An optimizer that remembers the gradients that it was given, and moves nothing."""

    def update(gradients, state, params):
        del state, params
        return jax.tree.map(jnp.zeros_like, gradients), gradients

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def test_forward_and_backward_are_those_of_the_step(monkeypatch):
    # What is not run here need not be compiled.
    monkeypatch.setattr(step_cost, "compiled_cost", lambda function, *_: (function, None))
    # Dropout and PCGrad's random order tell whether both draw from the same keys.
    config = tiny_run.config("gradients.name=pcgrad", "train.batch_size=8")
    run = random_run(config)._replace(optimizer=_recording())
    programs = step_cost.programs(run, 1)
    assert programs["forward"]() == programs["forward_backward"]() == 1
    passes, batch_stats = programs["forward_backward"].result
    losses, _ = programs["forward"].result
    step = make_train_step(run)
    batch = next(run.data.train.batches(0))
    first, measured = step(initial_state(run), batch)
    applied, moved = jax.device_get((first.opt_state, first.batch_stats))
    _assert_close(passes.update.gradients, applied)
    _assert_close(batch_stats, moved)
    _assert_close((passes.losses, losses), (measured.losses, measured.losses))
    np.testing.assert_array_equal(passes.correct, measured.correct)
    # A step later dropout is another one, and so are the gradients.
    second, _ = step(first, batch)
    with pytest.raises(AssertionError):
        _assert_close(passes.update.gradients, second.opt_state)


def test_gradients_per_exit_are_those_of_the_step():
    run = random_run(tiny_run.config("train.batch_size=8"))._replace(optimizer=_recording())
    state = initial_state(run)
    batch = next(run.data.train.batches(0))
    summed = jax.jit(overheads.exit_gradient_functions(run)["summed"])(state, batch)
    after, _ = make_train_step(run)(state, batch)
    _assert_close(summed, after.opt_state)


def _assert_close(found, want):
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
