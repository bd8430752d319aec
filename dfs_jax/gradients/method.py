"""The interface of a gradient method: a pair of pure functions, as in optax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dfs_jax.gradients.problem import Aux, Problem


class Update(NamedTuple):
    """What a method makes of one step, for the optimizer.

    What is None is left out of the compiled step.

    Attributes:
      gradients: shaped as the parameters.
      params: parameters that replace the current ones, and at which the gradients were taken;
        None for the current ones.
      descend: () bool, whether the optimizer takes its step. False leaves the parameters and
        what the optimizer remembers of earlier gradients as they are. None is always True.
    """

    gradients: Any
    params: Any = None
    descend: jax.Array | None = None

    def start(self, params: Any) -> Any:
        """The parameters from which the optimizer steps, given the current ones."""
        return params if self.params is None else self.params


class GradientMethod(NamedTuple):
    """From N exit losses to one update.

    Attributes:
      init: init(params) -> state, the method's own state, a pytree of arrays, or ().
      apply: apply(problem, params, state, rng) -> (update, aux, state): the `Update`, the `Aux`
        of the step's full pass, and the next state. Traced once, inside the step's jit.
      check: check(network, objective) raises ValueError, with the reason, if the method makes
        no sense with them.
      cycle: number of steps after which the parameters are those of a finished update. More
        than 1 for a method with phases; it restarts, and so cannot accumulate gradients.
      smallest_batch: number of examples that a pass needs at least.
    """

    init: Callable[[Any], Any]
    apply: Callable[[Problem, Any, Any, jax.Array], tuple[Update, Aux, Any]]
    check: Callable[[Any, Any], None] = lambda network, objective: None
    cycle: int = 1
    smallest_batch: int = 1


def weighting_examples(name: str) -> Callable[[Any, Any], None]:
    """The `check` of a method `name` that weights examples: each one needs a loss of its own."""

    def check(network: Any, objective: Any) -> None:
        if objective.feature_weight and objective.feature_reduction == "batch_norm":
            raise ValueError(
                f"gradients {name} weights examples, and objective.feature_reduction="
                '"batch_norm" has no loss per example; use "mean"'
            )

    return check
