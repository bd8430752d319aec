"""What large batches need: LAMB, LARS, warm-up shapes and the linear scaling rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dfs_jax import config
from dfs_jax.config import ConfigError
from dfs_jax.training import optim

RATE, DECAY, MOMENTUM = 0.1, 0.02, 0.9


def updated(gradients, start, **optimizer):
    """The parameters after steps with `gradients`, in float64."""
    c = config.default()
    c.optimizer.update(
        {"learning_rate": RATE, "weight_decay": DECAY, "schedule": "constant"} | optimizer
    )
    with jax.enable_x64(True):
        tx, _ = optim.create_optimizer(c, steps_per_epoch=1, total_steps=9)
        params = jax.tree.map(jnp.asarray, start)
        state = tx.init(params)
        for g in gradients:
            updates, state = jax.jit(tx.update)(jax.tree.map(jnp.asarray, g), state, params)
            params = optax.apply_updates(params, updates)
        return jax.device_get(params)


@pytest.fixture
def problem():
    rng = np.random.default_rng(3)
    start = {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}
    return start, [{k: rng.normal(size=p.shape) for k, p in start.items()} for _ in range(4)]


def norm(x):
    return np.sqrt((x**2).sum())


def test_lamb_is_adam_at_the_scale_of_each_array(problem):
    start, gradients = problem
    found = updated(gradients, start, name="lamb", momentum=MOMENTUM)
    for name, p in start.items():
        first, second = np.zeros(p.shape), np.zeros(p.shape)
        for t, g in enumerate((g[name] for g in gradients), 1):
            first = MOMENTUM * first + (1 - MOMENTUM) * g
            second = 0.999 * second + 0.001 * g**2
            direction = (first / (1 - MOMENTUM**t)) / (
                np.sqrt(second / (1 - 0.999**t)) + 1e-6
            ) + DECAY * p
            p = p - RATE * norm(p) / norm(direction) * direction
        np.testing.assert_allclose(found[name], p, rtol=0, atol=1e-12)


def test_lars_is_sgd_at_the_scale_of_each_matrix(problem):
    start, gradients = problem
    found = updated(gradients, start, name="lars", momentum=MOMENTUM)
    for name, p in start.items():
        velocity = np.zeros(p.shape)
        for g in (g[name] for g in gradients):
            if name == "kernel":
                g = g + DECAY * p
                g = 0.001 * norm(p) / norm(g) * g
            velocity = MOMENTUM * velocity + RATE * g
            p = p - velocity
        np.testing.assert_allclose(found[name], p, rtol=0, atol=1e-12)


def test_lamb_refuses_nesterov(problem):
    start, gradients = problem
    with pytest.raises(ConfigError, match="nesterov = True has no meaning for lamb"):
        updated(gradients, start, name="lamb", nesterov=True)


def test_cosine_warmup_rises_from_zero_to_the_peak():
    c = config.default()
    c.optimizer.update(
        {"learning_rate": 0.4, "schedule": "constant", "warmup_epochs": 2.0, "warmup": "cosine"}
    )
    schedule = optim.create_schedule(c, steps_per_epoch=10, total_steps=100)
    found = [float(schedule(step)) for step in (0, 5, 10, 20, 60)]
    half = 0.2 * (1 - np.cos(np.pi / 4))
    np.testing.assert_allclose(found, [0, half, 0.2, 0.4, 0.4], rtol=1e-6)


def test_an_unknown_warmup_lists_the_known_ones():
    c = config.default()
    c.optimizer.warmup = "slow"
    with pytest.raises(ConfigError, match="'slow' is unknown; known: linear, cosine"):
        optim.create_schedule(c, 1, 1)


def test_linear_scaling_rule():
    c = config.default()
    c.optimizer.learning_rate, c.train.batch_size = 0.1, 1024
    config.scale_learning_rate(c, 256)
    assert c.optimizer.learning_rate == pytest.approx(0.4)
    with pytest.raises(ConfigError, match="must be positive"):
        config.scale_learning_rate(c, 0)
