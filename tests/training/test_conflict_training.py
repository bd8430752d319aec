"""Conflict measured while training: the step does not notice, and a resume repeats nothing."""

import jax
import pytest
import tiny_run
from tiny_run import few_digits  # noqa: F401

from dfs_jax import config as configuration
from dfs_jax.config import ConfigError
from dfs_jax.distributed import placement
from dfs_jax.training import loop, metrics, progress
from dfs_jax.training.run import prepare
from dfs_jax.training.state import initial_state, restore
from dfs_jax.training.step import make_conflict_probe, make_train_step

ON = "train.conflict_every=4"
SEGMENTS = {"conflict/segment1/exit1_exit2", "conflict/exit1_exit2"}


def conflicts(workdir):
    """{(step, name): value}; a pair that occurs twice is a failure."""
    found = {}
    for record in metrics.read_metrics(workdir):
        for name, value in record.items():
            if name.startswith("conflict/"):
                assert (record["step"], name) not in found
                found[record["step"], name] = value
    return found


def final_state(config, workdir):
    return jax.device_get(restore(prepare(config), str(workdir))[1])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("measured")
    loop.train_and_evaluate(tiny_run.config(ON, "surgery.partition=False"), str(workdir))
    return workdir


def test_measuring_changes_no_bit_of_the_training(measured, tmp_path):
    off = tiny_run.config("train.conflict_every=0", "surgery.partition=False")
    loop.train_and_evaluate(off, str(tmp_path))
    assert not conflicts(tmp_path)
    states = [jax.tree.leaves(final_state(off, place)) for place in (measured, tmp_path)]
    for a, b in zip(*states, strict=True):
        assert a.tobytes() == b.tobytes()


def test_what_is_measured_and_when(measured):
    found = conflicts(measured)
    assert {step for step, _ in found} == {4, 8, 12}
    layers = {name for _, name in found} - SEGMENTS
    assert layers == {f"conflict/segment1/layer/{module}_0" for module in ("convs", "norms")}
    assert all(-1 <= value <= 1 and value != 0 for value in found.values())


def test_a_resumed_run_measures_the_same(measured, tmp_path):
    config = tiny_run.config(ON, "surgery.partition=False")
    original = progress.Reporter.step_done

    def ending(self, step, *arguments):
        if step == 9:
            raise KeyboardInterrupt
        return original(self, step, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.Reporter, "step_done", ending)
        with pytest.raises(KeyboardInterrupt):
            loop.train_and_evaluate(config, str(tmp_path))
    loop.train_and_evaluate(config, str(tmp_path))
    assert conflicts(tmp_path) == conflicts(measured)


@pytest.mark.slow
def test_surgery_keeps_two_exits_apart(tmp_path):
    """On two devices, of the first of two microbatches."""
    own = (ON, "train.steps=4", "train.accumulation=2", "mesh.data=2")
    loop.train_and_evaluate(tiny_run.config(*own), str(tmp_path))
    found = conflicts(tmp_path)
    assert {step for step, _ in found} == {4}
    assert {name for _, name in found} >= SEGMENTS
    assert not any(found.values())


def test_a_number_of_steps_that_cannot_be():
    with pytest.raises(ConfigError, match=r"train\.conflict_every"):
        prepare(tiny_run.config("train.conflict_every=-1"))


def test_measuring_costs_a_few_steps():
    """Less than 5 of 100 steps' work, so less than 5 % of the training at the default interval."""
    run = prepare(tiny_run.config())
    state = initial_state(run)
    batch = next(run.data.train.batches(0, placement.batch(run.mesh)))

    def work(function):
        return function.lower(state, batch).compile().cost_analysis()["flops"]

    assert configuration.default().train.conflict_every == 100
    assert work(make_conflict_probe(run)) < 3 * work(make_train_step(run))
