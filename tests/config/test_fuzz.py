"""Whatever is asked for is prepared, or refused in one sentence.

A draw is a few overrides, as on the command line, of any fields of the configuration, with values
of the right type, of wrong ones and at their ends; fields that are added are drawn too. A draw is
prepared in this process, and some that can be are trained for two steps.
"""

import functools
import os
import resource
import tempfile
import time

import pytest
import tiny_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import few_digits  # noqa: F401

from dfs_jax import config as configuration
from dfs_jax import gradients, models
from dfs_jax.config import ConfigError, limits
from dfs_jax.training import loop
from dfs_jax.training.progress import TrainingError
from dfs_jax.training.run import prepare

DRAWS = int(os.environ.get("FUZZ_DRAWS", "300"))
LONGEST_MESSAGE = 600  # characters
MOST_SECONDS, MOST_BYTES = 20, 2**30  # that preparing a draw may take

# Each in a field of any type.
EXTREMES = (
    "nan", "inf", "-inf", "1e999", "1e308", "1e38", "1e30", "1e-320", "-0.0", "-1", "0", "1", "2",
    "0.5", "1.0000001", "0.99999999", "-1e-9", "99999999999999999999", "-99999999999999999999",
    "2147483647", "2147483648", "4294967295", "4294967296", "9223372036854775808", "9" * 5000,
    "1" + "0" * 400, "65536", "100000", "()", "((),)", "('a',)", "(1,(2,3))", "(1,1)", "[[8],[4]]",
    "(nan,)", "(1e999,)", "(True,)", "(None,)", "(-1,)", "(0,0)", "(0.5,0.25)", "(1,)" * 50,
    "('.*',)", "('(',)", "('exits|heads',)", "(b'x',)", "{1,2}", "{'a':1}", "None", "True", "false",
    "''", "", " ", "\t", "\n", "'x'", "1j", "b'x'", "lambda: 0", "__import__('os')", "(" * 300,
    "é☃𝄞", "\udcff", "../..", "/dev/null", "/proc/1/mem", "~", "~nobody", "a" * 5000, "x:y", "%s{}",
)  # fmt: skip

# What a field of texts may stand for.
WORDS = (
    "adamw", "lamb", "lars", "sgd", "cosine", "linear", "multistep", "constant", "float32",
    "bfloat16", "float64", "own", "all", "imagenet", "mean", "batch_norm", "cifar10", "digits",
    "folder", "imagenet2012", "tfds:", "tfds:x", "grain", "tf", "skip", "raise", "overlap", "local",
    "groups", "eval/exit1/top1", "eval/ensemble/top1",
)  # fmt: skip

FLOATS = st.one_of(
    st.floats(0, 1), st.floats(0, 100), st.sampled_from([0.0, 0.5, 1.0, 3.0, 1e9]), st.floats()
)
WHOLE = st.one_of(
    st.integers(0, 4), st.integers(1, 40), st.sampled_from([8, 16, 10**6]), st.integers()
)
OF_TYPE = {
    bool: st.sampled_from(["True", "False"]),
    int: WHOLE.map(str),
    float: FLOATS.map(repr),
    str: st.one_of(st.sampled_from(WORDS), st.text(max_size=12)),
    tuple: st.one_of(
        st.lists(FLOATS, max_size=5).map(lambda x: repr(tuple(x))),
        st.lists(WHOLE, max_size=5).map(lambda x: repr(tuple(x))),
        st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), max_size=3).map(
            lambda x: repr(tuple(x))
        ),
        st.lists(st.text(max_size=5), max_size=3).map(lambda x: repr(tuple(x))),
    ),
}


def an_override(path, kind):
    own = [OF_TYPE[kind]] * 4 if kind in OF_TYPE else []
    values = st.one_of(*own, st.sampled_from(EXTREMES))
    if path == "data.image_size":  # between these the images are made, and it takes its time
        values = values.filter(lambda text: not text.isdecimal() or not 64 < int(text[:99]) < 10**6)
    return values.map(lambda text: f"{path}={text}")


def overrides_of(config, prefix=""):
    """One strategy for every field of `config`."""
    return [an_override(prefix + path, kind) for path, (_, kind) in limits.fields(config).items()]


# Strategies are made once: making them takes longer than drawing and preparing.


@functools.cache
def any_field():
    return st.one_of(overrides_of(configuration.default()))


@functools.cache
def some_options(section, name):
    """The choice of a network or a method, and overrides of one or two of its options."""
    own = configuration.load(tiny_run.DIGITS, [f"{section}.name={name}"])[section].options
    chosen = overrides_of(own, f"{section}.options.")
    some = st.lists(st.one_of(chosen), max_size=2) if chosen else st.just([])
    return some.map(lambda more: [f"{section}.name={name}", *more])


@st.composite
def overrides(draw, networks=True):
    """What `config.load` takes: nearly always the smallest network."""
    found = draw(st.lists(any_field(), min_size=1, max_size=3))
    if draw(st.integers(0, 3)) == 0:
        found += draw(some_options("gradients", draw(st.sampled_from(gradients.names()))))
    if networks and draw(st.integers(0, 9)) == 0:
        own = draw(some_options("model", draw(st.sampled_from(models.names()))))
        return [*own, *tiny_run.SETTINGS, *found]
    return [*tiny_run.NETWORK, *tiny_run.SETTINGS, *found]


def prepared(changes, workdir):
    """The configuration of what can be prepared, None for what is refused as it should be."""
    began, before = time.process_time(), peak_bytes()
    try:
        config = configuration.load(tiny_run.DIGITS, changes)
        prepare(config, str(workdir))
    except ConfigError as error:
        check_sentence(error)
        config = None
    assert time.process_time() - began < MOST_SECONDS
    assert peak_bytes() - before < MOST_BYTES
    return config


def train(changes, workdir):
    """Two steps of what could be prepared; they may end in a sentence."""
    changes = [*changes, "train.epochs=0", "train.steps=2"]
    config = prepared(changes, workdir)
    if config is not None:
        try:
            loop.train_and_evaluate(config, str(workdir))
        except (ConfigError, TrainingError) as error:
            check_sentence(error)


def check_sentence(error):
    assert len(str(error)) <= LONGEST_MESSAGE, str(error)
    assert "\n" not in str(error)


def peak_bytes():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


drawn = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    max_examples=DRAWS,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.slow
@drawn
@given(overrides())
def test_every_draw_is_prepared_or_refused_in_a_sentence(place, changes):
    prepared(changes, place / "none")


@pytest.mark.slow
@settings(drawn, max_examples=DRAWS // 50)
@given(overrides(networks=False))
def test_what_can_be_prepared_trains_or_ends_in_a_sentence(place, changes):
    train(changes, tempfile.mkdtemp(dir=place))
