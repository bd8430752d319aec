"""VGG7 and VGG16 with an exit after every convolution (the paper, section 4.1).

Convolution, ReLU, batch norm, in this order; a 2×2 max pool ends each group. An exit is global
average pooling and a dense layer without bias. The official code stores each convolution and
dense layer as two kernels, cut where surgery cuts the input; here it is one, and drawn as one
unless `split_init` is asked for.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from dfs_jax.models.layers import (
    BatchNorm,
    Conv,
    Dense,
    Feature,
    Initializer,
    average_pool,
    global_average_pool,
    plain,
    relu,
    split_torch_default,
    torch_default,
)
from dfs_jax.models.multi_exit import MultiExit
from dfs_jax.ops.pooling import max_pool


class VGG(MultiExit):
    """VGG of groups of 3×3 convolutions.

    Attributes:
      widths: output channels of the convolutions of each group.
      split_init: draw initial weights as the official code does: of each kernel the inputs that
        surgery shares and the others apart, both with a fan_in of their own. They are larger then,
        and depend on `surgery.beta` (where nothing is partitioned too, as there), which initial
        weights otherwise never do.
    """

    widths: Sequence[Sequence[int]]
    split_init: bool = False

    def setup(self):
        widths = self._flat_widths
        # By what is read, the images first.
        inits = [torch_default(), *(self._init(i, width) for i, width in enumerate(widths))]
        self.convs = [
            Conv(width, 3, use_bias=i == 0, dtype=self.dtype, kernel_init=inits[i])
            for i, width in enumerate(widths)
        ]
        self.heads = [
            Dense(self.num_classes, use_bias=False, dtype=self.dtype, kernel_init=init)
            for init in inits[1:]
        ]
        # One each: a shared one would draw by the number of exits that ran before.
        self.dropouts = [nn.Dropout(self.dropout_rate) for _ in widths]
        self.norms = [BatchNorm(dtype=self.dtype) for _ in widths]
        self.collaborators = self.collaborations(widths)
        if self.adapters:
            self.adapter_layers = [_Adapter(widths[-1], dtype=self.dtype) for _ in widths[:-1]]

    def _init(self, i: int, inputs: int) -> Initializer:
        """Of a kernel that reads the `inputs` channels after segment i."""
        if not self.split_init:
            return torch_default()
        cut = min(i, self.num_exits - 2)  # the official code splits what reads the last one too
        return split_torch_default(self.surgery.at(cut).cut(inputs))

    @property
    def _flat_widths(self) -> list[int]:
        return [width for group in self.widths for width in group]

    @property
    def _pools(self) -> list[int]:
        """Number of max pools up to and including that of each segment."""
        ends = list(itertools.accumulate(len(group) for group in self.widths))
        return [sum(end <= i + 1 for end in ends) for i in range(self.num_exits)]

    @property
    def num_exits(self) -> int:
        return len(self._flat_widths)

    @property
    def smallest_image(self) -> int:
        return 2 ** len(self.widths)

    def segment(self, i: int, x: Feature, *, train: bool) -> tuple[jax.Array]:
        x = self.norms[i](relu(self.convs[i](x)), train=train)
        ends_group = self._pools[i] > (self._pools[i - 1] if i else 0)
        return (max_pool(x, 2, 2) if ends_group else x,)

    def exit_input(self, i: int, seen: Feature, uncut: Feature) -> tuple[Feature, ...]:
        # An exit's feature is the whole map, which adapters give a gradient to.
        return (seen, uncut) if self.adapters or self.surgery.hides else (seen,)

    def head(self, i: int, exit_input: Any, *, train: bool) -> tuple[jax.Array, jax.Array]:
        pooled = global_average_pool(exit_input[0])
        kept = jax.tree.map(lambda x: self.dropouts[i](x, deterministic=not train), pooled)
        logits = self.heads[i](kept)
        feature = plain(exit_input[-1])
        if self.adapters and i == self.num_exits - 1:
            feature = _channels_first(feature)
        return logits, feature

    def adapter(self, i: int, exit_input: Any, feature: jax.Array) -> jax.Array:
        return self.adapter_layers[i](feature, window=2 ** (self._pools[-1] - self._pools[i]))


class _Adapter(nn.Module):
    """A map (B, H, W, C) pooled to the last map's size, and a dense layer to its elements."""

    channels: int  # of the last map
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, window: int) -> jax.Array:
        x = average_pool(x, window)
        width = self.channels * x.shape[1] * x.shape[2]
        return Dense(width, use_bias=False, dtype=self.dtype, name="dense")(_channels_first(x))


def _channels_first(x: jax.Array) -> jax.Array:
    """(B, H, W, C) flattened in the order C, H, W: (B, C·H·W)."""
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
