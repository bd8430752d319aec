"""Every method of the presets learns the digits, and goes on after an interruption."""

import functools

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import few_digits  # noqa: F401

from dfs_jax import config as configuration
from dfs_jax.config import presets
from dfs_jax.training import loop, progress
from dfs_jax.training.run import prepare
from dfs_jax.training.state import initial_state, restore

pytestmark = pytest.mark.slow

# Four exits, so that the losses of BDL do not reach everything.
NETWORK = ("model.name=vgg7_cifar100", "model.options.widths=((12,12),(16,16))")
STATEFUL = {
    "meta_gf": ("gradients.options.phase_steps=4",),  # cycles of 12 steps
    "nash_mtl": (),
    "wpn": ("gradients.options.hidden=10",),
}


def config(preset, *own, network=tiny_run.NETWORK):
    spec = f"{tiny_run.DIGITS}:{preset}"
    return configuration.load(spec, tiny_run.overrides(*own, network=network))


@pytest.mark.parametrize("preset", presets.METHODS)
def test_the_deepest_exit_learns(preset):
    own = ["gradients.options.phase_steps=5"] if preset == "meta_gf" else []
    c = config(preset, "train.steps=150", *own, network=NETWORK)
    losses = tiny_run.losses_of(prepare(c))
    assert losses.shape == (150, 4)
    assert np.isfinite(losses).all()
    # Means over whole cycles of Meta-GF.
    first, last = losses[:25].mean(0), losses[-25:].mean(0)
    assert last[-1] < 0.6 * first[-1], (first, last)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The final state of a method's uninterrupted run."""

    @functools.cache
    def of(preset):
        c, workdir = stateful(preset), str(tmp_path_factory.mktemp(preset))
        loop.train_and_evaluate(c, workdir)
        return jax.device_get(restore(prepare(c), workdir)[1])

    return of


def stateful(preset):
    return config(preset, "train.checkpoint_every=2", *STATEFUL[preset])


@pytest.mark.parametrize(
    ("preset", "step"), [("meta_gf", 7), ("meta_gf", 11), ("nash_mtl", 7), ("wpn", 7)]
)
def test_a_method_with_a_state_goes_on_to_the_same_bits(
    preset, step, straight, tmp_path, monkeypatch
):
    """Meta-GF is left amid the second exit's phase, and amid the fusion."""
    c, workdir = stateful(preset), str(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(progress.Reporter, "step_done", _ending(step))
        with pytest.raises(KeyboardInterrupt):
            loop.train_and_evaluate(c, workdir)
    run = prepare(c)
    reached, state = restore(run, workdir)
    assert reached == step - 1
    # Losing the state would be noticed.
    assert not _same_bits(state.method_state, initial_state(run).method_state)
    loop.train_and_evaluate(c, workdir)
    assert _same_bits(jax.device_get(restore(run, workdir)[1]), straight(preset))


def _same_bits(one, other):
    pairs = zip(*(jax.tree.leaves(jax.device_get(tree)) for tree in (one, other)), strict=True)
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)


def _ending(step):
    """A `Reporter.step_done` that ends the run in step `step`."""
    original = progress.Reporter.step_done

    def step_done(self, at, *arguments):
        if at == step:
            raise KeyboardInterrupt
        return original(self, at, *arguments)

    return step_done
