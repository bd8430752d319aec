"""A configuration made into a run, or refused; nothing is compiled for either."""

import re

import jax
import jax.numpy as jnp
import pytest
import tiny_run
from tiny_run import few_digits  # noqa: F401

from dfs_jax import data
from dfs_jax.config import ConfigError
from dfs_jax.objectives import Objective
from dfs_jax.surgery import Surgery
from dfs_jax.training.run import prepare, warn


def test_choices_become_objects():
    run = prepare(
        tiny_run.config(
            "surgery.beta=0.25",
            "surgery.exit_gradient=all",
            "objective.exit_weights=(1,2)",
            "objective.label_smoothing=0.1",
            "train.precision=bfloat16",
            "mesh.data=4",
        )
    )
    assert run.network.surgery == Surgery(beta=0.25, exit_gradient="all")
    assert run.network.num_classes == run.data.spec.num_classes == 10
    assert run.network.dtype == jnp.bfloat16
    assert run.objective == Objective(exit_weights=(1, 2), label_smoothing=0.1)
    assert run.mesh.shape["data"] == 4


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        (("train.steps=7",), 7),
        (("train.steps=0", "train.epochs=1"), 6),  # 90 images in batches of 16
        (("train.steps=0", "train.epochs=2"), 12),
        (("train.steps=0", "train.epochs=0.1"), 1),
    ],
)
def test_length_of_a_run(length, steps):
    run = prepare(tiny_run.config(*length))
    assert run.total_steps == steps
    assert run.steps_per_epoch == 90 / 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["surgery.beta=1.5"], r"beta .*\[0, 1\].* 1.5"),
        (["surgery.beta=-0.1"], r"beta .*\[0, 1\]"),
        (["surgery.exit_gradient=both"], "exit_gradient .*own.*all.*'both'"),
        (["model.options.dropout_rate=1.0"], "dropout_rate .*1.0"),
        (["train.precision=float16"], "train.precision .*bfloat16.*'float16'"),
        (["train.epochs=1"], "exactly one of train.epochs and train.steps.* 1.0 and 12"),
        (["train.steps=0"], "exactly one of train.epochs and train.steps.* 0.0 and 0"),
        (["train.steps=-1"], "exactly one of train.epochs and train.steps"),
        (["train.steps=-1", "train.epochs=2"], "exactly one of train.epochs and train.steps"),
        (["train.log_every=0"], "train.log_every = 0 must be 1 or more"),
        (["train.eval_every=-1"], "train.eval_every = -1 must be 0 or more"),
        (["train.best_metric=eval/exit3/top1"], "train.best_metric .*eval/exit2/top1.*exit3"),
        (["train.best_metric=test/exit1/top1"], "train.best_metric .*test/exit1/top1"),
        (["train.batch_size=12", "mesh.data=8"], "train.batch_size 12 .* 8 devices.* take 16"),
        (["train.eval_batch_size=12", "mesh.data=8"], "train.eval_batch_size 12 .* 8 devices"),
        (["train.batch_size=0"], "train.batch_size 0 is not positive"),
        (["mesh.data=9"], "mesh.data = 9 .*but there are 8 cpu devices"),
        (["mesh.data=0"], "mesh.data = 0"),
        (["optimizer.name=adamn"], "optimizer.name = 'adamn' is unknown; known: .*sgd"),
        (["optimizer.schedule=cosin"], "optimizer.schedule = 'cosin' is unknown; known: .*cosine"),
        (["optimizer.learning_rate=-1"], "optimizer.learning_rate"),
        (["optimizer.momentum=1.0"], r"optimizer.momentum .*\[0, 1\)"),
        (["objective.exit_weights=(1,1,1)"], "exit_weights has 3 values, the network has 2 exits"),
        (["objective.logit_weight=2"], "objective.logit_weight"),
        (["objective.feature_weight=1"], "adapters"),
        (["data.name=digit"], "data.name: there is no data set 'digit'; .*digits"),
        (["data.seed=-1"], "data.seed = -1 must be between 0"),
        (["data.crop_padding=-1"], "crop_padding"),
        (["train.epochs=1e30", "train.steps=0"], r"train.epochs = 1e\+30 are .* steps; there can"),
        (["gradients.name=l2w_den", "train.batch_size=1"], "l2w_den needs 2 examples at a time"),
        (["mesh.fsdp=16", "mesh.data=1"], "mesh.fsdp = 16 does not divide the 8"),
        (["model.options.widths=()"], r"model.options.widths must name at least one layer"),
        (["model.options.widths=((6,),())"], r"model.options.widths must name at least one layer"),
        (["model.options.widths=((0,),)"], r"model.options.widths must be 1 to 65,536"),
        (["model.options.widths=((8,)*300,)"], "not a value of type tuple"),
        (["model.name=vit_tiny_patch16", "model.options.depth=9999"], "makes 9999 layers; .* 250"),
        (
            ["model.name=msdnet_digits", "model.options.reduction=0"],
            r"reduction must lie in \(0",
        ),
        (["model.name=msdnet_digits", "model.options.reduction=0.01"], "0.01 leaves none of 80 ch"),
        (["train.freeze=('(',)"], r"train.freeze: '\(' is no regular expression"),
        (["train.freeze=('a{99999999999999999999}',)"], "train.freeze: .* no regular expression"),
        (["model.name=vit_tiny_patch16"], "at least 16x16 pixels.*8, 8.*data.image_size"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_trained_is_refused(changes, message):
    network = () if changes[0].startswith("model.name") else tiny_run.NETWORK
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(tiny_run.config(*changes, network=network))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (["optimizer.warmup_epochs=3"], "warmup_epochs = 3 is longer than the run of 2.13 epochs"),
        (["objective.exit_weights=(0,0)"], "exit_weights are all 0: no exit is trained"),
        (["train.freeze=('.*',)"], r"train.freeze = \('\.\*',\) keeps every parameter: nothing"),
        (["train.freeze=('s_0','s_1')"], "keeps every parameter: nothing is trained"),
        (["train.freeze=('s_0',)"], "keeps fresh weights; train.init_from names the run"),
        (
            ["gradients.name=meta_gf", "train.steps=11"],
            "11 steps end within a cycle of 300 steps of gradients meta_gf",
        ),
        (["optimizer.learning_rate=0"], "learning_rate is 0: no parameter will move"),
        (
            ["optimizer.schedule=multistep", "optimizer.milestones=(3,4)"],
            r"milestones = \(3, 4\) lie beyond the run of 2.13 epochs",
        ),
        (["train.profile_steps=(13,14)"], "profile_steps = .* lie beyond the run of 12 steps"),
    ],
)
def test_what_a_run_will_not_do_is_told(changes, warning, caplog):
    warn(prepare(tiny_run.config(*changes)))
    assert re.search(warning, caplog.text)


def test_nothing_is_told_of_a_run_that_does_what_it_says(caplog):
    changes = (
        "optimizer.warmup_epochs=2",
        "optimizer.schedule=multistep",
        "optimizer.milestones=(2,100)",
        "objective.exit_weights=(0,1)",
        "train.profile_steps=(1,100)",
    )
    warn(prepare(tiny_run.config(*changes)))
    assert not caplog.text


def test_values_are_checked_before_data_are_prepared(monkeypatch):
    def refuse(_):
        raise AssertionError("data are prepared")

    monkeypatch.setattr(data, "create", refuse)
    with pytest.raises(ConfigError, match="beta"):
        prepare(tiny_run.config("surgery.beta=2"))


def test_preparing_compiles_nothing():
    with tiny_run.compilations() as compiled:
        prepare(tiny_run.config())
        assert not compiled
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(5))
        assert compiled
