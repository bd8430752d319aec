"""A step that does not fit is refused before anything is written, with what would fit."""

import re

import jax
import pytest
import tiny_run
from tiny_run import few_digits  # noqa: F401

from dfs_jax import main
from dfs_jax.distributed import placement
from dfs_jax.ops import memory
from dfs_jax.training import footprint, loop
from dfs_jax.training import step as step_module
from dfs_jax.training.run import prepare
from dfs_jax.training.state import initial_state
from dfs_jax.training.step import make_train_step

MESSAGE = (
    r"^error: a step of train.batch_size 16 needs (\S+) MB and there are (\S+) MB of memory; "
    r"train.batch_size (\d+) would fit; train.accumulation (\d+) keeps the batch "
    r"size and needs less$"
)


@pytest.fixture
def there_are(monkeypatch):
    """Sets the bytes that there seem to be on each device."""
    return lambda count: monkeypatch.setattr(memory, "available", lambda devices: count)


def refused(arguments, capsys):
    capsys.readouterr()
    assert main.main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    return told.err.strip().splitlines()[-1]


def test_a_step_that_does_not_fit_is_refused_with_a_batch_size_that_does(
    there_are, tmp_path, capsys
):
    there_are(80_000)
    workdir = tmp_path / "run"
    told = re.match(MESSAGE, refused(tiny_run.arguments(workdir), capsys))
    assert told
    assert float(told[1]) > float(told[2]) == 0.08
    assert not workdir.exists()
    fits = int(told[3])
    assert 4 < fits < 16
    assert 16 // int(told[4]) <= fits
    run = prepare(tiny_run.config(f"train.batch_size={fits}"))
    footprint.check_step(run, make_train_step(run))


def test_the_whole_mesh_divides_the_batch_size_that_fits(there_are, tmp_path, capsys):
    there_are(45_000)
    told = refused(tiny_run.arguments(tmp_path / "run", "mesh.data=2"), capsys)
    assert "there are 0.045 MB of memory of each device" in told
    fits = re.search(r"train.batch_size (\d+) would fit", told)
    assert int(fits[1]) % 2 == 0


def test_parameters_that_do_not_fit_are_refused_without_compiling(there_are, tmp_path, capsys):
    there_are(3_000)
    with tiny_run.compilations() as compiled:
        told = refused(tiny_run.arguments(tmp_path / "run"), capsys)
    assert not compiled
    assert re.search(r"parameters of vgg7_cifar100, .* whatever the batch size", told)
    for size in ("batch_size", "eval_batch_size"):
        there_are(10**6)
        told = refused(tiny_run.arguments(tmp_path / "run", f"train.{size}=999999"), capsys)
        assert f"train.{size} 999999" in told
    assert not (tmp_path / "run").exists()


def test_what_the_compiler_refuses_is_told_alike(there_are, monkeypatch, tmp_path, capsys):
    class Step:
        def lower(self, state, batch):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 99 lines\nof XLA")

    there_are(10**9)
    monkeypatch.setattr(step_module, "make_train_step", lambda run: Step())
    told = refused(tiny_run.arguments(tmp_path / "run"), capsys)
    assert told == (
        "error: a step of train.batch_size 16 does not fit into the 1 GB of memory; take a smaller "
        "train.batch_size"
    )
    assert not (tmp_path / "run").exists()


def test_where_memory_is_not_known_nothing_is_refused(there_are):
    there_are(None)
    run = prepare(tiny_run.config())
    footprint.check_step(run, make_train_step(run))


@pytest.mark.parametrize("changes", [(), ("data.mixup=1",), ("mesh.data=2", "mesh.fsdp=2")])
def test_the_checked_program_is_the_one_that_runs(changes):
    run = prepare(tiny_run.config(*changes))
    state, step = initial_state(run), make_train_step(run)
    batch = next(run.data.train.batches(0, placement.batch(run.mesh)))
    with tiny_run.compilations() as compiled:
        footprint.check_step(run, step)
        assert len(compiled) == 1
        jax.block_until_ready(step(state, batch))
        assert len(compiled) == 1


@pytest.mark.parametrize(
    "error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x\ny"), MemoryError()]
)
def test_memory_that_runs_out_later_ends_the_run_in_a_sentence(
    error, monkeypatch, tmp_path, capsys
):
    def evaluate(*_):
        raise error

    monkeypatch.setattr(loop, "count_split", evaluate)
    assert main.main(tiny_run.arguments(tmp_path / "run", "train.steps=2")) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: memory has run out; smaller batches need less (train.batch_size")


@pytest.mark.parametrize(
    ("needed", "held", "free", "fits"),
    [
        (1000, 200, 1000, 56),  # 700 of 800 for 64 examples
        (1000, 200, 500, 16),
        (1000, 200, 250, 0),
        (1000, 200, 100, 0),
        (200, 200, 100, 0),
    ],
)
def test_the_batch_size_that_fits(needed, held, free, fits):
    assert footprint.fitting_batch(64, 8, needed, held, free) == fits
