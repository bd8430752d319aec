"""Inline subnetwork collaboration: an exit sees what the exit before it has answered.

From IMTA (ICCV 2019, arXiv 1908.06294), whose second stage is the preset `imta`. Where its terms
are added to the logits is written in `multi_exit.py`.
"""

from typing import Any

import jax
from flax import linen as nn

from dfs_jax.models.layers import BatchNorm, Dense, relu, torch_default


class Collaboration(nn.Module):
    """What an exit makes of the previous exit's logits (B, K): a term (B, K) of its own.

    Dense layer, batch norm and ReLU to as many channels as the exit's own last dense layer reads
    (`width`), then a dense layer without bias. That the two last dense layers are added is what
    one dense layer on both inputs side by side computes, and leaves the exit its own parameters,
    so that weights trained without collaboration fit. No gradient flows into the previous exit:
    every loss trains what it does without collaboration, and surgery and block-dependent losses
    keep their meaning. (In the official code it reaches the previous exit's last layer, all before
    being frozen.)
    """

    width: int
    num_classes: int
    dtype: Any

    @nn.compact
    def __call__(self, previous: jax.Array, *, train: bool) -> jax.Array:
        x = Dense(self.width, dtype=self.dtype, name="hidden")(jax.lax.stop_gradient(previous))
        x = relu(BatchNorm(dtype=self.dtype, name="bn")(x, train=train))
        init = torch_default(2 * self.width)  # of the one dense layer
        return Dense(
            self.num_classes, use_bias=False, dtype=self.dtype, kernel_init=init, name="dense"
        )(x)
