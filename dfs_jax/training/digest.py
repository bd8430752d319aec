"""A checksum per array of a pytree, the same however the arrays are placed on devices.

Per leaf two sums, modulo 2^32, of a hash of every word and its position. Integer sums do not
depend on the order, so neither on sharding nor on the number of devices or processes. The hash
is not linear: in a linear sum two flipped sign bits would cancel.
"""

import functools
import hashlib
import json
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Smaller leaves are summed with NumPy: a compilation per shape takes longer than the sum.
_COMPILED_FROM = 1 << 18


def digest(state: Any) -> dict[str, str]:
    """A checksum per leaf: {path: 24 hex digits}, e.g. {"params/conv/kernel": "…"}.

    The first 8 digits depend on dtype and shape alone, the others on every bit and its place.
    The result does not depend on how the arrays are sharded, nor on whether they are JAX or
    NumPy arrays. Arrays that live on several hosts are summed where they are; then every
    process must call this together.
    """
    heads = layout(state)
    sums = jax.device_get([_sums(leaf) for leaf in jax.tree.leaves(state)])
    return {
        path: f"{head}{int(a):08x}{int(b):08x}"
        for (path, head), (a, b) in zip(heads.items(), sums, strict=True)
    }


def fingerprint(tree: Any) -> str:
    """16 hex digits that tell `tree` from every other; see `digest`."""
    return hashlib.sha256(json.dumps(digest(tree), sort_keys=True).encode()).hexdigest()[:16]


def layout(tree: Any) -> dict[str, str]:
    """The dtype and shape of every leaf as 8 hex digits, by path."""
    heads = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not hasattr(leaf, "dtype"):
            leaf = np.asarray(leaf)
        text = f"{leaf.dtype}{tuple(leaf.shape)}"
        heads[jax.tree_util.keystr(path, simple=True, separator="/")] = (
            f"{zlib.crc32(text.encode()):08x}"
        )
    return heads


def _sums(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if leaf.is_fully_replicated:
            leaf = leaf.addressable_data(0)
        if not leaf.is_fully_addressable or leaf.size >= _COMPILED_FROM:
            return _sums_compiled(leaf)
    host = np.ascontiguousarray(leaf)
    unsigned = np.dtype(f"uint{8 * min(4, host.dtype.itemsize)}")
    words = host.reshape(-1).view(unsigned).astype(np.uint32)
    return _hash_and_sum(words, _mixed_index(words.size), np)


@jax.jit
def _sums_compiled(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    unsigned = jnp.dtype(f"uint{8 * min(4, x.dtype.itemsize)}")
    words = lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    # The row-major position of every word, without a reshape, which would move sharded data.
    index = jnp.zeros((), jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        index += lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    return jnp.stack(_hash_and_sum(words, _mix(index), jnp))


@functools.lru_cache(maxsize=1)
def _mixed_index_table() -> np.ndarray:
    return _mix(np.arange(_COMPILED_FROM, dtype=np.uint32))


def _mixed_index(size: int) -> np.ndarray:
    if size <= _COMPILED_FROM:
        return _mixed_index_table()[:size]
    return _mix(np.arange(size, dtype=np.uint32))


def _hash_and_sum(words: Any, index: Any, xp: Any) -> tuple[Any, Any]:
    first = xp.sum(_mix(words ^ index), dtype=xp.uint32)
    second = xp.sum(_mix(words + index * xp.uint32(0x9E3779B1)), dtype=xp.uint32)
    return first, second


def _mix(x: Any) -> Any:
    """The finaliser of MurmurHash3: a bijection of 32-bit words; x is a uint32 array."""
    x = x ^ (x >> 16)
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> 13)
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
