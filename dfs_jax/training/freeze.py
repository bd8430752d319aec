"""Parts of a network that keep their weights: chosen by patterns on parameter paths.

A path is the names from the root joined by "/", e.g. "exits_0/dense/kernel"; a pattern is a
regular expression that is searched in it, so "^exits_" is every exit. What is frozen receives no
update at all, weight decay included, and its running statistics stay as they are.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from dfs_jax.config import ConfigError
from dfs_jax.config.errors import shown


def chosen(patterns: Sequence[str], tree: Any) -> Any:
    """For every leaf of `tree` whether one of `patterns` is found in its path."""
    compiled = [re.compile(pattern) for pattern in patterns]

    def found(path, _):
        return any(pattern.search(_joined(path)) for pattern in compiled)

    return jax.tree_util.tree_map_with_path(found, tree)


def optimizer(
    update: optax.GradientTransformation, patterns: Sequence[str]
) -> optax.GradientTransformation:
    """`update` with nothing for the frozen parameters."""
    return optax.chain(update, still(patterns)) if patterns else update


def still(patterns: Sequence[str]) -> optax.GradientTransformation:
    """Sets to 0 the updates of what the patterns find; it keeps no state."""
    return optax.masked(optax.set_to_zero(), lambda params: chosen(patterns, params))


def keep(patterns: Sequence[str], before: Any, after: Any) -> Any:
    """`after`, but `before` where frozen; two trees of one structure."""
    if not patterns:
        return after
    frozen = chosen(patterns, before)
    return jax.tree.map(lambda stay, old, new: old if stay else new, frozen, before, after)


def check(patterns: Sequence[str], params: Any, field: str = "train.freeze") -> None:
    """Raise ConfigError for a pattern that is no regular expression or finds no parameter.

    The sentence begins with `field`, which holds the patterns.
    """
    for pattern in patterns:
        try:
            any_found = any(jax.tree.leaves(chosen([pattern], params)))
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"{field}: {shown(pattern)} is no regular expression: {error}"
            ) from error
        if not any_found:
            raise ConfigError(
                f"{field}: {shown(pattern)} is in the path of no parameter; they begin with "
                f"{', '.join(sorted(params))}"
            )


def _joined(path: Any) -> str:
    return "/".join(str(getattr(entry, "key", entry)) for entry in path)
