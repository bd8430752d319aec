"""The training command: what a person sees of bad input, and runs that are killed."""

import os
import random
import re
import shutil

import jax
import numpy as np
import processes
import pytest
import tiny_run
from tiny_run import few_digits  # noqa: F401

from dfs_jax import data, main
from dfs_jax.training import checkpoint, lock, loop, metrics
from dfs_jax.training import workdir as workdirs
from dfs_jax.training.run import prepare
from dfs_jax.training.state import restore


def snapshot(path):
    """Content and time of change of everything below `path`; None if there is nothing."""
    if not path.exists():
        return None
    return {
        str(p): (p.stat().st_mtime_ns, p.stat().st_mode, p.is_file() and p.read_bytes())
        for p in [path, *path.rglob("*")]
    }


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A workdir with four finished steps, at a constant learning rate; not to be changed."""
    workdir = tmp_path_factory.mktemp("used")
    config = tiny_run.config("train.steps=4", "optimizer.schedule=constant")
    loop.train_and_evaluate(config, str(workdir))
    return workdir


def refusal(arguments, capsys, *untouched):
    """The message with which the command refuses `arguments`.

    Nothing is compiled, and nothing below the directories `untouched` changes.
    """
    before = [snapshot(path) for path in untouched]
    capsys.readouterr()
    with tiny_run.compilations() as compiled:
        try:
            status = main.main(arguments)
        except SystemExit as error:  # how argparse ends
            status = error.code
    assert status == 2
    assert not compiled
    assert [snapshot(path) for path in untouched] == before
    told = capsys.readouterr()
    assert told.out == ""
    *usage, message = told.err.strip().splitlines()
    assert "error: " in message
    assert not usage or usage[0].startswith("usage: ")
    assert "Traceback" not in told.err
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("model.name=vgg8", "unknown network 'vgg8'; known: .*vgg7_cifar100"),
        ("surgery.beta=1.5", "beta"),
        ("surgery.beta=-1e-9", "beta"),
        ("optimizer.learning_rat=1", r"did you mean 'learning_rate'\?"),
        ("optimzer.learning_rate=1", r"did you mean 'optimizer'\?"),
        ("train.batch_size=big", "config.train.batch_size: 'big' is not a value of type int"),
        ("train.batch_size=12 mesh.data=8", "batch_size 12 is not divisible by the 8 devices"),
        ("model.options.x=1", "config.model.options.x: there is no such field; known: "),
        ("optimizer.name=adamn", "known: .*sgd"),
        ("optimizer.schedule=linear", "known: .*multistep.*cosine"),
        ("train.epochs=3", "exactly one of train.epochs and train.steps"),
        ("train.steps=0", "exactly one of train.epochs and train.steps"),
        ("train.best_metric=eval/top1", "eval/mean/top1"),
        ("mesh.data=9", "there are 8 cpu devices"),
        ("data.name=mnist", "known: "),
        ("gradients.name=sum", "known: "),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence(changes, message, used, tmp_path, capsys):
    fresh = tmp_path / "run"
    changes = changes.split()
    told = refusal(tiny_run.arguments(fresh, *changes), capsys, tmp_path)
    assert re.search(message, told)
    assert not fresh.exists()
    # Where there is a run already it stays as it is.
    refusal(tiny_run.arguments(used, *changes), capsys, used)


def test_images_that_are_too_small_are_refused(tmp_path, capsys):
    arguments = tiny_run.arguments(tmp_path, "model.name=vit_tiny_patch16", network=())
    assert "at least 16x16 pixels" in refusal(arguments, capsys, tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (f"{tiny_run.DIGITS}:foo", "'foo' is unknown; networks: msdnet"),
        (f"{tiny_run.DIGITS}:msdnet,msdnet", "two networks"),
        (f"{tiny_run.DIGITS}:dfs,joint", "two methods, 'dfs' and 'joint'"),
        ("configs/none.py", "there is no file 'configs/none.py'"),
    ],
)
def test_a_bad_configuration_file_or_preset_is_refused(spec, message, tmp_path, capsys):
    arguments = ["--config", spec, "--workdir", str(tmp_path / "run")]
    assert message in refusal(arguments, capsys, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", tiny_run.DIGITS], "required: --workdir"),
        (["--workdir", "{}"], "required: --config"),
        (["--config", tiny_run.DIGITS, "--workdir", "{}", "--step", "3"], "--step 3"),
    ],
)
def test_flags_that_are_missing_or_unknown(arguments, message, tmp_path, capsys):
    arguments = [a.format(tmp_path / "run") for a in arguments]
    assert message in refusal(arguments, capsys, tmp_path)


def test_a_workdir_without_a_name_is_refused(tmp_path, capsys):
    assert "give the folder of the run" in refusal(tiny_run.arguments(""), capsys, tmp_path)


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_a_workdir_that_cannot_be_written_is_refused(below, tmp_path, capsys):
    # Not by permissions, which do not bind root: there is a file where a directory must be.
    (tmp_path / "file").write_text("a file")
    workdir = tmp_path / "file" / below
    message = refusal(tiny_run.arguments(workdir), capsys, tmp_path)
    assert message.startswith(f"error: --workdir: cannot write to {workdir}")


def test_a_workdir_of_another_experiment_names_the_fields(used, capsys):
    changes = ["surgery.beta=0.25", "seed=3", "data.crop_padding=0", "optimizer.momentum=0.5"]
    message = refusal(tiny_run.arguments(used, *changes), capsys, used)
    for line in (
        "surgery.beta: 0.5 there, 0.25 now",
        "seed: 0 there, 3 now",
        "data.crop_padding: 1 there, 0 now",
        "optimizer.momentum: 0.9 there, 0.5 now",
        "optimizer.schedule: 'constant' there, 'cosine' now",
    ):
        assert line in message
    assert "train.log_every" not in message


def test_a_workdir_that_is_past_the_end_is_refused(used, capsys):
    changes = ["optimizer.schedule=constant", "train.steps=3"]
    message = refusal(tiny_run.arguments(used, *changes), capsys, used)
    assert "is at step 4 already, beyond the 3 steps" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"name": "vgg8"}}'])
def test_a_workdir_with_a_broken_configuration_is_refused(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "train/loss": 1.0}\n')
    message = refusal(tiny_run.arguments(tmp_path), capsys, tmp_path)
    assert f"{tmp_path / 'config.json'} is not a saved configuration" in message


@pytest.mark.parametrize("changes", [(), ("seed=1",), ("model.options.widths=((8,),(8,))",)])
def test_checkpoints_without_a_configuration_are_refused(changes, used, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(used, workdir)
    (workdir / "config.json").unlink()
    message = refusal(tiny_run.arguments(workdir, *changes), capsys, tmp_path)
    assert f"{workdir} has a checkpoint of step 4 and no config.json" in message


def test_a_second_run_is_refused_and_reading_goes_on(used, capsys):
    arguments = tiny_run.arguments(used, "train.steps=4", "optimizer.schedule=constant")
    with lock.held(str(used)):
        message = refusal(arguments, capsys, used)
        assert restore(prepare(workdirs.saved_config(str(used))), str(used))[0] == 4
    assert f"{used} is in use; process {os.getpid()} on " in message


def test_a_folder_with_the_name_of_a_later_step_is_no_end(used, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(used, workdir)
    (workdir / "checkpoints" / "90").mkdir()
    arguments = tiny_run.arguments(workdir, "train.steps=4", "optimizer.schedule=constant")
    assert main.main(arguments) == 0
    assert "test accuracy" in capsys.readouterr().out


def test_a_run_prints_its_table_and_may_be_made_longer(used, tmp_path, capsys):
    arguments = tiny_run.arguments(
        tmp_path, "train.steps=2", "optimizer.schedule=constant", "mesh.data=2"
    )
    assert main.main(arguments) == 0
    told = capsys.readouterr()
    rows = [line.split() for line in told.out.splitlines() if "%" in line]
    assert [row[:-2] for row in rows] == [["exit", "1"], ["exit", "2"], ["ensemble"]]
    assert "step 2/2 (100.0%)" in told.err
    assert "ETA" in told.err
    # More steps, and other devices, are the same experiment.
    arguments = tiny_run.arguments(tmp_path, "train.steps=4", "optimizer.schedule=constant")
    assert main.main(arguments) == 0
    assert {r["step"] for r in metrics.read_metrics(tmp_path)} == {2, 4}
    # Finished: nothing is trained, the table is printed again.
    capsys.readouterr()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert main.main(arguments) == 0
    told = capsys.readouterr()
    assert "test accuracy" in told.out
    assert "step " not in told.err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_run_that_has_to_end_has_status_1(tmp_path, capsys, monkeypatch):
    def load(config):
        found = tiny_run.load(config)
        batches = found.train.batches

        def broken(start, sharding=None):
            for batch in batches(start, sharding):
                with jax.transfer_guard("allow"):
                    image = batch["image"] * np.nan
                yield {**batch, "image": image}

        found.train.batches = broken
        return found

    monkeypatch.setitem(data._LOADERS, "digits", load)
    assert main.main(tiny_run.arguments(tmp_path)) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: step 1: the loss of exit 1, 2 is not finite")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def by_step_and_name(workdir):
    found = {}
    for record in metrics.read_metrics(workdir):
        step = record.pop("step")
        for name, value in record.items():
            assert (step, name) not in found, f"{name} of step {step} occurs twice"
            if name not in tiny_run.SPEED:
                found[step, name] = value
    return found


@pytest.mark.slow
def test_killed_again_and_again_a_run_ends_with_the_same_bits(tmp_path):
    own = ("train.checkpoint_every=10", "train.eval_every=20", "train.log_every=5")
    own += ("optimizer.schedule=constant", f"train.compilation_cache={tmp_path / 'programs'}")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    seed = random.randrange(1000)
    print(f"moments from seed {seed}")
    moments, reached = random.Random(seed), 0
    for first, last in ((1, 9), (15, 60)):
        step = reached + moments.randint(first, last)
        words = ["-m", "dfs_jax.main", *tiny_run.arguments(killed, *own, "train.steps=1000000")]
        processes.killed_when(
            lambda step=step: processes.reached(killed) >= step,
            words,
            tmp_path / "log",
            moments.uniform(0, 0.15),
        )
        reached = processes.reached(killed)
        by_step_and_name(killed)
    assert checkpoint.newest_step(killed / "checkpoints")

    config = tiny_run.config(*own, f"train.steps={reached + 15}")
    ends = [loop.train_and_evaluate(config, str(workdir)) for workdir in (killed, straight)]
    assert ends[0] == ends[1]
    assert by_step_and_name(killed) == by_step_and_name(straight)
    found, want = (restore(prepare(config), str(workdir)) for workdir in (killed, straight))
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for a, b in zip(*(jax.tree.leaves(jax.device_get(x)) for x in (found, want)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    # Finished: the same command again.
    before = snapshot(killed / "checkpoints"), (killed / "metrics.jsonl").read_bytes()
    assert loop.train_and_evaluate(config, str(killed)) == ends[0]
    assert (snapshot(killed / "checkpoints"), (killed / "metrics.jsonl").read_bytes()) == before
