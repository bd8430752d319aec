"""Block-dependent losses, BDL: each segment is trained by the exits near it.

Improving Low-Latency Predictions in Multi-Exit Neural Networks via Block-Dependent Losses
(TNNLS 2023). The loss of exit j reaches back to segment r_j and no further (segments and exits
from 0, with k the `size`):

    local     r_j = j                 every segment has its own loss alone
    groups    r_j = k ⌊j / k⌋         a last segment on its own joins the group before
    overlap   r_j = max(0, j - k + 1)

and `final_loss` lets the last exit's loss reach everything, r_{N-1} = 0. Each segment's
parameters then follow the sum of the losses that reach it. The paper has k = 3 for CIFAR-100, 2
for ImageNet.

The official code runs segments once more on detached features for every overlap. Here each
segment runs once, and its backward pass once for every r_j that is still on its way: the same
gradients, one dropout mask, one update of the batch statistics. Every feature that crosses
from one segment to the next is cut, the finer scales of MSDNet too. Cost: 1× for "local" and
"groups", about (1 + 2k) / 3 for "overlap", and 2/3 more with the final loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dfs_jax.gradients.method import GradientMethod, Update
from dfs_jax.gradients.problem import Aux
from dfs_jax.models import inputs

VARIANTS = ("local", "groups", "overlap")


def bdl(
    num_exits: int, *, variant: str = "overlap", size: int = 3, final_loss: bool = False
) -> GradientMethod:
    """The gradients of losses that reach back only so far; no state.

    Args:
      num_exits: N.
      variant: "local", "groups" or "overlap".
      size: segments of a group, or that a loss reaches; "local" has no use for it.
      final_loss: the last exit's loss reaches every segment.

    Raises:
      ValueError: for an unknown variant or a size below 1.
    """
    starts = reach(num_exits, variant, size, final_loss)

    def check(network, objective):
        surgery = network.surgery
        if surgery.referencing and surgery.exit_gradient == "all":
            return
        for i in range(num_exits - 1):
            here = surgery.at(i)
            shared = here.partition and here.beta > 0
            if shared and all(start > i for start in starts[i + 1 :]):
                raise ValueError(
                    f"gradients bdl, variant {variant!r}: no deeper exit's loss reaches segment "
                    f"{i + 1}, so nothing would train the channels that surgery takes from exit "
                    f'{i + 1}; use final_loss=True, variant="overlap" with size 2 or more, '
                    'surgery.exit_gradient="all" or surgery.partition=False'
                )

    def apply(problem, params, state, rng):
        gradients, aux = reaching_gradients(problem, params, starts)
        return Update(gradients), aux, state

    return GradientMethod(lambda params: (), apply, check)


def reach(num_exits: int, variant: str, size: int, final_loss: bool) -> tuple[int, ...]:
    """The first segment that each exit's loss reaches, r_j, from 0."""
    if variant not in VARIANTS:
        raise ValueError(
            f"gradients.options.variant must be one of {', '.join(VARIANTS)}, got {variant!r}"
        )
    if size < 1:
        raise ValueError(f"gradients.options.size must be at least 1, got {size}")
    if variant == "local":
        starts = list(range(num_exits))
    elif variant == "groups":
        starts = [j // size * size for j in range(num_exits)]
        if num_exits > size and num_exits % size == 1:  # 7 exits are 3 + 4 in the official code
            starts[-1] = starts[-2]
    else:
        starts = [max(0, j - size + 1) for j in range(num_exits)]
    if final_loss:
        starts[-1] = 0
    return tuple(starts)


def reaching_gradients(problem, params, starts):
    """The summed gradient of losses j = 0..N-1 that reach segments starts[j]..j and exit j.

    Returns it with the step's `Aux`.
    """
    segments, exits, statistics = _forward(problem, params)
    answers = [exit_.result for exit_ in exits]

    def total(answers):
        examples = problem.exit_losses(*zip(*answers, strict=True))
        losses = jnp.stack([jnp.mean(each) for each in examples])
        return jnp.sum(losses), losses

    to_answers, losses = jax.grad(total, has_aux=True)(answers)
    gradients = jax.tree.map(jnp.zeros_like, params)
    behind = {}  # gradients of the losses that reach segment i and deeper, by their r_j
    for i in reversed(range(problem.num_exits)):
        to_params, to_exit_input = exits[i].pull(to_answers[i])
        gradients = jax.tree.map(jnp.add, gradients, to_params)
        no_exit = jax.tree.map(jnp.zeros_like, to_exit_input)
        no_carry = jax.tree.map(jnp.zeros_like, segments[i].result[0])
        # Exit i's loss goes on together with those that reach as far back as it does.
        arriving = {start: (to_carry, no_exit) for start, to_carry in behind.items()}
        arriving[starts[i]] = (behind.get(starts[i], no_carry), to_exit_input)
        behind = {}
        for start, to_result in arriving.items():
            to_params, to_carry = segments[i].pull(to_result)
            gradients = jax.tree.map(jnp.add, gradients, to_params)
            if start < i:
                behind[start] = to_carry
    logits = tuple(logits for logits, _ in answers)
    return gradients, Aux(losses, logits, statistics)


class _Piece(NamedTuple):
    """A segment or an exit that has run forward."""

    result: Any  # (carry, exit input) of a segment, (logits, feature) of an exit
    pull: Callable  # gradient at the result -> gradients at the parameters and at the input


def _forward(problem, params):
    """All segments and exits, run once, and the running statistics after that."""
    carry, statistics = inputs.of_batch(problem.batch), problem.batch_stats
    segments, exits = [], []

    def run(given, i, **options):
        def forward(params, given):
            return problem.run(params, given, i, batch_stats=statistics, **options)

        result, pull, updated = jax.vjp(forward, params, given, has_aux=True)
        return _Piece(result, pull), updated

    for i in range(problem.num_exits):
        segment, statistics = run(carry, i, method="advance")
        carry, exit_input = segment.result
        previous = exits[-1].result[0] if exits else None
        exit_, statistics = run(exit_input, i, method="classify", previous=previous)
        segments.append(segment)
        exits.append(exit_)
    return segments, exits, statistics
