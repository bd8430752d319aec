"""A run that takes a second: a small network on a few digits, without TFDS."""

import contextlib
import functools
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src import monitoring
from jax.experimental.compilation_cache import compilation_cache
from sklearn import datasets

from dfs_jax import config as configuration
from dfs_jax import data
from dfs_jax.data.input import in_memory
from dfs_jax.distributed import placement
from dfs_jax.training import counts, loop
from dfs_jax.training import run as run_module
from dfs_jax.training import state as state_module
from dfs_jax.training import step as step_module
from dfs_jax.training.state import initial_state
from dfs_jax.training.step import make_programs, make_train_step

DIGITS = str(Path(__file__).parents[1] / "configs" / "digits.py")
TRAIN, HELD_OUT, TEST = 90, 37, 53  # divisible by neither batch nor device count

NETWORK = (
    "model.name=vgg7_cifar100",
    "model.options.widths=((6,),(4,))",
    "model.options.dropout_rate=0.5",
)
SETTINGS = (
    "train.epochs=0",
    "train.steps=12",
    "train.batch_size=16",
    "train.eval_batch_size=16",
    "train.eval_every=4",
    "train.checkpoint_every=2",
    "train.log_every=2",
    "train.compilation_cache=",
    "optimizer.warmup_epochs=0",
    "optimizer.learning_rate=0.05",
    "mesh.data=1",
)

# Metrics that depend on the clock.
SPEED = {
    "train/images_per_second",
    "train/images_per_second_per_device",
    "train/step_seconds",
    "train/data_wait",
}


def overrides(*own, network=NETWORK):
    """What `config.load` takes; `own` come last and win."""
    return [*network, *SETTINGS, *own]


def config(*own, network=NETWORK):
    """The digits configuration of a tiny run."""
    return configuration.load(DIGITS, overrides(*own, network=network))


def arguments(workdir, *own, network=NETWORK):
    """The same as arguments of the training command."""
    changes = [f"--config.{item}" for item in overrides(*own, network=network)]
    return ["--config", DIGITS, "--workdir", str(workdir), *changes]


@functools.cache
def digits():
    """All of scikit-learn's digits: (N, 8, 8, 1) uint8 and labels (N,)."""
    found = datasets.load_digits()
    return np.round(found.images * (255 / 16)).astype(np.uint8)[..., None], found.target


def load(config):
    """Serves some of the digits in place of `dfs_jax.data.digits.load`."""
    images, labels = digits()
    sizes = np.cumsum([TRAIN + HELD_OUT, TEST])
    outside, test, _ = (
        (x, y) for x, y in zip(np.split(images, sizes), np.split(labels, sizes), strict=True)
    )
    train, validation = in_memory.hold_out(outside, min(config.data.validation_size, HELD_OUT))
    return in_memory.from_arrays(
        config,
        name="digits",
        train=train,
        validation=validation,
        test=test,
        class_names=[str(i) for i in range(10)],
    )


def once(make, key):
    """`make(run, …)` that makes the same thing for every run of the same `key(run)`."""
    made = {}

    def of(run, *rest):
        found = key(run)
        if found not in made:
            made[found] = make(run, *rest)
        return made[found]

    return of


def pieces(run):
    """What the functions of a run are made of."""
    spec = repr(run.data.spec)
    return configuration.to_json(run.config), spec, run.network, run.method, run.optimizer


@functools.cache
def traced_once():
    """Replacements (module, name, function) with which runs of one configuration share functions.

    So they are traced and compiled once, as they would be in one run.
    """
    first = once(lambda run: run, lambda run: pieces(run)[:2])

    def prepare(config, workdir=None):
        run = run_module.prepare(config, workdir)
        return first(run)._replace(config=run.config, data=run.data)

    return (
        (loop, "prepare", prepare),
        (step_module, "make_train_step", once(make_train_step, pieces)),
        (loop, "batch_counter", functools.cache(counts.batch_counter)),
        (state_module, "_creator", once(state_module._creator, pieces)),
        (state_module, "_shapes", once(state_module._shapes, pieces)),
    )


@pytest.fixture(scope="module", autouse=True)
def few_digits(tmp_path_factory):
    """Import it into a module of tests to have `load` serve the digits there.

    What runs of one configuration compile is traced once, and kept on disk for all modules.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all workers
    kept = {
        "jax_compilation_cache_dir": str(folder / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in kept}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data._LOADERS, "digits", load)
        for replaced in traced_once():
            patch.setattr(*replaced)
        for values in (kept, before):
            for name, value in values.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()  # JAX looks at its settings only once
            if values is kept:
                yield


def losses_of(run):
    """Losses (S, N) of the N exits in each of the run's S steps, nothing else done."""
    state, programs = initial_state(run), make_programs(run)
    batches = run.data.train.batches(0, placement.batch(run.mesh))
    found = []
    for step in range(run.total_steps):
        if step in programs:
            phase = programs[step]
            state = phase.enter(state)
        state, measured = phase.step(state, next(batches))
        found.append(jax.device_get(measured.losses))
    return np.array(found)


@contextlib.contextmanager
def compilations():
    """A list that grows with every program that is compiled, or fetched compiled."""
    compiled = []

    def listen(event, _, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        monitoring.unregister_event_duration_listener(listen)
