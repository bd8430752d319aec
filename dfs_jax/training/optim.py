"""The optimizer and its learning rate, from `config.optimizer`.

Registries of optimizers and of schedules; a new one is a function and an entry. What gets a
gradient, and how several exits' gradients become one, is decided elsewhere.
"""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import optax

from dfs_jax.config import ConfigError, limits
from dfs_jax.config.errors import shown


def create_optimizer(
    config: ml_collections.ConfigDict, steps_per_epoch: float, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The update rule, and the learning rate as a function of the number of completed updates.

    Args:
      config: the whole configuration; its section `optimizer` is read.
      steps_per_epoch: updates per pass over the training split, need not be whole.
      total_steps: length of the run in updates; the cosine schedule ends there.

    Raises:
      ConfigError: for an unknown name or a value out of range.
    """
    limits.check(config, "optimizer")
    o = config.optimizer
    if steps_per_epoch <= 0 or total_steps < 1:
        raise ConfigError(
            f"a run of {total_steps} steps with {steps_per_epoch} steps per epoch has no updates"
        )
    schedule = create_schedule(config, steps_per_epoch, total_steps)
    update = _look_up(OPTIMIZERS, "name", o.name)(o, schedule)
    if o.clip_norm:
        update = optax.chain(optax.clip_by_global_norm(o.clip_norm), update)
    return update, schedule


def create_schedule(
    config: ml_collections.ConfigDict, steps_per_epoch: float, total_steps: int
) -> optax.Schedule:
    """The learning rate alone; arguments and errors as for `create_optimizer`.

    With w warm-up steps the rate of step s is multiplied by t = min(1, s / w) ("linear") or by
    (1 - cos(π t)) / 2 ("cosine"). Milestones count from the start of the run; cosine decay begins
    where the warm-up ends. A run may be shorter than its warm-up or its milestones (a quick try
    of a long recipe).
    """
    o = config.optimizer
    rise = _look_up(WARMUPS, "warmup", o.warmup)
    warmup = _steps(o.warmup_epochs, steps_per_epoch)
    after = _look_up(SCHEDULES, "schedule", o.schedule)(o, steps_per_epoch, total_steps, warmup)
    if warmup == 0:
        return after
    return lambda step: rise(jnp.minimum(1.0, step / warmup)) * after(step)


WARMUPS: dict[str, Callable] = {
    "linear": lambda t: t,
    "cosine": lambda t: 0.5 * (1.0 - jnp.cos(jnp.pi * t)),
}


def _sgd(o: ml_collections.ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """PyTorch's SGD: g' = g + λp on every parameter; v = μv + g'; p -= ηv (Nesterov: g' + μv).

    The rate multiplies when the velocity is applied, so a change of it acts on all of v.
    """
    if o.nesterov and o.momentum == 0:
        raise ConfigError("config.optimizer.nesterov = True needs config.optimizer.momentum > 0")
    parts = []
    if o.weight_decay:
        parts.append(optax.add_decayed_weights(o.weight_decay))
    if o.momentum:
        parts.append(optax.trace(decay=o.momentum, nesterov=o.nesterov))
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


def _adamw(o: ml_collections.ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) as in PyTorch: p -= η (m̂ / (sqrt(v̂) + ε) + λp), every parameter.

    The first moment decays by `momentum`; β₂ = 0.999 and ε = 1e-8 are PyTorch's.
    """
    return optax.adamw(
        schedule,
        b1=o.momentum,
        b2=0.999,
        eps=1e-8,
        weight_decay=o.weight_decay,
        nesterov=o.nesterov,
    )


def _lamb(o: ml_collections.ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """LAMB (arXiv 1904.00962, algorithm 2), for large batches: AdamW whose update of each array
    is scaled to the norm of that array. β₂ = 0.999 and ε = 1e-6 are the paper's.
    """
    if o.nesterov:
        raise ConfigError(f"config.optimizer.nesterov = True has no meaning for {o.name}")
    return optax.lamb(schedule, b1=o.momentum, b2=0.999, eps=1e-6, weight_decay=o.weight_decay)


def _lars(o: ml_collections.ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """LARS (arXiv 1708.03888), for large batches: SGD whose gradient of each array is scaled to
    0.001 times the norm of that array. As usual, arrays of one dimension (biases, batch norm)
    are neither scaled nor decayed.
    """

    def matrices(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.lars(
        schedule,
        weight_decay=o.weight_decay,
        weight_decay_mask=matrices,
        trust_ratio_mask=matrices,
        momentum=o.momentum,
        nesterov=o.nesterov,
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lamb": _lamb,
    "lars": _lars,
    "sgd": _sgd,
}


def _multistep(o, steps_per_epoch, total_steps, warmup) -> optax.Schedule:
    """η · rate^(number of milestones reached): the usual rule.

    The official code raises the rate to the sum of floor(epoch / milestone), which counts a
    milestone twice from epoch 2 · milestone on; with the published milestones the two agree.
    """
    milestones = tuple(o.milestones)
    if any(m <= 0 for m in milestones) or any(a >= b for a, b in itertools.pairwise(milestones)):
        raise ConfigError(
            f"config.optimizer.milestones = {shown(milestones)} must be epochs above 0, increasing"
        )
    boundaries = [_steps(m, steps_per_epoch) for m in milestones]
    # A table, so that the powers are those of Python's float64.
    rates = [o.learning_rate * o.decay_rate**i for i in range(len(milestones) + 1)]

    def schedule(step):
        reached = jnp.sum(jnp.asarray(step) >= jnp.asarray(boundaries, int), dtype=int)
        return jnp.asarray(rates, float)[reached]

    return schedule


def _cosine(o, steps_per_epoch, total_steps, warmup) -> optax.Schedule:
    """η · (1 + cos(π t)) / 2 with t from 0 after the warm-up to 1 at the end of the run."""

    def schedule(step):
        t = jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        return o.learning_rate * 0.5 * (1.0 + jnp.cos(jnp.pi * t))

    return schedule


def _constant(o, steps_per_epoch, total_steps, warmup) -> optax.Schedule:
    return lambda step: jnp.asarray(o.learning_rate, float)


SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "multistep": _multistep,
    "cosine": _cosine,
    "constant": _constant,
}


def without_effect(o: ml_collections.ConfigDict, epochs: float) -> list[str]:
    """Sentences on what a run of `epochs` has of the schedule `o` in name only."""
    found = []
    if o.learning_rate == 0:
        found.append("optimizer.learning_rate is 0: no parameter will move")
    if o.warmup_epochs > epochs:
        found.append(
            f"optimizer.warmup_epochs = {o.warmup_epochs:g} is longer than the run of {epochs:.3g} "
            "epochs: the learning rate never reaches its peak"
        )
    if o.schedule == "multistep" and o.milestones and min(o.milestones) >= epochs:
        found.append(
            f"optimizer.milestones = {shown(tuple(o.milestones))} lie beyond the run of "
            f"{epochs:.3g} epochs: the learning rate is never lowered"
        )
    return found


def _steps(epochs: float, steps_per_epoch: float) -> int:
    """The first step that is not before `epochs`; the largest there can be if it is beyond."""
    # Rounded first: 3 · (100 / 3) is a little more than 100 in floating point.
    return min(math.ceil(round(epochs * steps_per_epoch, 6)), limits.LARGEST_INTEGER)


def _look_up(registry: dict[str, Callable], field: str, name: str) -> Callable:
    if name not in registry:
        raise ConfigError(
            f"config.optimizer.{field} = {shown(name)} is unknown; known: {', '.join(registry)}"
        )
    return registry[name]
