"""Every field refuses what it cannot hold, naming itself, the value, and what would be right."""

from pathlib import Path

import ml_collections
import numpy as np
import pytest

from dfs_jax import config, gradients, models
from dfs_jax.config import ConfigError, limits

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.py")
HUGE = 10**5000  # Python writes no number of so many digits
# One of another type for every field, that its text on a command line could become.
OTHERS = (1.5, "text", True, 7, (1, 2), ("text",), (b"x",), ((1,),), None, [1], {"a": 1})


def fields(c):
    """(path, type) of every field."""
    return [(path, kind) for path, (_, kind) in limits.fields(c).items()]


def holding(path, value, c=None):
    """A configuration in which nothing but `check` stands between a field and its value."""
    c = (c or config.load(DIGITS)).to_dict()
    *parents, leaf = path.split(".")
    section = c
    for key in parents:
        section = section[key]
    section[leaf] = value
    return ml_collections.ConfigDict(c, convert_dict=True)


@pytest.mark.parametrize(("path", "kind"), fields(config.default()), ids=lambda x: str(x))
def test_every_field_refuses_other_types(path, kind):
    for value in OTHERS:
        of_kind = type(value) is kind or (kind is float and type(value) is int)
        placeholder = value is None and path in ("data.dir", "train.init_from")
        if kind in (tuple, object) and isinstance(value, tuple):
            continue  # by their elements, below
        if kind is object and type(value) in (int, limits.number_of(path)):
            continue  # a number, or several
        if isinstance(value, dict) or of_kind or placeholder:
            continue
        with pytest.raises(ConfigError, match=rf"^config\.{path}( = |: )") as caught:
            limits.check(holding(path, value))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=99999999999999999999", r"seed = 99999999999999999999 must be between 0 and 2\*\*32"),
        ("seed=4294967296", "seed = 4294967296 must be"),  # JAX would take it for seed 0
        ("data.seed=4294967296", "data.seed = 4294967296 must be"),
        ("train.epochs=1e999", "train.epochs = inf must be finite"),
        ("train.epochs=1e-320", r"train.epochs = 1e-320 must be 0, or of a size between 1e-37"),
        ("optimizer.learning_rate=1e300", "learning_rate = 1e[+]300 must be .*float32"),
        ("optimizer.learning_rate=1" + "0" * 400, "learning_rate: .* is not a value of type float"),
        ("optimizer.milestones=('a',)", r"milestones = \('a',\) must be a tuple of numbers"),
        ("optimizer.milestones=(1,(2,))", r"milestones = \(1, \(2,\)\) must be a tuple of numbers"),
        ("optimizer.milestones=True", r"milestones = \(True,\) must be a tuple of numbers"),
        ("optimizer.milestones=(1e999,)", r"milestones = \(inf,\) must be finite"),
        ("objective.exit_weights=[[1]]", r"exit_weights = \(\(1,\),\) must be a tuple of numbers"),
        ("train.freeze=(1,)", r"train.freeze = \(1,\) must be a tuple of texts"),
        (
            "train.freeze=.*",
            r"'\.\*' is not a value of type tuple, which is written as .*\('text',\)",
        ),
        ("train.profile_steps=(1.5,2)", r"profile_steps = \(1.5, 2\) must be a tuple of whole"),
        ("train.steps=99999999999", r"train.steps = 99999999999 must be between -2\*\*31"),
        ("train.ema=1", r"train.ema = 1.0 must be in \[0, 1\)"),
        ("train.peak_flops=-1", "train.peak_flops = -1.0 must be 0 or more"),
        ("train.step=" + "9" * 5000, "did you mean 'steps'"),
        ("seed=" + "9" * 5000, r"config.seed: '9+\.\.\.9+' is not a value of type int"),
        ("model.options.steps=(1,'a')", r"steps = \(1, 'a'\) must be a tuple of whole numbers"),
        ("optimizer.milestones=" + "(" * 300, "milestones: .* is not a value of type tuple"),
        ("x" * 9000 + "=1", r"config.x+…: there is no such field"),
    ],
)
def test_a_text_that_a_field_cannot_hold(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(DIGITS, [override])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        pytest.param("seed", HUGE, "seed = a number of 16610 bits must be between", id="huge"),
        ("data.dir", "a\0b", "data.dir = .* must be a text without null characters"),
        ("optimizer.milestones", (np.float32(1),), "milestones = .* must be a tuple of numbers"),
        ("optimizer.momentum", float("nan"), r"momentum = nan must be in \[0, 1\)"),
        ("optimizer.milestones", (1,) * 9000 + ("a",), r"= \(1, 1, .*\.\.\.\) must be"),
    ],
)
def test_a_value_of_a_file_that_a_field_cannot_hold(path, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        limits.check(holding(path, value))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", gradients.names())
def test_options_of_methods_are_fields_too(name):
    c = config.load(DIGITS, [f"gradients.name={name}"])
    for path, kind in fields(c.gradients.options):
        with pytest.raises(ConfigError, match=rf"gradients\.options\.{path} = \{{1}} must be"):
            limits.check(holding(f"gradients.options.{path}", {1}, c))
        if kind is float:
            with pytest.raises(ConfigError, match=rf"options\.{path} = inf must be finite"):
                limits.check(holding(f"gradients.options.{path}", float("inf"), c))


@pytest.mark.parametrize("name", models.names())
def test_what_every_network_takes_passes(name):
    limits.check(config.load(DIGITS, [f"model.name={name}"]))


def test_fields_that_are_missing_or_unknown():
    saved = config.load(DIGITS).to_dict()
    del saved["model"]["options"]["growth"]  # the network has a value of its own
    limits.check(ml_collections.ConfigDict(saved))
    del saved["train"]["ema"]
    with pytest.raises(ConfigError, match=r"config\.train\.ema is missing"):
        limits.check(ml_collections.ConfigDict(saved))
    saved["train"]["emaa"] = 0.5
    with pytest.raises(ConfigError, match=r"config\.train\.emaa: .* did you mean 'train\.ema'"):
        limits.check(ml_collections.ConfigDict(saved))
    with pytest.raises(ConfigError, match="is missing"):
        limits.check(ml_collections.ConfigDict())
