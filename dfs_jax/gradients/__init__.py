"""Gradient methods: from N exit losses to one update. One file each, named after the method."""

import inspect
from collections.abc import Callable
from typing import Any

from dfs_jax.gradients.joint import joint
from dfs_jax.gradients.method import GradientMethod
from dfs_jax.gradients.problem import Aux, Problem

__all__ = ["Aux", "GradientMethod", "Problem", "create", "names", "options"]

_METHODS: dict[str, Callable[..., GradientMethod]] = {"joint": joint}


def names() -> tuple[str, ...]:
    """The methods that `create` knows."""
    return tuple(sorted(_METHODS))


def options(name: str) -> dict[str, Any]:
    """The options of a method with their published values. Raises ValueError if unknown."""
    return {k: p.default for k, p in inspect.signature(_find(name)).parameters.items()}


def create(name: str, **options: Any) -> GradientMethod:
    """The method `name`. Raises ValueError for an unknown name, listing the known ones."""
    return _find(name)(**options)


def _find(name: str) -> Callable[..., GradientMethod]:
    if name not in _METHODS:
        raise ValueError(f"unknown gradient method {name!r}; known: {', '.join(names())}")
    return _METHODS[name]
