"""MSDNet (arXiv 1703.09844): dense connections over several scales, exits on the coarsest.

The general network: scales, growth, layers per segment, pruning of the finest scales and
channel reduction are attributes; `registry.py` holds the published settings. Only the coarsest
scale passes through surgery. What a layer concatenates stays `Partitioned`, so that the layers
after it know which of their inputs are dead, up to the next transition.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from dfs_jax.models.layers import ConvBNReLU, Dense, Feature, global_average_pool
from dfs_jax.models.multi_exit import MultiExit
from dfs_jax.ops.pooling import max_pool
from dfs_jax.surgery import Partitioned


class MSDNet(MultiExit):
    """Multi-scale DenseNet.

    Scale s has `factors[s]` times the channels of the finest one. Layer l = 1..L of L works on
    the scales that are left: the finest one is dropped after every ceil(L / scales) layers.

    Attributes:
      steps: layers of each segment.
      factors: relative width of each scale, finest first.
      bottlenecks: width of the 1×1 convolution before a 3×3 one, over that one's output, by the
        scale it reads.
      initial: channels of the finest scale after the stem.
      growth: channels that a layer adds to the finest scale.
      reduction: share of the channels that is left after a scale was dropped.
      exit_width: channels of an exit's convolutions; None keeps those of its input.
      exit_depth: number of an exit's convolutions, each of stride 2.
      imagenet_stem: 7×7 convolution and max pool, which quarter the image, instead of a 3×3.
    """

    steps: Sequence[int]
    factors: Sequence[int]
    bottlenecks: Sequence[int]
    initial: int = 16
    growth: int = 16
    reduction: float = 0.5
    exit_width: int | None = 128
    exit_depth: int = 2
    imagenet_stem: bool = False

    def setup(self):
        self.stem = Stem(
            [self.initial * factor for factor in self.factors],
            imagenet=self.imagenet_stem,
            dtype=self.dtype,
        )
        scales, depth = len(self.factors), sum(self.steps)
        layers_per_scale = math.ceil(depth / scales)
        width, layers, transitions, exits, exit_widths = self.initial, {}, {}, [], []
        layer = 0
        for i, steps in enumerate(self.steps):
            for j in range(steps):
                layer += 1
                kept = scales - (layer - 1) // layers_per_scale
                before = scales - max(0, layer - 2) // layers_per_scale
                factors = self.factors[scales - before :]
                layers[f"{i}_{j}"] = Layer(
                    growth=self.growth,
                    factors=factors,
                    bottlenecks=self.bottlenecks[scales - before :],
                    kept=kept,
                    dtype=self.dtype,
                )
                width += self.growth
                if before > kept:
                    if self.reduction * width < 1:
                        raise ValueError(
                            f"model.options.reduction = {self.reduction} leaves none of {width} "
                            "channels"
                        )
                    width = math.floor(self.reduction * width)
                    widths = [width * factor for factor in self.factors[scales - kept :]]
                    transitions[f"{i}_{j}"] = Transition(widths, dtype=self.dtype)
            exit_widths.append(self.exit_width or width * self.factors[-1])
            exits.append(
                Exit(
                    self.num_classes,
                    width=exit_widths[-1],
                    depth=self.exit_depth,
                    dropout_rate=self.dropout_rate,
                    dtype=self.dtype,
                )
            )
        self.layers, self.transitions, self.exits = layers, transitions, exits
        self.adapter_layers = self.dense_adapters(exit_widths[-1])
        self.collaborators = self.collaborations(exit_widths)

    @property
    def num_exits(self) -> int:
        return len(self.steps)

    @property
    def smallest_image(self) -> int:
        """An exit's convolutions halve the coarsest map, of which 2×2 pixels must be left."""
        shrink = 2 ** (len(self.factors) - 1) * (4 if self.imagenet_stem else 1)
        return 2**self.exit_depth * shrink + 1

    def segment(self, i: int, *features: Feature, train: bool) -> tuple[Feature, ...]:
        if i == 0:
            features = self.stem(*features, train=train)
        for j in range(self.steps[i]):
            features = self.layers[f"{i}_{j}"](features, train=train)
            if f"{i}_{j}" in self.transitions:
                features = self.transitions[f"{i}_{j}"](features, train=train)
        return features

    def head(self, i: int, exit_input: Any, *, train: bool) -> tuple[jax.Array, jax.Array]:
        return self.exits[i](exit_input, train=train)


class Stem(nn.Module):
    """Images (B, H, W, C) to one feature per scale, finest first, each half the one before."""

    widths: Sequence[int]
    imagenet: bool
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, ...]:
        features = []
        for scale, width in enumerate(self.widths):
            if scale:
                x = ConvBNReLU(width, 3, 2, dtype=self.dtype, name=f"scale_{scale}")(
                    features[-1], train=train
                )
            elif self.imagenet:
                x = ConvBNReLU(width, 7, 2, use_bias=True, dtype=self.dtype, name="scale_0")(
                    images, train=train
                )
                x = max_pool(x, 3, 2, padding=1)
            else:
                x = ConvBNReLU(width, 3, dtype=self.dtype, name="scale_0")(images, train=train)
            features.append(x)
        return tuple(features)


class Layer(nn.Module):
    """One layer: every scale that is kept gains `growth · factor` channels.

    They come from the scale itself and, half of them, from the finer one; the finest scale of
    the network has no finer one. `factors` and `bottlenecks` are those of the scales received,
    of which the coarsest `kept` remain.
    """

    growth: int
    factors: Sequence[int]
    bottlenecks: Sequence[int]
    kept: int
    dtype: Any

    @nn.compact
    def __call__(self, features: Sequence[Feature], *, train: bool) -> tuple[Feature, ...]:
        dropped = len(features) - self.kept
        outputs = []
        for k in range(self.kept):
            scale = dropped + k
            parts = [features[scale]]
            sources = [(scale - 1, 2, "down")] if scale else []
            sources.append((scale, 1, "normal"))
            for source, strides, kind in sources:
                width = self.growth * self.factors[scale] // len(sources)
                unit = BottleneckConv(
                    width,
                    inner=min(features[source].shape[-1], self.bottlenecks[source] * width),
                    strides=strides,
                    dtype=self.dtype,
                    name=f"{kind}_{k}",
                )
                parts.append(unit(features[source], train=train))
            outputs.append(Partitioned.concat(parts))
        return tuple(outputs)


class BottleneckConv(nn.Module):
    """1×1 convolution to `inner` channels and a 3×3 one to `features`, each with BN and ReLU."""

    features: int
    inner: int
    strides: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Feature, *, train: bool) -> jax.Array:
        x = ConvBNReLU(self.inner, 1, dtype=self.dtype, name="reduce")(x, train=train)
        return ConvBNReLU(self.features, 3, self.strides, dtype=self.dtype, name="grow")(
            x, train=train
        )


class Transition(nn.Module):
    """A 1×1 convolution with BN and ReLU on every scale."""

    widths: Sequence[int]
    dtype: Any

    @nn.compact
    def __call__(self, features: Sequence[Feature], *, train: bool) -> tuple[jax.Array, ...]:
        return tuple(
            ConvBNReLU(width, 1, dtype=self.dtype, name=f"scale_{k}")(x, train=train)
            for k, (x, width) in enumerate(zip(features, self.widths, strict=True))
        )


class Exit(nn.Module):
    """3×3 convolutions of stride 2, average pooling, dropout and a dense layer.

    The feature is what the pooling gives, (B, width).
    """

    num_classes: int
    width: int
    depth: int
    dropout_rate: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Feature, *, train: bool) -> tuple[jax.Array, jax.Array]:
        for k in range(self.depth):
            x = ConvBNReLU(self.width, 3, 2, dtype=self.dtype, name=f"conv_{k}")(x, train=train)
        feature = global_average_pool(x)
        kept = nn.Dropout(self.dropout_rate, deterministic=not train)(feature)
        return Dense(self.num_classes, dtype=self.dtype, name="dense")(kept), feature
