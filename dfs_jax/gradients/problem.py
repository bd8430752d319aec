"""What a gradient method works on: the exits' losses as functions of the parameters.

One `Problem` is one step's batch, seen through the network and the objective. All its passes
share one dropout key and start from the same batch statistics, so that every running
statistic moves once a step, however many passes a method makes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dfs_jax.objectives import Objective, Teacher

Params = Any
Batch = Mapping[str, jax.Array]  # "image" (B, H, W, C), "label" (B,) or (B, K)


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
        """Losses (N,) of all exits, from one forward pass of the whole network.

        `boundary(i, feature) -> (to next segment, to exit)` acts just before surgery.
        """
        per_example, aux = self._pass(params, None, batch, boundary, None)
        return jnp.mean(per_example, axis=0), aux

    def exit_loss(
        self,
        params: Params,
        i: int,
        *,
        batch: Batch | None = None,
        boundary: Callable | None = None,
        teacher: Teacher | None = None,
    ) -> tuple[jax.Array, Aux]:
        """Loss of exit i (from 0) alone, from the prefix network that ends there.

        `teacher` comes from `self.teacher`, once a step, if the objective needs one.
        """
        per_example, aux = self._pass(params, i, batch, boundary, teacher)
        return jnp.mean(per_example[:, -1]), aux

    def example_losses(
        self, params: Params, *, batch: Batch | None = None, boundary: Callable | None = None
    ) -> jax.Array:
        """Losses (B, N) of every example at every exit."""
        return self._pass(params, None, batch, boundary, None)[0]

    def teacher(self, params: Params, *, batch: Batch | None = None) -> Teacher | None:
        """What `exit_loss` distils from, or None if the objective does not distil."""
        if not self.objective.needs_teacher:
            return None
        outputs, _ = self._apply(params, batch or self.batch, self.num_exits, None)
        return Teacher(*jax.lax.stop_gradient((outputs.logits[-1], outputs.features[-1])))

    def _apply(self, params, batch, num_exits, boundary):
        return self.network.apply(
            {"params": params, "batch_stats": self.batch_stats},
            batch["image"],
            train=True,
            num_exits=num_exits,
            boundary=boundary,
            mutable=["batch_stats"],
            rngs={"dropout": self.rng},
        )

    def _pass(self, params, exit_index, batch, boundary, teacher):
        """Example losses (B, N) of all exits, or (B, 1) of one, and the pass's by-products."""
        batch = self.batch if batch is None else batch
        count = self.num_exits if exit_index is None else exit_index + 1
        outputs, updated = self._apply(params, batch, count, boundary)
        if count == self.num_exits:
            teacher = Teacher(outputs.logits[-1], outputs.features[-1])
        wanted = range(count) if exit_index is None else (exit_index,)
        losses = [
            self.objective.example_losses(
                i, self.num_exits, outputs.logits[i], outputs.features[i], batch["label"], teacher
            )
            for i in wanted
        ]
        stacked = jnp.stack(losses, axis=-1)
        statistics = updated.get("batch_stats", self.batch_stats)
        return stacked, Aux(jnp.mean(stacked, axis=0), outputs.logits, statistics)
