"""`python -m dfs_jax.interop`: weights into a workdir and out again, and what it refuses."""

import re

import jax
import numpy as np
import pytest
import tiny_run

from dfs_jax.interop.__main__ import main
from dfs_jax.interop.files import read_weights, write_weights
from dfs_jax.interop.torch import from_state_dict, made_for, to_state_dict
from dfs_jax.models import create_model
from dfs_jax.surgery import Surgery
from dfs_jax.training import lineage
from dfs_jax.training import workdir as workdirs
from dfs_jax.training.run import prepare
from dfs_jax.training.state import read_weights as read_weights_of_run
from dfs_jax.training.state import restore

IMAGES = jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32)


def _network(num_classes=10, **surgery):
    return create_model("msdnet_digits", num_classes=num_classes, surgery=Surgery(**surgery))


def _weights(num_classes=10):
    """Entries for 8×8 grey images, as a training script keeps them."""
    network = _network(num_classes)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32),
        jax.eval_shape(network.init, jax.random.key(0), IMAGES),
    )
    return to_state_dict(network, variables)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Entries, and the workdir they were put into."""
    folder, entries = tmp_path_factory.mktemp("loaded"), _weights()
    write_weights(folder / "w.npz", {f"module.{name}": value for name, value in entries.items()})
    arguments = ["--network", "msdnet_digits", "--exit-gradient", "all", "--beta", "0.25"]
    arguments += ["--weights", str(folder / "w.npz"), "--workdir", str(folder / "run")]
    assert main(arguments) == 0
    return entries, folder / "run"


def test_the_workdir_is_that_of_a_run(loaded):
    entries, workdir = loaded
    config = workdirs.saved_config(str(workdir))
    assert config.surgery.to_dict() == {
        "beta": 0.25,
        "exit_gradient": "all",
        "first_exit": 1,
        "partition": True,
        "referencing": True,
    }
    assert config.data.name == "digits"
    run = prepare(config)
    step, state = restore(run, str(workdir))
    assert step == int(state.step) == 0
    want = from_state_dict(_network(beta=0.25), entries)
    jax.tree.map(np.testing.assert_array_equal, state.variables, want)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    told = lineage.warning(config, str(workdir))
    assert str(workdir.parent / "w.npz") in told
    assert "not known whether they were trained on the images that are held out here" in told


def test_averages_begin_with_the_weights(tmp_path):
    entries = _weights()
    write_weights(tmp_path / "w.npz", entries)
    arguments = ["--config", tiny_run.DIGITS, "--config.train.ema=0.9", "--config.mesh.data=1"]
    arguments += ["--network", "msdnet_digits"]
    arguments += ["--weights", str(tmp_path / "w.npz"), "--workdir", str(tmp_path / "run")]
    assert main(arguments) == 0
    found = read_weights_of_run(str(tmp_path / "run")).values
    jax.tree.map(np.testing.assert_array_equal, found, from_state_dict(_network(), entries))


def test_what_went_in_comes_out(loaded, tmp_path, capsys):
    entries, workdir = loaded
    out = tmp_path / "w.safetensors"
    assert main(["--workdir", str(workdir), "--export", str(out)]) == 0
    assert "checkpoint of step 0" in capsys.readouterr().out
    found = read_weights(out)
    assert found.keys() == entries.keys()
    for name, value in entries.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.slow
def test_a_backbone_with_other_classes(tmp_path):
    entries = _weights(num_classes=3)
    write_weights(tmp_path / "w.npz", entries)
    arguments = ["--network", "msdnet_digits", "--weights", str(tmp_path / "w.npz")]
    arguments += ["--workdir", str(tmp_path / "run"), "--num-classes", "10"]
    assert main(arguments) == 2
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--backbone"]) == 0
    config = workdirs.saved_config(str(tmp_path / "run"))
    _, state = restore(prepare(config), str(tmp_path / "run"))
    found = to_state_dict(_network(), state.variables)
    for name, value in entries.items():
        if found[name].shape == value.shape:
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert found["classifier.0.linear.1.weight"].shape == (10, 32)
    assert np.any(found["classifier.0.linear.1.weight"])


def test_what_weights_tell_about_their_network():
    assert made_for(_network(1), _weights(3)) == (3, (5, 5, 1))
    entries = _weights()
    del entries["classifier.3.linear.1.weight"]
    assert made_for(_network(), entries).num_classes is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "msdnet"], "unknown network 'msdnet'; known: msdnet_cifar100"),
        (["--network", "vit_tiny_patch16"], "vit_tiny_patch16 does not say what it is for"),
        (["--network", "msdnet_digits", "--data", "mnist"], "no data set 'mnist'; known: "),
        (["--network", "msdnet_digits", "--beta", "2"], r"beta must lie in \[0, 1\]"),
        (["--network", "vgg7_cifar100", "--data", "digits"], "classifers.5.fc_p.weight: missing"),
        (["--network", "msdnet_digits", "--backbone"], "needs --num-classes"),
        (["--network", "msdnet_digits", "--backbone", "--num-classes", "0"], "at least 1, got 0"),
        ([], "needs --network NAME"),
    ],
)
def test_refusals(tmp_path, capfd, arguments, message):
    write_weights(tmp_path / "w.npz", _weights())
    arguments += ["--weights", str(tmp_path / "w.npz"), "--workdir", str(tmp_path / "run")]
    assert main(arguments) == 2
    assert re.search(message, capfd.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (np.float32(np.nan), ", as float32, has NaN or infinity in NAME"),
        (np.float64(1e300), ", as float32, has NaN or infinity in NAME"),
        (np.int8(3), " has int8 in NAME, not floating-point numbers"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused(tmp_path, capfd, value, told):
    entries, name = _weights(), "classifier.2.linear.1.bias"
    entries[name] = np.full(10, value)
    np.savez(tmp_path / "w.npz", **entries)
    arguments = ["--network", "msdnet_digits", "--weights", str(tmp_path / "w.npz")]
    assert main([*arguments, "--workdir", str(tmp_path / "run")]) == 2
    told = f"--weights: {tmp_path / 'w.npz'}{told.replace('NAME', name)}"
    assert told in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("own", [["--num-classes", "10"], []])
def test_another_number_of_classes_names_the_flag(tmp_path, capfd, own):
    """Which the data set tells, too."""
    write_weights(tmp_path / "w.npz", _weights(num_classes=3))
    arguments = ["--network", "msdnet_digits", "--weights", str(tmp_path / "w.npz")]
    assert main([*arguments, "--workdir", str(tmp_path / "run"), *own]) == 2
    source = "--num-classes" if own else "data set 'digits'"
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"error: --weights: {tmp_path / 'w.npz'} is made for 3 classes, {source} says 10: "
        "--backbone --num-classes 10 takes all but the exits, which then start from initial "
        "values; --data names another data set"
    )
    assert not (tmp_path / "run").exists()


def test_a_file_of_nothing_but_counters(tmp_path, capfd):
    np.savez(tmp_path / "W.NPZ", **{"model.bn.num_batches_tracked": np.int64(3)})
    (tmp_path / "W.NPZ.npz").rename(tmp_path / "W.NPZ")
    arguments = ["--network", "msdnet_digits", "--weights", str(tmp_path / "W.NPZ")]
    assert main([*arguments, "--workdir", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert "classifier.3.linear.1.weight: missing" in error
    assert len(error.splitlines()) <= 10


def test_a_workdir_in_use_is_refused(loaded, tmp_path, capfd):
    entries, workdir = loaded
    write_weights(tmp_path / "w.npz", entries)
    arguments = ["--network", "msdnet_digits", "--weights", str(tmp_path / "w.npz")]
    assert main([*arguments, "--workdir", str(workdir)]) == 2
    assert "holds a run" in capfd.readouterr().err


def test_exporting_what_is_not_there(loaded, tmp_path, capfd):
    _, workdir = loaded
    assert main(["--workdir", str(tmp_path), "--export", str(tmp_path / "w.npz")]) == 2
    assert "holds no run" in capfd.readouterr().err
    out = ["--export", str(tmp_path / "w.npz")]
    assert main(["--workdir", str(workdir), *out, "--step", "7"]) == 2
    assert "no checkpoint of step 7" in capfd.readouterr().err
