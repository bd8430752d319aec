"""What becomes a refusal, and what stays a defect."""

import pytest

from dfs_jax.config import ConfigError, refusals


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
