"""What a gradient method works on: the exits' losses as functions of the parameters.

One `Problem` is one step's batch, seen through the network and the objective. All its passes
share one dropout key and start from the same batch statistics, so that every running
statistic moves once a step, however many passes a method makes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dfs_jax.models import inputs
from dfs_jax.objectives import Objective, Teacher

Params = Any
Batch = Mapping[str, jax.Array]  # inputs by name, and "label" (B,) or (B, K)


class Aux(NamedTuple):
    """By-products of a pass."""

    losses: jax.Array  # (N,), or (1,) for one exit
    logits: tuple[jax.Array, ...]  # (B, K) each, shallow to deep
    batch_stats: Any  # running statistics after the pass


@dataclasses.dataclass(frozen=True)
class Problem:
    """The losses of N exits on one batch; every method is written against this.

    Attributes:
      network: a module with the contract of `models/multi_exit.py`.
      objective: the loss of each exit.
      batch: images and labels.
      batch_stats: running statistics before the step.
      rng: dropout key of the step.
    """

    network: Any
    objective: Objective
    batch: Batch
    batch_stats: Any
    rng: jax.Array

    @property
    def num_exits(self) -> int:
        return self.network.num_exits

    def losses(
        self, params: Params, *, batch: Batch | None = None, boundary: Callable | None = None
    ) -> tuple[jax.Array, Aux]:
        """Losses (N,) of all exits, from one `forward` pass."""
        _, aux = self.forward(params, batch=batch, boundary=boundary)
        return aux.losses, aux

    def example_losses(
        self, params: Params, *, batch: Batch | None = None, boundary: Callable | None = None
    ) -> jax.Array:
        """Losses (B, N) of every example at every exit, from one `forward` pass."""
        return self.forward(params, batch=batch, boundary=boundary)[0]

    def forward(
        self, params: Params, *, batch: Batch | None = None, boundary: Callable | None = None
    ) -> tuple[jax.Array, Aux]:
        """Losses (B, N) of every example at every exit, from one pass of the whole network.

        `batch` takes the place of the step's own. `boundary(i, feature) -> (to next segment, to
        exit)` acts just before surgery.
        """
        batch = self.batch if batch is None else batch
        outputs, batch_stats = self.run(params, inputs.of_batch(batch), boundary=boundary)
        each = self.exit_losses(outputs.logits, outputs.features, batch)
        losses = jnp.stack(each, axis=-1)
        return losses, Aux(jnp.mean(losses, axis=0), outputs.logits, batch_stats)

    def exit_loss(
        self,
        params: Params,
        i: int,
        *,
        batch: Batch | None = None,
        boundary: Callable | None = None,
        teacher: Teacher | None = None,
    ) -> tuple[jax.Array, Aux]:
        """Loss () of exit i (from 0) alone, from the prefix network that ends there.

        `teacher` comes from `self.teacher`, once a step, if the objective needs one.
        """
        batch = self.batch if batch is None else batch
        outputs, batch_stats = self.run(
            params, inputs.of_batch(batch), num_exits=i + 1, boundary=boundary
        )
        answer = outputs.logits[i], outputs.features[i]
        examples = self.objective.example_losses(
            i, self.num_exits, *answer, batch["label"], teacher
        )
        loss = jnp.mean(examples)
        return loss, Aux(loss[None], outputs.logits, batch_stats)

    def teacher(self, params: Params) -> Teacher | None:
        """What `exit_loss` distils from, or None if the objective does not distil."""
        if not self.objective.needs_teacher:
            return None
        outputs, _ = self.run(params, inputs.of_batch(self.batch))
        return Teacher(*jax.lax.stop_gradient((outputs.logits[-1], outputs.features[-1])))

    # The pieces of a pass, for methods that decide what flows back where.

    def run(
        self, params: Params, *given: Any, batch_stats: Any = None, **options: Any
    ) -> tuple[Any, Any]:
        """The network's result in training mode, and the running statistics after it.

        `given` and `options` are those of the network's call, or with method="advance" and
        "classify" those of one segment and one exit, whose `batch_stats` are handed from call to
        call, from `self.batch_stats` on.
        """
        batch_stats = self.batch_stats if batch_stats is None else batch_stats
        result, updated = self.network.apply(
            {"params": params, "batch_stats": batch_stats},
            *given,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": self.rng},
            **options,
        )
        return result, updated.get("batch_stats", batch_stats)

    def exit_losses(
        self,
        logits: Sequence[jax.Array],
        features: Sequence[jax.Array],
        batch: Batch | None = None,
    ) -> list[jax.Array]:
        """For all N exits' logits and features the losses (B,) of the examples.

        No gradient flows from an exit's loss into another exit's answer.
        """
        labels = (self.batch if batch is None else batch)["label"]
        teacher = Teacher(logits[-1], features[-1])
        return [
            self.objective.example_losses(i, self.num_exits, z, f, labels, teacher)
            for i, (z, f) in enumerate(zip(logits, features, strict=True))
        ]
