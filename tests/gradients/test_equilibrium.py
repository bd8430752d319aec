"""Gradient equilibrium against a network whose features really are scaled."""

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dfs_jax import gradients, models
from dfs_jax.gradients import Problem
from dfs_jax.objectives import Objective
from dfs_jax.surgery import Surgery

SURGERIES = {
    "whole": Surgery(partition=False),
    "own": Surgery(beta=0.5),
    "all": Surgery(beta=0.34, exit_gradient="all"),
    "zeros": Surgery(beta=0.5, referencing=False),
}


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def measured(problem, params):
    """What the method makes of the problem, the plain pass, and joint training's gradient."""
    method = gradients.create("equilibrium")

    @tiny.jitted
    def run(params):
        return (
            method.apply(problem, params, method.init(params), jax.random.key(0)),
            problem.losses(params)[1],
            jax.grad(lambda p: problem.losses(p)[0].sum())(params),
        )

    return run(params)


def masks(surgery, channels):
    """Channels that the next segment and the exit train, as 0 or 1."""
    if not surgery.partition:
        return np.ones(channels), np.ones(channels)
    shared = (np.arange(channels) < round(surgery.beta * channels)).astype(float)
    both = surgery.referencing and surgery.exit_gradient == "all"
    return shared, np.ones(channels) if both else 1 - shared


def seen(surgery, y, mask):
    """What the reader of the channels `mask` is given of y."""
    return y * mask if surgery.partition and not surgery.referencing else y


def features(params, images, surgery):
    """The features that are cut, by a first pass in which nothing is scaled."""
    found = []

    def cross(i, y):
        found.append(y)
        return tuple(seen(surgery, y, mask) for mask in masks(surgery, y.shape[1]))

    by_hand.logits(params, images, cross, np)
    return found


def scaled(start, surgery):
    """A `cross` under which a feature moves away from `start` by the method's shares only.

    At `start` nothing changes. Moving by the share s is what multiplies a gradient by s, and
    s = 0 is stop_gradient.
    """
    count = len(start) + 1

    def cross(i, y):
        to_next, to_exit = masks(surgery, y.shape[1])
        deeper, own = (count - i - 1) / (count - i), 1 / (count - i)
        return tuple(
            seen(surgery, start[i], mask) + factor * mask * (y - start[i])
            for factor, mask in ((deeper, to_next), (own, to_exit))
        )

    return cross


@pytest.mark.parametrize("name", SURGERIES)
def test_gradient_is_the_slope_of_a_scaled_network(name):
    # The second feature of `tiny` is not cut, and so not scaled, as MSDNet's finer scales.
    surgery = SURGERIES[name]
    net = tiny.network(surgery, dtype=jnp.float64)
    params, problem = tiny.problem(net)
    (update, aux, state), unscaled, _ = measured(problem, params)
    plain = jax.tree.map(np.asarray, params)
    images, labels = (np.asarray(problem.batch[k]) for k in ("image", "label"))
    start = features(plain, images, surgery)

    def total(params):
        answers = by_hand.logits(params, images, scaled(start, surgery), np)
        return by_hand.example_losses(answers, labels, np).mean(0).sum()

    np.testing.assert_allclose(aux.losses.sum(), total(plain), rtol=1e-12)
    tiny.assert_close(aux, unscaled, rtol=1e-13, atol=1e-15)
    tiny.assert_close(update.gradients, by_hand.slopes(total, plain), rtol=1e-7, atol=1e-8)
    assert state == ()


def test_every_loss_counts_alike_in_every_segment():
    # The factors of a loss that reaches segment k multiply to 1 / (N - k), wherever it began.
    net = models.create_model(
        "vgg7_cifar100",
        num_classes=3,
        surgery=SURGERIES["whole"],
        dtype=jnp.float64,
        dropout_rate=0.5,
        widths=((5, 6), (4, 4)),
    )
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(6, 4, 4, 2))),
        "label": jnp.asarray(rng.integers(0, 3, 6)),
    }
    variables = tiny.jitted(net.init)(jax.random.key(1), batch["image"])
    problem = Problem(net, Objective(), batch, variables["batch_stats"], jax.random.key(2))
    (update, aux, _), unscaled, joint = measured(problem, variables["params"])
    tiny.assert_close(aux, unscaled, rtol=1e-12, atol=1e-14)  # dropout is on
    want = {
        name: tensor / (1 if name.startswith("heads") else 4 - tiny.segment_of(name))
        for name, tensor in tiny.flat(joint).items()
    }
    tiny.assert_close(update.gradients, want, rtol=1e-10, atol=1e-13)
