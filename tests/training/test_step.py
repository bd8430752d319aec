"""What the training step makes of a method's `Update`, on a method that is given its answer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from tiny_run import few_digits  # noqa: F401

from dfs_jax.distributed import placement
from dfs_jax.gradients import GradientMethod, Update
from dfs_jax.training.run import prepare
from dfs_jax.training.state import initial_state
from dfs_jax.training.step import make_train_step

SETTINGS = ("model.options.dropout_rate=0.0", "optimizer.weight_decay=0.0")


def a_step(update_of, *own):
    """State before and after a step with `update_of(params, batch)`, after one plain step."""
    run = prepare(tiny_run.config(*SETTINGS, *own))

    def apply(problem, params, state, rng):
        del rng
        _, aux = problem.losses(params)
        update = update_of(params, problem.batch)
        # The first step fills the optimizer's momentum.
        if update.descend is not None:
            update = update._replace(descend=update.descend | (state == 0))
        return update, aux, state + 1

    run = run._replace(method=GradientMethod(lambda params: jnp.zeros((), jnp.int32), apply))
    step = make_train_step(run)
    batches = run.data.train.batches(0, placement.batch(run.mesh))
    state, _ = step(initial_state(run), next(batches))
    before, batch = jax.device_get(state), jax.device_get(batch_ := next(batches))
    state, measured = step(state, batch_)
    return before, jax.device_get((state, measured)), batch, run


def ones(params):
    return jax.tree.map(jnp.ones_like, params)


def assert_equal(found, want):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_update_starts_from_the_parameters_that_it_brings():
    before, (plain, _), _, _ = a_step(lambda params, _: Update(ones(params)))
    elsewhere = jax.tree.map(np.zeros_like, before.params)
    _, (moved, _), _, _ = a_step(lambda params, _: Update(ones(params), elsewhere))
    step_of = jax.tree.map(lambda after, start: after - start, plain.params, before.params)
    for a, b in zip(jax.tree.leaves(moved.params), jax.tree.leaves(step_of), strict=True):
        assert np.any(b)
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("descend", [False, True])
def test_an_optimizer_that_rests_forgets_nothing_and_counts_on(descend):
    before, (after, measured), _, _ = a_step(
        lambda params, _: Update(ones(params), params, jnp.bool_(descend))
    )
    counts = optax.tree_utils.tree_get_all_with_path(after.opt_state, "count")
    assert {int(count) for _, count in counts} == {2}
    traces = [optax.tree_utils.tree_get(state.opt_state, "trace") for state in (before, after)]
    if descend:
        assert measured.update_norm > 0
        assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, traces), strict=True))
    else:
        assert measured.update_norm == 0
        assert_equal(after.params, before.params)
        assert_equal(*traces)


def test_microbatches_give_the_mean_of_their_updates():
    def by_labels(params, batch):
        # Different in every microbatch, and no mean of a function of the whole batch.
        size = jnp.sum(batch["label"] ** 2.0)
        return Update(jax.tree.map(lambda w: jnp.full_like(w, size), params))

    _, (after, measured), batch, run = a_step(by_labels, "train.accumulation=4")
    labels = batch["label"].astype(float)
    sizes = [np.sum(labels[i::4] ** 2) for i in range(4)]
    assert len(set(sizes)) > 1
    count = sum(leaf.size for leaf in jax.tree.leaves(after.params))
    assert measured.gradient_norm == pytest.approx(np.mean(sizes) * count**0.5, rel=1e-5)
    assert measured.correct.shape == (run.network.num_exits,)


def test_microbatches_cannot_start_from_elsewhere():
    with pytest.raises(ValueError, match="pytree"):
        a_step(lambda params, _: Update(ones(params), params), "train.accumulation=4")
