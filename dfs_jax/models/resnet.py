"""ResNets for 32×32 images with an exit after each of their four stages (the paper, section 4.1).

The blocks are torchvision's (stride in the 3×3 convolution of a bottleneck), the stem is one
3×3 convolution. The first three exits have the attention and the separable convolutions of
self-distillation networks (arXiv 1905.08094); the last one is global average pooling and a
dense layer.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from dfs_jax.models.layers import (
    BatchNorm,
    Conv,
    Dense,
    Feature,
    global_average_pool,
    he_fan_out,
    plain,
    relu,
)
from dfs_jax.models.multi_exit import MultiExit

_Conv = functools.partial(Conv, kernel_init=he_fan_out)


class ResNet(MultiExit):
    """ResNet of four stages, the first at the resolution of the image, each further one at half.

    Attributes:
      depths: blocks of each stage.
      width: channels of the first stage's 3×3 convolutions; every stage doubles it.
      bottleneck: 1×1, 3×3 and 1×1 convolutions a block, the last four times as wide, instead of
        two 3×3 ones.
    """

    depths: Sequence[int]
    width: int = 64
    bottleneck: bool = False

    def setup(self):
        self.conv1 = _Conv(self.width, 3, dtype=self.dtype)
        self.bn1 = BatchNorm(dtype=self.dtype)
        self.layers = [
            [
                Block(
                    self.width * 2**i,
                    strides=2 if i and not j else 1,
                    bottleneck=self.bottleneck,
                    dtype=self.dtype,
                )
                for j in range(depth)
            ]
            for i, depth in enumerate(self.depths)
        ]
        widths = [self.width * 2**i * (4 if self.bottleneck else 1) for i in range(self.num_exits)]
        self.exits = [
            Exit(
                self.num_classes,
                widths=widths[i + 1 :],
                dropout_rate=self.dropout_rate,
                dtype=self.dtype,
            )
            for i in range(self.num_exits)
        ]
        self.adapter_layers = self.dense_adapters(widths[-1])
        self.collaborators = self.collaborations(widths[-1:] * len(widths))

    @property
    def num_exits(self) -> int:
        return len(self.depths)

    @property
    def smallest_image(self) -> int:
        return 2 ** (len(self.depths) - 1)

    def segment(self, i: int, x: Feature, *, train: bool) -> tuple[jax.Array]:
        if i == 0:
            x = relu(self.bn1(self.conv1(x), train=train))
        for block in self.layers[i]:
            x = block(x, train=train)
        return (x,)

    def head(self, i: int, exit_input: Any, *, train: bool) -> tuple[jax.Array, jax.Array]:
        return self.exits[i](exit_input, train=train)


class Block(nn.Module):
    """Residual block (B, H, W, C) -> (B, H / strides, W / strides, features or 4 · features)."""

    features: int
    strides: int
    bottleneck: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Feature, *, train: bool) -> jax.Array:
        if self.bottleneck:
            convs = [
                (self.features, 1, 1),
                (self.features, 3, self.strides),
                (4 * self.features, 1, 1),
            ]
        else:
            convs = [(self.features, 3, self.strides), (self.features, 3, 1)]
        y = x
        for k, (width, size, strides) in enumerate(convs, 1):
            y = relu(y) if k > 1 else y
            y = _Conv(width, size, strides, dtype=self.dtype, name=f"conv{k}")(y)
            y = BatchNorm(dtype=self.dtype, name=f"bn{k}")(y, train=train)
        if x.shape == y.shape:
            shortcut = plain(x)
        else:
            shortcut = _Conv(
                y.shape[-1], 1, self.strides, dtype=self.dtype, name="downsample_conv"
            )(x)
            shortcut = BatchNorm(dtype=self.dtype, name="downsample_bn")(shortcut, train=train)
        return relu(y + shortcut)


class Exit(nn.Module):
    """Attention, one separable convolution per width, average pooling and a dense layer.

    Without `widths` (the last exit) only pooling and the dense layer. The feature is what the
    pooling gives, (B, widths[-1]).
    """

    num_classes: int
    widths: Sequence[int]
    dropout_rate: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Feature, *, train: bool) -> tuple[jax.Array, jax.Array]:
        if self.widths:
            x = plain(x) * Attention(dtype=self.dtype, name="attention")(x, train=train)
        for j, width in enumerate(self.widths):
            x = SeparableConv(width, dtype=self.dtype, name=f"scala_{j}")(x, train=train)
        feature = global_average_pool(x)
        kept = nn.Dropout(self.dropout_rate, deterministic=not train)(feature)
        return Dense(self.num_classes, dtype=self.dtype, name="fc")(kept), feature


class Attention(nn.Module):
    """Factors in (0, 1) for every value of x (B, H, W, C), from a map of half its size."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Feature, *, train: bool) -> jax.Array:
        y = SeparableConv(x.shape[-1], dtype=self.dtype, name="sep")(x, train=train)
        y = relu(BatchNorm(dtype=self.dtype, name="bn")(y, train=train))
        # Pixel centres at halves, the edge repeated, as PyTorch's align_corners=False.
        return jax.nn.sigmoid(jax.image.resize(y, (*x.shape[:3], y.shape[-1]), "bilinear"))


class SeparableConv(nn.Module):
    """Two depthwise 3×3 convolutions, the first of stride 2, each with a 1×1 one, BN and ReLU."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Feature, *, train: bool) -> jax.Array:
        channels = x.shape[-1]
        for k, (width, strides) in enumerate([(channels, 2), (self.features, 1)], 1):
            depthwise = _Conv(
                channels, 3, strides, depthwise=True, dtype=self.dtype, name=f"depthwise{k}"
            )
            x = _Conv(width, 1, dtype=self.dtype, name=f"pointwise{k}")(depthwise(x))
            x = relu(BatchNorm(dtype=self.dtype, name=f"bn{k}")(x, train=train))
        return x
