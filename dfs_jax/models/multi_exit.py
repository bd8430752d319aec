"""The contract of every network: a chain of segments, each followed by an exit.

    images ─► segment 1 ─► surgery ─► segment 2 ─► … ─► segment N
                              │                            │
                              ▼                            ▼
                            exit 1                       exit N

`MultiExit` walks the chain and applies surgery, here and nowhere else. A network fills in
`segment` and `head` (and, where it needs to, `exit_input` and `adapter`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfs_jax.models.collaboration import Collaboration
from dfs_jax.models.layers import Dense, Feature, full_precision
from dfs_jax.surgery import Surgery

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
      collaboration: every exit but the first sees what the exit before it has answered; see
        `collaboration.py`.
      boosting: share of the logits before that every exit but the first adds to its own, 0 for
        none, as in BoostNet (AAAI 2023, arXiv 2211.16726): z_i = f_i + boosting · z_{i-1}, where
        z_{i-1} is a constant, so that each exit learns what those before it have left. (The
        official code counts its shares from another exit in training than in tests, which does
        not matter with one share for all.) Not together with collaboration.
      rematerialise: recompute each segment in the backward pass instead of keeping what it made.
    """

    num_classes: int
    surgery: Surgery
    dtype: Any = jnp.float32
    dropout_rate: float = 0.0
    adapters: bool = False
    collaboration: bool = False
    boosting: float = 0.0
    rematerialise: bool = False

    # What a network defines.

    @property
    def num_exits(self) -> int:
        raise NotImplementedError

    @property
    def smallest_image(self) -> int:
        """Side, in pixels, of the smallest images the network takes."""
        raise NotImplementedError

    def check_input(self, images: Any) -> None:
        """Raise ValueError, saying what the network takes, unless `images` are that.

        A network on other input than images has a check of its own.
        """
        smallest = self.smallest_image
        if images.ndim != 4 or min(images.shape[1:3]) < smallest:
            raise ValueError(
                f"{type(self).__name__} takes images (batch, height, width, channels) of at "
                f"least {smallest}x{smallest} pixels, got shape {tuple(images.shape)}"
            )

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
        return seen

    def adapter(self, i: int, exit_input: Any, feature: jax.Array) -> jax.Array:
        """Feature of exit i brought to the shape of the last one's: a dense layer."""
        return self.adapter_layers[i](feature)

    def dense_adapters(self, width: int) -> list[Dense]:
        """For `setup`: one layer to `width` features per exit but the last, if any are wanted."""
        count = self.num_exits - 1 if self.adapters else 0
        return [Dense(width, dtype=self.dtype) for _ in range(count)]

    def collaborations(self, widths: Sequence[int]) -> list[Collaboration]:
        """For `setup`: one for every exit but the first, if they are wanted.

        `widths` are the channels that each exit's last dense layer reads, shallow to deep.
        """
        seeing = widths[1:] if self.collaboration else ()
        return [Collaboration(width, self.num_classes, dtype=self.dtype) for width in seeing]

    # What everything else calls.

    @property
    def sees_previous(self) -> bool:
        """Whether every exit but the first needs the logits of the exit before it."""
        return self.collaboration or self.boosting > 0

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
            previous = logits[-1] if logits else None
            answer, feature = self.classify(exit_input, i, train=train, previous=previous)
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
            self.check_input(carry)
        inputs = carry if i else (carry,)
        if self.rematerialise:
            features = nn.remat(lambda self, *x: self.segment(i, *x, train=train))(self, *inputs)
        else:
            features = self.segment(i, *inputs, train=train)
        *others, cut = features
        if i == self.num_exits - 1:
            return None, self.exit_input(i, cut, cut)
        onwards, aside = boundary(i, cut) if boundary else (cut, cut)
        surgery = self.surgery.at(i)
        exit_input = self.exit_input(i, surgery.to_exit(aside), aside)
        return (*others, surgery.to_next(onwards)), exit_input

    def classify(
        self,
        exit_input: Any,
        i: int,
        *,
        train: bool = False,
        previous: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Logits (B, num_classes) and distillation feature of exit i (static, from 0).

        With collaboration or boosting every exit but the first needs `previous`, the logits of
        the exit before it, and raises ValueError without; otherwise they are not looked at.
        """
        logits, feature = self.head(i, exit_input, train=train)
        if self.sees_previous and i:
            logits = logits + self._seen(previous, i, train=train)
        if self.adapters and i < self.num_exits - 1:
            feature = self.adapter(i, exit_input, feature)
        wide = full_precision(self.dtype)
        return logits.astype(wide), feature.astype(wide)

    def _seen(self, previous: jax.Array | None, i: int, *, train: bool) -> jax.Array:
        """What exit i adds to its own logits for those of the exit before it: (B, num_classes)."""
        if previous is None:
            raise ValueError(
                f"classify needs previous=, the logits of exit {i}, to answer for exit {i + 1}, "
                "which sees them"
            )
        if self.collaboration:
            return self.collaborators[i - 1](previous, train=train)
        return self.boosting * jax.lax.stop_gradient(previous)
