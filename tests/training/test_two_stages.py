"""IMTA on a tiny network: gradient equilibrium, then the exits alone on its frozen backbone."""

import logging

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import few_digits  # noqa: F401

from dfs_jax import config as configuration
from dfs_jax import models
from dfs_jax.config import presets
from dfs_jax.surgery import Surgery
from dfs_jax.training import freeze, loop
from dfs_jax.training.run import prepare, warn
from dfs_jax.training.state import initial_state, restore


def _config(word, *own):
    return configuration.load(f"{tiny_run.DIGITS}:{word}", tiny_run.overrides(*own))


def _flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


def _final(config, workdir):
    state = restore(prepare(config), str(workdir))[1]
    return _flat({"params": state.params, "batch_stats": state.batch_stats})


@pytest.mark.slow
def test_second_stage_trains_the_exits_alone(tmp_path, caplog):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    config = _config("ge")
    loop.train_and_evaluate(config, first)
    before = _final(config, first)

    collaboration = "model.options.collaboration=True"  # choosing a network resets its options
    config = _config("imta", collaboration, f"train.init_from={first}")
    with caplog.at_level(logging.INFO):
        loop.train_and_evaluate(config, second)
    assert "fresh weights" not in caplog.text
    after = _final(config, second)

    trained = {name for name in before if not np.array_equal(before[name], after[name])}
    assert trained == {"params/heads_0/kernel", "params/heads_1/kernel"}
    added = {name.split("/")[1] for name in after.keys() - before.keys()}
    assert added == {"collaborators_0"}
    fresh = _flat(initial_state(prepare(config)).params)
    for name, value in fresh.items():
        if name.startswith("collaborators"):
            assert not np.array_equal(value, after[f"params/{name}"]), name


def test_freezing_fresh_weights_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        warn(prepare(_config("imta", "model.options.collaboration=True")))
    assert "train.init_from" in caplog.text


@pytest.mark.parametrize("word", ["ge", "imta"])
def test_the_word_is_known_everywhere(word, request):
    for name in ("digits", "double_digits", "cifar100", "imagenet"):
        path = request.config.rootpath / "configs" / f"{name}.py"
        c = configuration.load(f"{path}:{word}")
        assert c.model.options.collaboration == (word == "imta")
        assert bool(c.train.freeze) == (word == "imta")


@pytest.mark.parametrize(
    ("name", "last", "side"),
    [
        ("msdnet_digits", "exits_0/dense", 8),
        ("vgg7_cifar100", "heads_0", 8),
        ("resnet18_cifar100", "exits_0/fc", 8),
        ("vit_tiny_patch16", "exits_0/head", 16),
    ],
)
def test_what_the_second_stage_trains(name, last, side):
    model = models.create_model(
        name, num_classes=2, surgery=Surgery(partition=False), collaboration=True
    )
    images = jax.ShapeDtypeStruct((2, side, side, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    c = configuration.default()
    configuration.set_network(c, name)
    presets.SECOND_STAGES["imta"](c)
    frozen = _flat(freeze.chosen(c.train.freeze, shapes))
    free = {path.rpartition("/")[0] for path, stays in frozen.items() if not stays}
    exits = range(model.num_exits)
    lasts = {last.replace("_0", f"_{i}") for i in exits}
    wanted = {f"collaborators_{i}/{part}" for i in exits[:-1] for part in ("hidden", "bn", "dense")}
    assert free == lasts | wanted
