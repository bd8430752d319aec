"""Weights that are not finite are refused wherever they are restored; nothing is changed."""

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import few_digits  # noqa: F401

from dfs_jax import evaluate, main
from dfs_jax.early_exit import export
from dfs_jax.interop import __main__ as interop
from dfs_jax.training import checkpoint
from dfs_jax.training import workdir as workdirs
from dfs_jax.training.run import prepare
from dfs_jax.training.state import initial_state, refuse_not_finite

KERNEL = "params/heads_1/kernel"


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A workdir at step 1 with one NaN in a kernel."""
    workdir = tmp_path_factory.mktemp("broken") / "run"
    run = prepare(tiny_run.config())
    state = initial_state(run)
    params = jax.device_get(state.params)
    params["heads_1"]["kernel"] = np.array(params["heads_1"]["kernel"])
    params["heads_1"]["kernel"][2, 1] = np.nan
    directory = workdirs.create(run.config, str(workdir))
    with checkpoint.Checkpointer(directory / "checkpoints", best_metric=None) as saver:
        saver.save(1, state.replace(step=state.step + 1, params=params), {"step": 1}, {})
    return workdir


def _files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_command_refuses_them(broken, tmp_path, capfd):
    before = _files(broken)
    workdir, out = ["--workdir", str(broken)], tmp_path / "out"
    for command, arguments in (
        (evaluate, workdir),
        (evaluate, [*workdir, "--step", "1", "--out", str(out)]),
        (export, [*workdir, "--out", str(out)]),
        (interop, [*workdir, "--export", str(tmp_path / "w.npz")]),
        (main, tiny_run.arguments(broken)),
    ):
        assert command.main(arguments) == 2, command
        assert capfd.readouterr().err.splitlines()[-1] == (
            f"error: --workdir: the checkpoint of step 1 in {broken} has NaN or infinity in "
            f"{KERNEL}: such weights answer nothing"
        )
    assert before.items() <= _files(broken).items()  # training has noted its data
    assert not list(tmp_path.iterdir())


def test_a_run_does_not_start_from_them(broken, tmp_path, capfd):
    """And its workdir is not begun, so that the next try may start from others."""
    own = f"train.init_from={broken}"
    assert main.main(tiny_run.arguments(tmp_path / "run", own)) == 2
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"error: train.init_from: step 1 of {broken} has NaN or infinity in {KERNEL}: such weights "
        "answer nothing"
    )
    assert not (tmp_path / "run").exists()
    other = ("model.options.widths=((5,),(3,))", "data.image_size=12")
    assert main.main(tiny_run.arguments(tmp_path / "run", own, *other)) == 2
    assert f"no array of step 1 of {broken} fits this network" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_counts_as_not_finite():
    tree = {"a": np.arange(3), "b": {"c": jax.numpy.ones(2, jax.numpy.bfloat16), "d": None}}
    refuse_not_finite(tree, "here")
    for value in (np.nan, np.inf, -np.inf):
        for make in (np.asarray, jax.numpy.asarray):
            tree["b"]["c"] = make([1.0, value]).astype(jax.numpy.bfloat16)
            with pytest.raises(ValueError, match="here has NaN or infinity in b/c"):
                refuse_not_finite(tree, "here")
