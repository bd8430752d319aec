"""The interface of a gradient method: a pair of pure functions, as in optax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Restart(NamedTuple):
    """What `apply` returns instead of gradients if the update does not start where it stands.

    Attributes:
      params: parameters that replace the current ones.
      gradients: gradients at those.
      descend: () bool; whether the optimizer then takes its step. False leaves the parameters
        at `params` and what the optimizer remembers of earlier gradients as it is.
    """

    params: Any
    gradients: Any
    descend: jax.Array


def _accept(network: Any, objective: Any) -> None:
    del network, objective


class GradientMethod(NamedTuple):
    """From N exit losses to one update.

    Attributes:
      init: init(params) -> state, the method's own state, a pytree of arrays, or ().
      apply: apply(problem, params, state, rng) -> (gradients, aux, state): gradients shaped as
        params, or a `Restart`; the `Aux` of the step's full pass; the next state. Traced once,
        inside the step's jit.
      check: check(network, objective) raises ValueError, with the reason, if the method makes
        no sense with them.
      cycle: number of steps after which the parameters are those of a finished update. More
        than 1 for a method with phases; it restarts, and so cannot accumulate gradients.
    """

    init: Callable[[Any], Any]
    apply: Callable[..., tuple[Any, Any, Any]]
    check: Callable[[Any, Any], None] = _accept
    cycle: int = 1
