"""The interface of a gradient method: a pair of pure functions, as in optax."""

from collections.abc import Callable
from typing import Any, NamedTuple


class GradientMethod(NamedTuple):
    """From N exit losses to one update.

    init(params) -> state: the method's own state, a pytree of arrays, or ().
    apply(problem, params, state, rng) -> (gradients, aux, state): gradients shaped as params,
      the `Aux` of the step's full pass, and the next state. Traced once, inside the step's jit.
    """

    init: Callable[[Any], Any]
    apply: Callable[..., tuple[Any, Any, Any]]
