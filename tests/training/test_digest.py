"""The digest of a pytree: equal for equal bits, wherever they lie, and no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dfs_jax.training import digest


def eight_devices(*spec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*spec))


def test_digest_does_not_depend_on_placement_or_on_the_way_it_is_computed():
    size = digest._COMPILED_FROM
    for dtype in ("float32", "bfloat16", "bool", "int8", "complex64"):
        for n in (size - 64, size):
            # Not constant, so that a wrong position would show.
            host = np.asarray(jnp.asarray(np.arange(n) % 251 % 7, dtype)).reshape(8, -1)
            ways = [host, jnp.asarray(host)]
            ways += [jax.device_put(host, eight_devices(*s)) for s in ((), ("data",))]
            ways.append(jax.device_put(host, eight_devices(None, "data")))
            digests = {digest.digest({"x": way})["x"] for way in ways}
            digests.add(digest.digest({"x": ways[-1]})["x"])
            assert len(digests) == 1, (dtype, n)
            head = next(iter(digests))[:8]
            compiled = "".join(f"{int(s):08x}" for s in digest._sums_compiled(ways[1]))
            assert digests == {head + compiled}


@pytest.mark.parametrize("size", [1000, digest._COMPILED_FROM])
def test_digest_sees_every_small_change(size):
    rng = np.random.default_rng(0)
    original = rng.normal(size=size).astype(np.float32)
    seen = {digest.digest([jnp.asarray(original)])["0"]}

    def add(changed):
        seen.add(digest.digest([jnp.asarray(changed)])["0"])

    for position in rng.choice(4 * size, 20, replace=False):
        changed = original.copy()
        changed.view(np.uint8)[position] ^= 1 << rng.integers(8)
        add(changed)
    for _ in range(20):
        i, j = rng.choice(size, 2, replace=False)
        swapped = original.copy()
        swapped[[i, j]] = original[[j, i]]
        add(swapped)
        signs = original.copy()
        signs[[i, j]] *= -1  # cancels in any sum that is linear in the words
        add(signs)
    add(np.roll(original, 1))
    add(original.reshape(10, -1) if size == 1000 else original.reshape(64, -1))
    add(original.view(np.int32))
    assert len(seen) == 1 + 20 + 40 + 3
