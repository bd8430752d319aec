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
        return self.example_losses_and_aux(params, batch=batch, boundary=boundary)[0]

    def example_losses_and_aux(
        self, params: Params, *, batch: Batch | None = None, boundary: Callable | None = None
    ) -> tuple[jax.Array, Aux]:
        """`example_losses`, with the by-products of the pass."""
        return self._pass(params, None, batch, boundary, None)

    def teacher(self, params: Params, *, batch: Batch | None = None) -> Teacher | None:
        """What `exit_loss` distils from, or None if the objective does not distil."""
        if not self.objective.needs_teacher:
            return None
        outputs, _ = self._apply(params, batch or self.batch, self.num_exits, None)
        return Teacher(*jax.lax.stop_gradient((outputs.logits[-1], outputs.features[-1])))

    def outputs(self, params: Params, images: jax.Array) -> Any:
        """Logits and features of all exits for `images` (B, H, W, C), in training mode."""
        return self._run(params, self.batch_stats, images)[0]

    # The same pass, segment by segment: for methods that decide what flows back where.

    def advance(self, params: Params, carry: Any, i: int, batch_stats: Any) -> tuple[Any, Any]:
        """Segment i (static, from 0): ((carry for segment i+1, input of exit i), batch_stats).

        `carry` is the images for i = 0. `batch_stats` are handed from call to call, from
        `self.batch_stats` on.
        """
        return self._run(params, batch_stats, carry, i, method="advance")

    def classify(
        self,
        params: Params,
        exit_input: Any,
        i: int,
        batch_stats: Any,
        previous: jax.Array | None = None,
    ) -> tuple[Any, Any]:
        """Exit i (static, from 0): ((logits (B, K), feature), batch_stats).

        `previous` are the logits of the exit before it; no gradient flows into them.
        """
        return self._run(params, batch_stats, exit_input, i, method="classify", previous=previous)

    def losses_of(self, logits: Sequence[jax.Array], features: Sequence[jax.Array]) -> jax.Array:
        """Losses (N,) of all exits' logits and features, those of the whole batch.

        No gradient flows from an exit's loss into another exit's answer.
        """
        teacher = Teacher(logits[-1], features[-1])
        answers = enumerate(zip(logits, features, strict=True))
        return jnp.stack(
            [jnp.mean(self._exit_losses(i, z, f, self.batch, teacher)) for i, (z, f) in answers]
        )

    def _apply(self, params, batch, num_exits, boundary):
        return self._run(
            params, self.batch_stats, batch["image"], num_exits=num_exits, boundary=boundary
        )

    def _run(self, params, batch_stats, *args, **kwargs):
        """The network's result in training mode, and the running statistics after it."""
        result, updated = self.network.apply(
            {"params": params, "batch_stats": batch_stats},
            *args,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": self.rng},
            **kwargs,
        )
        return result, updated.get("batch_stats", batch_stats)

    def _exit_losses(self, i, logits, feature, batch, teacher):
        return self.objective.example_losses(
            i, self.num_exits, logits, feature, batch["label"], teacher
        )

    def _pass(self, params, exit_index, batch, boundary, teacher):
        """Example losses (B, N) of all exits, or (B, 1) of one, and the pass's by-products."""
        batch = self.batch if batch is None else batch
        count = self.num_exits if exit_index is None else exit_index + 1
        outputs, statistics = self._apply(params, batch, count, boundary)
        if count == self.num_exits:
            teacher = Teacher(outputs.logits[-1], outputs.features[-1])
        wanted = range(count) if exit_index is None else (exit_index,)
        losses = [
            self._exit_losses(i, outputs.logits[i], outputs.features[i], batch, teacher)
            for i in wanted
        ]
        stacked = jnp.stack(losses, axis=-1)
        return stacked, Aux(jnp.mean(stacked, axis=0), outputs.logits, statistics)
