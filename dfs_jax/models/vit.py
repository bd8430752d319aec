"""Vision transformers (arXiv 2010.11929) with an exit after each of the deeper blocks.

Dimensions, arithmetic and initialisation are timm's: pre-norm, exact GELU, a class token and
learned positions. An exit is a layer norm and a dense layer on the class token; the last one is
timm's own head. Surgery cuts the channels of all tokens (B, T, C).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfs_jax.models.layers import Conv, Dense, Feature, full_precision, parameter, plain
from dfs_jax.models.multi_exit import MultiExit

# timm cuts this normal at ±2, a hundred deviations out.
_normal = nn.initializers.normal(0.02)


class ViT(MultiExit):
    """Vision transformer.

    Attributes:
      width: channels of a token.
      heads: heads of the attention, a divisor of `width`.
      depth: number of blocks.
      patch_size: side of a patch, in pixels.
      first_exit: block with the first exit, from 0; every block from it on has one.
    """

    width: int
    heads: int
    depth: int = 12
    patch_size: int = 16
    first_exit: int = 6

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.first_exit < self.depth:
            raise ValueError(
                f"first_exit must lie in 0..{self.depth - 1} for {self.depth} blocks, "
                f"got {self.first_exit}"
            )
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, got {self.patch_size}")

    def setup(self):
        self.patch_embed = PatchEmbed(self.width, self.patch_size, dtype=self.dtype)
        self.blocks = [Block(self.heads, dtype=self.dtype) for _ in range(self.depth)]
        self.exits = [
            Exit(self.num_classes, dropout_rate=self.dropout_rate, dtype=self.dtype)
            for _ in range(self.num_exits)
        ]
        self.adapter_layers = self.dense_adapters(self.width)
        self.collaborators = self.collaborations([self.width] * self.num_exits)

    @property
    def num_exits(self) -> int:
        return self.depth - self.first_exit

    @property
    def smallest_image(self) -> int:
        return self.patch_size

    def segment(self, i: int, x: Feature, *, train: bool) -> tuple[jax.Array]:
        if i == 0:
            x = self.patch_embed(x)
        first = self.first_exit + i if i else 0
        for block in self.blocks[first : self.first_exit + i + 1]:
            x = block(x)
        return (x,)

    def head(self, i: int, exit_input: Any, *, train: bool) -> tuple[jax.Array, jax.Array]:
        return self.exits[i](exit_input, train=train)


class PatchEmbed(nn.Module):
    """Images (B, H, W, C) to tokens (B, 1 + patches, width): class token first, positions added.

    The positions belong to one grid of patches, that of the images at initialisation.
    """

    width: int
    patch_size: int
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size, param_dtype = self.patch_size, full_precision(self.dtype)
        batch, height, width, _ = images.shape
        if height % size or width % size:
            raise ValueError(
                f"image sides must be multiples of the patch size {size}, got {height}x{width}"
            )
        x = Conv(self.width, size, size, padding=0, use_bias=True, dtype=self.dtype, name="proj")(
            images
        )
        x = x.reshape(batch, -1, self.width)
        tokens = 1 + x.shape[1]
        if self.has_variable("params", "pos_embed"):
            known = self.get_variable("params", "pos_embed").shape[1]
            if known != tokens:
                raise ValueError(
                    f"the network was initialised for images of {known - 1} patches of "
                    f"{size}x{size} pixels, {height}x{width} pixels are {tokens - 1}"
                )
        start = parameter(
            self, "cls_token", nn.initializers.normal(1e-6), (1, 1, self.width), param_dtype
        )
        position = parameter(self, "pos_embed", _normal, (1, tokens, self.width), param_dtype)
        start = jnp.broadcast_to(start.astype(self.dtype), (batch, 1, self.width))
        return jnp.concatenate([start, x], axis=1) + position.astype(self.dtype)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on the layer norm of x (B, T, C), added to x."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Feature) -> jax.Array:
        x = plain(x)  # layer norm mixes the channels, and the sum passes them on
        x = x + Attention(self.heads, dtype=self.dtype, name="attn")(_norm(self, "norm1")(x))
        return x + Mlp(dtype=self.dtype, name="mlp")(_norm(self, "norm2")(x))


class Attention(nn.Module):
    """Multi-head self-attention of x (B, T, C), the softmax in full precision."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = _dense(self, 3 * width, "qkv")(x)
        qkv = qkv.reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scores = jnp.einsum(
            "bqhd,bkhd->bhqk", query, key, preferred_element_type=full_precision(self.dtype)
        )
        weights = jax.nn.softmax(scores / math.sqrt(width // self.heads)).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return _dense(self, width, "proj")(mixed.reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Dense layer to four times the channels of x (B, T, C), GELU, and one back."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.gelu(_dense(self, 4 * x.shape[-1], "fc1")(x), approximate=False)
        return _dense(self, x.shape[-1], "fc2")(y)


class Exit(nn.Module):
    """Layer norm of the class token of x (B, T, C), dropout and a dense layer.

    The feature is the normalised class token, (B, C).
    """

    num_classes: int
    dropout_rate: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Feature, *, train: bool) -> tuple[jax.Array, jax.Array]:
        feature = _norm(self, "norm")(plain(x)[:, 0])
        kept = nn.Dropout(self.dropout_rate, deterministic=not train)(feature)
        return _dense(self, self.num_classes, "head")(kept), feature


def _norm(module: nn.Module, name: str) -> nn.LayerNorm:
    """Layer norm inside `module`; its statistics are at least float32."""
    return nn.LayerNorm(
        epsilon=1e-6,
        dtype=module.dtype,
        param_dtype=full_precision(module.dtype),
        use_fast_variance=False,  # E[x²] − E[x]² loses digits
        name=name,
    )


def _dense(module: nn.Module, features: int, name: str) -> Dense:
    return Dense(
        features,
        dtype=module.dtype,
        kernel_init=_normal,
        bias_init=nn.initializers.zeros,
        name=name,
    )
