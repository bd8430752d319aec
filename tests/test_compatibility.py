"""What earlier versions wrote is read with the same answers: workdir, bundle, configurations."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from tiny_run import few_digits  # noqa: F401

from dfs_jax import ablate, main
from dfs_jax import config as configuration
from dfs_jax.config.presets import METHODS
from dfs_jax.early_exit.bundle import EarlyExit
from dfs_jax.training import workdir as workdirs
from dfs_jax.training.run import prepare
from dfs_jax.training.state import restore

WRITTEN = Path(__file__).parent / "compatibility"
CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def told():
    return json.loads((WRITTEN / "answers.json").read_text())


@pytest.fixture(scope="module")
def images():
    return tiny_run.digits()[0][-16:]


def test_a_bundle_answers_as_before(told, images):
    bundle = EarlyExit.load(WRITTEN / "bundle")
    for name, budget in (("default", None), ("cheap", told["budget"])):
        answers, before = bundle(images, budget=budget), told["answers"][name]
        assert answers.labels.tolist() == before["labels"]
        assert answers.exits.tolist() == before["exits"]
        np.testing.assert_allclose(answers.confidence, before["confidence"], rtol=1e-5)
    assert told["answers"]["default"] != told["answers"]["cheap"]


def test_a_workdir_is_restored_with_the_same_logits(told, images):
    run = prepare(workdirs.saved_config(str(WRITTEN / "workdir")))
    step, state = restore(run, str(WRITTEN / "workdir"))
    assert step == told["step"] == int(state.step)
    inputs = EarlyExit.load(WRITTEN / "bundle").preprocessing.normalise(images)
    logits = run.network.apply(state.variables, inputs, train=False).logits
    np.testing.assert_allclose(logits, told["logits"], rtol=1e-5, atol=1e-6)


def test_the_command_takes_a_finished_run_as_finished(told, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(WRITTEN / "workdir", workdir)
    saved = json.loads((workdir / "config.json").read_text())
    before = (workdir / "metrics.jsonl").read_bytes()
    changes = [
        f"--config.{section}.{field}={value}"
        for section, field, value in (
            ("train", "ema", saved["train"]["ema"]),
            ("train", "steps", saved["train"]["steps"]),
            ("optimizer", "learning_rate", saved["optimizer"]["learning_rate"]),
            ("data", "validation_size", saved["data"]["validation_size"]),
        )
    ]
    assert main.main([*tiny_run.arguments(workdir), *changes]) == 0
    printed = capsys.readouterr().out
    for i in (1, 2):
        assert f"exit {i}" in printed
        assert f"{told['test'][f'test/exit{i}/top1']:.2%}" in printed
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_configuration_files_of_before_are_read(tmp_path):
    """They import the method words and `Grid` from where these stood."""
    (tmp_path / "own.py").write_text(
        "from dfs_jax import config as base\n"
        "from dfs_jax.presets import METHODS, SECOND_STAGES\n"
        "def get_config(preset=None):\n"
        "    c = base.default()\n"
        "    networks = {'small': lambda c: base.set_network(c, 'msdnet_digits', growth=4)}\n"
        "    return base.apply_preset(c, preset, networks=networks,\n"
        "                             methods={**METHODS, **SECOND_STAGES})\n"
    )
    (tmp_path / "grid.py").write_text(
        "from dfs_jax import presets\n"
        "from dfs_jax.ablate import Grid\n"
        "def get_grid():\n"
        "    words = {word: [f'preset={word}'] for word in presets.METHODS}\n"
        "    return Grid(base='own.py', axes={'method': words, 'seeds': range(2)})\n"
    )
    config = configuration.load(f"{tmp_path / 'own.py'}:small,bdl2")
    assert config.gradients.options.final_loss
    assert config.model.options.growth == 4
    _, runs = ablate.load(str(tmp_path / "grid.py"))
    assert len(runs) == 2 * len(METHODS)
