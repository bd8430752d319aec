"""Meta-GF: every exit trains the network by itself, then the results are fused.

Meta-GF: Training Dynamic-Depth Neural Networks Harmoniously (ECCV 2022). A cycle has N + 1
phases of `phase_steps` steps. Phase i < N starts from w_0, the parameters at the start of the
cycle, and ends at w_i, having trained on

    L_i + a Σ_{j≠i} v_j L_j                                 a = 0.1

The last phase leaves w_1..w_N as they are and learns, by Adam on Σ_j L_j, how to fuse them: one
number m_i for every tensor and every exit i that uses the tensor,

    w = w_0 + Σ_i s(m_i) (w_i - w_0) / Σ_i s(m_i)            s the sigmoid

The w of its last step is where the next cycle starts, with m ← 0.1 m + 0.9 (m before the phase).
As in the official code m starts at 1, the optimizer's momentum goes on from phase to phase,
and so do the running statistics, which have settled on the fused network by the end of the cycle.
In the paper a phase is a pass over the training set. Outside the last phase's end the parameters
are those of one exit's phase, so a run, and the steps between evaluations, had best be multiples
of the cycle.

Cost: a step costs 1×, but N + 1 of them do the work of one; memory N + 1 copies of the parameters.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dfs_jax.gradients.gram import exact
from dfs_jax.gradients.joint import joint
from dfs_jax.gradients.method import GradientMethod, Update
from dfs_jax.gradients.paths import exits_by_tensor

# v of the official code, made for seven exits.
_PUBLISHED = (1.0, 1.0, 0.6, 0.6, 0.75, 0.9, 1.0)


class State(NamedTuple):
    """Where the cycle stands."""

    step: jax.Array  # () int32, steps completed in this cycle
    start: Any  # w_0
    trained: Any  # w_1..w_N, stacked: (N, …) for each tensor
    importance: Any  # m, (N,) for each tensor
    before: Any  # m before the last phase
    adam: Any  # Adam's moments for m


def meta_gf(
    num_exits: int,
    *,
    phase_steps: int = 100,
    auxiliary: float = 0.1,
    auxiliary_weights: tuple[float, ...] = (),
    learning_rate: float = 0.1,
    momentum: float = 0.9,
) -> GradientMethod:
    """Training and fusing in turn, each from parameters of its own. One exit is plain training.

    Args:
      num_exits: N.
      phase_steps: steps of each of the N + 1 phases of a cycle.
      auxiliary: a, share of the other exits' losses in an exit's own phase.
      auxiliary_weights: v, shallow to deep; () is the published one for 7 exits, otherwise 1s.
      learning_rate: of Adam, for m.
      momentum: share of the former m that is kept from cycle to cycle.

    Raises:
      ValueError: for values out of range.
    """
    weights = _loss_weights(num_exits, auxiliary, auxiliary_weights)
    if phase_steps < 1:
        raise ValueError(f"gradients.options.phase_steps must be at least 1, got {phase_steps}")
    if (num_exits + 1) * phase_steps >= 2**31:  # counted in int32
        raise ValueError(
            f"gradients.options.phase_steps must be below {2**31 // (num_exits + 1)} with "
            f"{num_exits} exits, got {phase_steps}"
        )
    if not learning_rate >= 0:
        raise ValueError(f"gradients.options.learning_rate must be 0 or more, got {learning_rate}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"gradients.options.momentum must lie in [0, 1], got {momentum}")
    if num_exits == 1:
        return joint()
    adam = optax.adam(learning_rate)
    cycle = (num_exits + 1) * phase_steps

    def init(params):
        importance = jax.tree.map(lambda w: jnp.ones(num_exits, w.dtype), params)
        return State(
            step=jnp.zeros((), jnp.int32),
            start=jax.tree.map(jnp.zeros_like, params),
            trained=jax.tree.map(lambda w: jnp.zeros((num_exits, *w.shape), w.dtype), params),
            importance=importance,
            before=jax.tree.map(jnp.zeros_like, importance),
            adam=adam.init(importance),
        )

    def apply(problem, params, state, rng):
        uses = exits_by_tensor(problem, params)
        phase, at = state.step // phase_steps, state.step % phase_steps
        learning = phase == num_exits
        state = _begin_phase(state, params, phase, at == 0)

        point = jax.lax.cond(
            learning,
            lambda: fuse(state.start, state.trained, state.importance, uses),
            lambda: _chosen(at == 0, state.start, params),
        )

        def total(params):
            losses, aux = problem.losses(params)
            return jnp.sum(jnp.asarray(weights, losses.dtype)[phase] * losses), aux

        gradients, aux = jax.grad(total, has_aux=True)(point)
        last = state.step == cycle - 1
        importance, moments = jax.lax.cond(
            learning,
            lambda: _learn(adam, momentum, state, uses, gradients, last),
            lambda: (state.importance, state.adam),
        )
        state = state._replace(step=(state.step + 1) % cycle, importance=importance, adam=moments)
        return Update(gradients, point, jnp.logical_not(learning)), aux, state

    return GradientMethod(init, apply, cycle=cycle)


@exact
def fuse(start: Any, trained: Any, importance: Any, uses: Any) -> Any:
    """w of the module's equation, over the exits that use a tensor.

    Trees like the parameters: `start` of w_0, `trained` of w_1..w_N stacked (N, …), `importance`
    of m (N,), `uses` of constants (N,) bool.
    """

    def fused(w0, ws, m, used):
        shares = jax.nn.sigmoid(m) * used
        moved = jnp.tensordot(shares, ws - w0, axes=1)
        moved = moved / jnp.sum(shares)
        return w0 + moved if used.any() else w0

    return jax.tree.map(fused, start, trained, importance, uses)


def _begin_phase(state: State, params: Any, phase: jax.Array, first: jax.Array) -> State:
    """At the first step of a phase: keep what the phase before has left in `params`."""

    def keep(state):
        kept = jnp.maximum(phase - 1, 0)  # overwritten in time where there was none
        return state._replace(
            start=_chosen(phase == 0, params, state.start),
            trained=jax.tree.map(lambda ws, w: ws.at[kept].set(w), state.trained, params),
            before=state.importance,
        )

    return jax.lax.cond(first, keep, lambda state: state, state)


def _learn(adam, momentum, state: State, uses, gradients, last):
    """One step of Adam on m, given the loss's gradient at the fused parameters."""
    _, pull = jax.vjp(lambda m: fuse(state.start, state.trained, m, uses), state.importance)
    updates, moments = adam.update(*pull(gradients), state.adam, state.importance)
    importance = optax.apply_updates(state.importance, updates)
    mixed = jax.tree.map(
        lambda new, old: (1 - momentum) * new + momentum * old, importance, state.before
    )
    return _chosen(last, mixed, importance), moments


def _chosen(condition: jax.Array, one: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)


def _loss_weights(num_exits, auxiliary, auxiliary_weights) -> list[list[float]]:
    """Weights of the N losses in each of the N + 1 phases."""
    if not auxiliary >= 0 or any(not v >= 0 for v in auxiliary_weights):
        raise ValueError(
            "gradients.options.auxiliary and auxiliary_weights must not be negative, "
            f"got {auxiliary} and {auxiliary_weights}"
        )
    if auxiliary_weights and len(auxiliary_weights) != num_exits:
        raise ValueError(
            f"gradients.options.auxiliary_weights has {len(auxiliary_weights)} values, "
            f"the network has {num_exits} exits"
        )
    standard = _PUBLISHED if num_exits == len(_PUBLISHED) else (1.0,) * num_exits
    others = [auxiliary * v for v in auxiliary_weights or standard]
    phases = [[1.0 if i == j else others[j] for j in range(num_exits)] for i in range(num_exits)]
    return [*phases, [1.0] * num_exits]
