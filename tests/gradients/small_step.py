"""The training step on the network of `tiny.py`, without a configuration's data."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from dfs_jax import config as configuration
from dfs_jax import gradients
from dfs_jax.data.pipeline import Spec
from dfs_jax.distributed import placement
from dfs_jax.models import inputs
from dfs_jax.objectives import Objective
from dfs_jax.training import optim
from dfs_jax.training.run import Run
from dfs_jax.training.state import initial_state
from dfs_jax.training.step import make_train_step

RATE, MOMENTUM, DECAY = 0.1, 0.9, 0.01


def make_run(name, *, net=None, objective=Objective(), devices=1, **options):  # noqa: B008
    """A run of gradient method `name` in float64: SGD with momentum and weight decay."""
    net = net or tiny.network(dtype=jnp.float64)
    c = configuration.default()
    c.mesh.data = devices
    c.optimizer.learning_rate, c.optimizer.momentum = RATE, MOMENTUM
    c.optimizer.weight_decay, c.optimizer.schedule = DECAY, "constant"
    optimizer, schedule = optim.create_optimizer(c, steps_per_epoch=1, total_steps=1)
    method = gradients.create(name, num_exits=net.num_exits, **options)
    method.check(net, objective)
    spec = Spec("made", inputs.images((2, 2, 1)), 3, (), 1, 0, 0)
    data = SimpleNamespace(spec=spec)
    mesh = placement.create_mesh(c)
    return Run(c, data, net, objective, method, optimizer, schedule, mesh, 1.0, 1)


def batch(step, size=16):
    """The batch of a step: NumPy images (B, 2, 2, 1) and labels (B,) of three classes."""
    rng = np.random.default_rng(step)
    labels = rng.integers(0, 3, size)
    images = rng.normal(size=(size, 2, 2, 1)) + labels[:, None, None, None]
    return {"image": images, "label": labels}


def states(run, size=16):
    """The state before the first step and after every one, with the losses (N,) of that step."""
    state, step = initial_state(run), make_train_step(run)
    yield jax.device_get(state), None
    for at in itertools.count():
        placed = jax.device_put(batch(at, size), placement.batch(run.mesh))
        state, measured = step(state, placed)
        yield jax.device_get((state, measured.losses))
