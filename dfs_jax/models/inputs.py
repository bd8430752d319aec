"""What a network is given: the array itself where it has one input, else a dictionary of arrays.

Inputs have names, by which a data set describes them and a batch holds them; this is the one place
that knows how names become what the network takes.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

# By name, the shape and type of each input of one example, without a batch axis. Images are
# {"image": (H, W, C)}, sentences {"input_ids": (L,), "attention_mask": (L,), ...}.
Inputs = Mapping[str, jax.ShapeDtypeStruct]

_OTHERS = ("label", "mask")  # what a batch holds besides inputs


def images(shape: tuple[int, int, int]) -> Inputs:
    """The inputs of a network on images of `shape` (H, W, C); raises ValueError for another one."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"the shape of images must be positive (H, W, C), got {tuple(shape)}")
    return {"image": jax.ShapeDtypeStruct(tuple(shape), jnp.float32)}


def abstract(inputs: Inputs, count: int) -> Any:
    """What a network takes for `count` examples of `inputs`, as shapes and types.

    Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"a batch must have at least 1 example, got {count}")
    return _given({k: jax.ShapeDtypeStruct((count, *x.shape), x.dtype) for k, x in inputs.items()})


def of_batch(batch: Mapping[str, jax.Array]) -> Any:
    """What a network takes of a batch: its arrays (B, ...) without `label` and `mask`."""
    return _given({name: array for name, array in batch.items() if name not in _OTHERS})


def _given(named: Mapping[str, Any]) -> Any:
    return next(iter(named.values())) if len(named) == 1 else named
