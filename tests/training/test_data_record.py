"""A run meets its own data again, or is refused: what it notes, and who compares it."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
import tiny_run
from jax.experimental import multihost_utils
from PIL import Image
from tiny_run import few_digits  # noqa: F401

from dfs_jax import evaluate, main
from dfs_jax.config import ConfigError
from dfs_jax.early_exit import export
from dfs_jax.early_exit.bundle import EarlyExit
from dfs_jax.interop.__main__ import main as interop_main
from dfs_jax.training import data_record
from dfs_jax.training import workdir as workdirs
from dfs_jax.training.run import prepare

FOLDER = (
    "data.name=folder",
    "data.image_size=8",
    "data.channels=1",
    "data.streams=4",
    "data.validation_size=6",
    "train.batch_size=8",
    "train.eval_batch_size=8",
    "train.steps=2",
    "train.eval_every=2",
    "train.checkpoint_every=2",
)


def changes(images, *own):
    return (*FOLDER, f"data.dir={images}", *own)


def small_tree(root, sizes):
    """Images of 8x8 pixels: a class is dark or bright."""
    for (split, label), count in sizes.items():
        folder = root / split / label
        folder.mkdir(parents=True)
        for i in range(count):
            level = 40 + i if label == "cat" else 200 - i
            Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images, and a run that has learned from them; not to be changed."""
    root = tmp_path_factory.mktemp("made")
    sizes = {("train", "ant"): 16, ("train", "cat"): 16, ("test", "ant"): 4, ("test", "cat"): 4}
    small_tree(root / "images", sizes)
    assert main.main(tiny_run.arguments(root / "run", *changes(root / "images"))) == 0
    return root


@pytest.fixture
def own(made, tmp_path):
    """A copy of images and run, the images where the run has them no more."""
    return shutil.copytree(made, tmp_path / "own")


def again(own, *fields):
    """The run as the training command prepares it, going on."""
    return prepare(tiny_run.config(*changes(own / "images", *fields)), str(own / "run"))


def read_by_commands(own, out):
    """Exit status of each command that takes a workdir alone."""
    given = ["--workdir", str(own / "run"), "--data_dir", str(own / "images")]
    return [
        evaluate.main([*given, "--out", str(out / "results")]),
        export.main([*given, "--out", str(out / "bundle"), "--batch-size", "1"]),
        interop_main([*given, "--export", str(out / "weights.npz")]),
    ]


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_workdir_has_the_record_and_the_full_place(made):
    noted = json.loads((made / "run" / "data.json").read_text())
    assert noted["classes"] == ["ant", "cat"]
    counts = {k: sum(n for n, _ in v["parts"].values()) for k, v in noted["splits"].items()}
    assert counts == {"train": 26, "validation": 6, "test": 8}
    assert len(noted["held_out"]["validation"]) == 6
    (mean,), (std,) = noted["statistics"]
    assert 0 < mean < 1
    assert std > 0
    assert not noted["of_before"]


def test_the_place_of_the_data_is_saved_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for typed, saved in (
        ("images", f"{tmp_path}/images"),
        ("~/images", "/home/me/images"),
        ("gs://bucket/images", "gs://bucket/images"),
    ):
        config = tiny_run.config(f"data.dir={typed}")
        workdirs.create(config, "run")
        assert workdirs.saved_config("run").data.dir == saved
        assert config.data.dir == os.path.expanduser(typed)
    assert workdirs.saved_config("run", "images").data.dir == f"{tmp_path}/images"


def test_moved_data_are_given_again_to_every_command(made, own, tmp_path, capsys, caplog):
    shutil.rmtree(made / "images")
    try:
        assert evaluate.main(["--workdir", str(own / "run")]) == 2
        refused = capsys.readouterr().err
    finally:
        shutil.copytree(own / "images", made / "images")
    assert f"there is no folder {made}/images/train" in refused
    assert "if the data have moved, tell where they are with --data_dir DIR" in refused
    caplog.clear()
    assert read_by_commands(own, tmp_path) == [0, 0, 0]
    assert "changed" not in caplog.text
    noted = json.loads((own / "run" / "data.json").read_text())
    bundle = EarlyExit.load(tmp_path / "bundle")
    assert bundle.preprocessing.image_shape == (8, 8, 1)
    assert [list(x) for x in (bundle.preprocessing.mean, bundle.preprocessing.std)] == noted[
        "statistics"
    ]
    assert list(bundle.labels) == ["ant", "cat"]


def test_a_renamed_class_is_refused_by_all_and_nothing_is_changed(own, tmp_path, capsys):
    for split in ("train", "test"):
        (own / "images" / split / "cat").rename(own / "images" / split / "Acat")
    before = contents(own)
    assert main.main(tiny_run.arguments(own / "run", *changes(own / "images"))) == 2
    statuses = read_by_commands(own, tmp_path)
    told = capsys.readouterr().err.splitlines()
    refusals = [line for line in told if line.startswith("error: ")]
    assert statuses == [2, 2, 2]
    assert len(refusals) == 4
    for line in refusals:
        assert "class 'cat' is gone; class 'Acat' is new" in line
    assert contents(own) == before
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: shutil.copytree(i / "train/ant", i / "train/bee"), r"class 'bee' is new"),
        (lambda i: shutil.rmtree(i / "train/ant"), r"class 'ant' is gone"),
        (lambda i: (i / "test/cat/0.png").unlink(), r"test split, cat: 3 examples, 4 before"),
        (
            lambda i: shutil.copy(i / "test/ant/0.png", i / "test/ant/more.png"),
            r"test split, ant: 5 examples, 4 before",
        ),
        (
            lambda i: (i / "test/ant/0.png").write_bytes(b"other"),
            r"test split, ant: 4 examples as before, of other names or sizes",
        ),
        (lambda i: (i / "test").rename(i / "val"), r"came from 'test', and comes from 'val' now"),
        (lambda i: shutil.rmtree(i / "test"), r"came from 'test', and comes from 'train' now"),
    ],
)
def test_other_classes_and_measured_images_are_refused(own, change, message):
    change(own / "images")
    with pytest.raises(ConfigError, match=rf"own/images are not those of this run: .*{message}"):
        again(own)


def test_training_images_may_come_and_go_and_that_is_told(own, caplog):
    held = json.loads((own / "run" / "data.json").read_text())["held_out"]["validation"]
    cats = own / "images" / "train" / "cat"
    left = next(path for path in cats.iterdir() if f"cat/{path.name}" not in held)
    for i in range(5):
        shutil.copy(left, cats / f"later{i}.png")
    left.unlink()
    run = again(own)
    assert "changed: train split, cat: " in caplog.text
    assert (run.data.train.size, run.data.validation.size) == (30, 6)
    assert list(run.data.record.held_out["validation"]) == held
    noted = json.loads((own / "run" / "data.json").read_text())
    assert [list(x) for x in run.data.record.statistics] == noted["statistics"]
    # Once it is kept, it is told no more.
    workdirs.create(run.config, str(own / "run"), run.data.record)
    caplog.clear()
    again(own)
    assert "changed" not in caplog.text


def test_a_run_that_has_saved_no_step_takes_other_data(own):
    shutil.rmtree(own / "run" / "checkpoints")
    (own / "images" / "test" / "cat" / "0.png").unlink()
    assert again(own).data.test.size == 7


def test_a_run_of_before_goes_on_with_a_warning_and_is_recorded_then(own, caplog):
    (own / "run" / "data.json").unlink()
    saved = json.loads((own / "run" / "config.json").read_text())
    del saved["data"]["channels"]
    saved["data"]["normalization"] = "cifar10"
    fields = ("data.channels=0", "data.normalization=cifar10")
    (own / "run" / "config.json").write_text(json.dumps(saved))
    run = again(own, *fields)
    assert "own/run has no record of its data (data.json): whether" in caplog.text
    assert run.data.record.of_before
    workdirs.create(run.config, str(own / "run"), run.data.record)
    caplog.clear()
    assert again(own, *fields).data.record == run.data.record
    assert "no record" not in caplog.text


def test_a_record_that_cannot_be_read_is_named(own):
    (own / "run" / "data.json").write_text("[]")
    with pytest.raises(
        ConfigError, match=r"run/data\.json is no record of a run's data \(.*; restore it"
    ):
        again(own)


def test_other_channels_are_another_experiment(own):
    with pytest.raises(ConfigError, match=r"data\.channels: 1 there, 3 now"):
        again(own, "data.channels=3")


def test_one_class_is_refused_before_anything_is_made(tmp_path, capsys):
    small_tree(tmp_path / "images", {("train", "ant"): 9, ("test", "ant"): 2})
    given = tiny_run.arguments(tmp_path / "run", *changes(tmp_path / "images"))
    assert main.main([*given, "--config.data.validation_size=0"]) == 2
    assert "'images' have one class, 'ant', and nothing to tell apart" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_hosts_with_other_files_are_refused(own, monkeypatch):
    def gathered(digest):
        return np.stack([digest, digest[::-1]])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
    with pytest.raises(ConfigError, match=r"the processes do not see the same files in .*images"):
        data_record.create(tiny_run.config(*changes(own / "images")), str(own / "run"))


def test_data_in_memory_are_recorded_by_their_sizes(tmp_path):
    run = prepare(tiny_run.config())
    directory = workdirs.create(run.config, str(tmp_path / "run"), run.data.record)
    (directory / "checkpoints" / "1" / "state").mkdir(parents=True)
    config = tiny_run.config()
    assert prepare(config, str(directory)).data.record == run.data.record
    noted = json.loads((tmp_path / "run" / "data.json").read_text())
    noted["splits"]["test"]["parts"] = {"test": [9, ""]}
    (tmp_path / "run" / "data.json").write_text(json.dumps(noted))
    with pytest.raises(ConfigError, match=r"test split: 53 examples, 9 before"):
        prepare(config, str(directory))
