"""The contract of every network: a chain of segments, each followed by an exit.

    images ─► segment 1 ─► surgery ─► segment 2 ─► … ─► segment N
                              │                            │
                              ▼                            ▼
                            exit 1                       exit N

`MultiExit` walks the chain and applies surgery, here and nowhere else. A network fills in
`segment` and `head` (and, where it needs to, `exit_input` and `adapter`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfs_jax.models.layers import Dense, Feature, full_precision
from dfs_jax.surgery import Partitioned, Surgery

# boundary(i, feature) -> (towards the next segment, towards exit i), just before surgery:
# where gradient methods scale or detach what flows between segments.
Boundary = Callable[[int, Feature], tuple[Feature, Feature]]


class ExitOutputs(NamedTuple):
    """What a network returns, shallow to deep, one entry per exit."""

    logits: tuple[jax.Array, ...]  # (B, num_classes) each
    features: tuple[jax.Array, ...]  # what feature distillation compares


class MultiExit(nn.Module, kw_only=True):
    """A network of N segments and exits.

    Attributes:
      num_classes: width of the logits.
      surgery: how the feature between two segments is shared with the exit there.
      dtype: type of the computation; parameters, statistics and logits are at least float32.
      dropout_rate: before each exit's last dense layer, in networks that have it.
      adapters: add the linear layers that only feature distillation uses.
      rematerialise: recompute each segment in the backward pass instead of keeping what it made.
    """

    num_classes: int
    surgery: Surgery
    dtype: Any = jnp.float32
    dropout_rate: float = 0.0
    adapters: bool = False
    rematerialise: bool = False

    # What a network defines.

    @property
    def num_exits(self) -> int:
        raise NotImplementedError

    @property
    def smallest_image(self) -> int:
        """Side, in pixels, of the smallest images the network takes."""
        raise NotImplementedError

    def segment(self, i: int, *features: Feature, train: bool) -> tuple[Feature, ...]:
        """Features after segment i, the last of them the one that surgery cuts.

        Segment 0 receives the images (B, H, W, C); a later one what the segment before
        returned, its last feature being what surgery left for it.
        """
        raise NotImplementedError

    def head(self, i: int, exit_input: Any, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Logits (B, num_classes) and feature of exit i."""
        raise NotImplementedError

    def exit_input(self, i: int, seen: Feature, uncut: Feature) -> Any:
        """What exit i is given: the feature as surgery left it, and `uncut` where it needs that."""
        del i, uncut
        return seen

    def adapter(self, i: int, exit_input: Any, feature: jax.Array) -> jax.Array:
        """Feature of exit i brought to the shape of the last one's: a dense layer."""
        del exit_input
        return self.adapter_layers[i](feature)

    def dense_adapters(self, width: int) -> list[Dense]:
        """For `setup`: one layer to `width` features per exit but the last, if any are wanted."""
        count = self.num_exits - 1 if self.adapters else 0
        return [Dense(width, dtype=self.dtype) for _ in range(count)]

    # What everything else calls.

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        num_exits: int | None = None,
        boundary: Boundary | None = None,
    ) -> ExitOutputs:
        """Outputs of exits 1..num_exits (all by default) for images (B, H, W, C).

        With fewer exits this is a prefix network: nothing deeper is traced. `train=True` needs
        `mutable=["batch_stats"]`, and a "dropout" key where there is dropout. Raises ValueError
        for images that are too small and for a number of exits that the network does not have.
        """
        count = self.num_exits if num_exits is None else num_exits
        if not 1 <= count <= self.num_exits:
            raise ValueError(f"num_exits must lie in 1..{self.num_exits}, got {num_exits}")
        carry, logits, features = images, [], []
        for i in range(count):
            carry, exit_input = self.advance(carry, i, train=train, boundary=boundary)
            answer, feature = self.classify(exit_input, i, train=train)
            logits.append(answer)
            features.append(feature)
        return ExitOutputs(tuple(logits), tuple(features))

    def advance(
        self, carry: Any, i: int, *, train: bool = False, boundary: Boundary | None = None
    ) -> tuple[Any, Any]:
        """Run segment i (static, from 0) and surgery: (carry for segment i+1, input of exit i).

        `carry` is the images (B, H, W, C) for i = 0 and opaque afterwards; None after the last.
        """
        if i == 0:
            self._check_images(carry)
        inputs = carry if i else (carry,)
        if self.rematerialise:
            features = nn.remat(lambda self, *x: self.segment(i, *x, train=train))(self, *inputs)
        else:
            features = self.segment(i, *inputs, train=train)
        *others, cut = features
        if i == self.num_exits - 1:
            return None, self.exit_input(i, cut, cut)
        onwards, aside = boundary(i, cut) if boundary else (cut, cut)
        exit_input = self.exit_input(i, self.surgery.to_exit(aside), aside)
        return (*others, self.surgery.to_next(onwards)), exit_input

    def classify(
        self, exit_input: Any, i: int, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Logits (B, num_classes) and distillation feature of exit i (static, from 0)."""
        logits, feature = self.head(i, exit_input, train=train)
        if self.adapters and i < self.num_exits - 1:
            feature = self.adapter(i, exit_input, feature)
        wide = full_precision(self.dtype)
        return logits.astype(wide), feature.astype(wide)

    def _check_images(self, images: jax.Array) -> None:
        smallest = self.smallest_image
        if images.ndim != 4 or min(images.shape[1:3]) < smallest:
            raise ValueError(
                f"{type(self).__name__} takes images (batch, height, width, channels) of at "
                f"least {smallest}x{smallest} pixels, got shape {tuple(images.shape)}"
            )


def plain(x: Feature) -> jax.Array:
    """The feature as an array whose dead channels have no gradient."""
    return x.stopped() if isinstance(x, Partitioned) else x
