"""What becomes a refusal, and what stays a defect."""

import pytest

from dfs_jax.config import ConfigError, refusals
from dfs_jax.config.errors import shown


@pytest.mark.parametrize("kind", [ValueError, TypeError])
def test_what_is_refused_within_becomes_one_kind_of_error(kind):
    with pytest.raises(ConfigError, match=r"^too small$"), refusals():
        raise kind("too small")
    with pytest.raises(ConfigError, match=r"^--size: too small$") as caught, refusals("--size"):
        raise kind("too small")
    assert isinstance(caught.value.__cause__, kind)


def test_a_refusal_passes_as_it_is_and_a_defect_stays_one():
    refused = ConfigError("no such thing")
    with pytest.raises(ConfigError) as caught, refusals("--size"):
        raise refused
    assert caught.value is refused
    with pytest.raises(KeyError), refusals("--size"):
        {}["size"]


def test_what_is_shown_of_a_value_is_short():
    assert shown("a") == "'a'"
    assert shown((1, 2.5, "x")) == "(1, 2.5, 'x')"
    for long in (
        "x" * 9000,
        (1,) * 9000,
        10**4000,
        10**9000,
        [["x" * 99] * 99] * 99,
        {1: "x" * 999},
    ):
        assert len(shown(long)) < 130
    assert shown("x" * 9000).startswith("'xxx")
