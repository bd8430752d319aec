"""Gradient methods: from N exit losses to one update. One file each, named after the method."""

import inspect
from collections.abc import Callable
from typing import Any

from dfs_jax.gradients.bdl import bdl
from dfs_jax.gradients.cagrad import cagrad
from dfs_jax.gradients.confidence_gated import confidence_gated
from dfs_jax.gradients.equilibrium import equilibrium
from dfs_jax.gradients.joint import joint
from dfs_jax.gradients.l2w_den import l2w_den
from dfs_jax.gradients.meta_gf import meta_gf
from dfs_jax.gradients.method import GradientMethod, Update
from dfs_jax.gradients.nash_mtl import nash_mtl
from dfs_jax.gradients.pcgrad import pcgrad
from dfs_jax.gradients.problem import Aux, Problem

_METHODS: dict[str, Callable[..., GradientMethod]] = {
    "bdl": bdl,
    "cagrad": cagrad,
    "confidence_gated": confidence_gated,
    "equilibrium": equilibrium,
    "joint": joint,
    "l2w_den": l2w_den,
    "meta_gf": meta_gf,
    "nash_mtl": nash_mtl,
    "pcgrad": pcgrad,
}


def names() -> tuple[str, ...]:
    """The methods that `create` knows."""
    return tuple(sorted(_METHODS))


def options(name: str) -> dict[str, Any]:
    """The options of a method with their published values. Raises ValueError if unknown."""
    parameters = inspect.signature(_find(name)).parameters
    return {k: p.default for k, p in parameters.items() if k != "num_exits"}


def create(name: str, *, num_exits: int | None = None, **chosen: Any) -> GradientMethod:
    """The method `name`, for a network of `num_exits` exits.

    Methods whose state depends on that number take it first. Raises ValueError for an unknown
    name or option, listing the known ones, for values out of range and for a number of exits that
    is missing.
    """
    method, known = _find(name), options(name)
    for option in chosen:
        if option not in known:
            raise ValueError(
                f"gradient method {name} has no option {option!r}; "
                f"its options: {', '.join(known) or 'none'}"
            )
    if "num_exits" in inspect.signature(method).parameters:
        if num_exits is None:
            raise ValueError(f"gradient method {name} needs num_exits, the number of exits")
        return method(num_exits, **chosen)
    return method(**chosen)


def _find(name: str) -> Callable[..., GradientMethod]:
    if name not in _METHODS:
        raise ValueError(f"unknown gradient method {name!r}; known: {', '.join(names())}")
    return _METHODS[name]
