"""From host arrays to devices: transfers under a sharding, and batches made one ahead.

Every transfer is explicit, so that it passes `jax.transfer_guard("disallow")`, and no process waits
for another: `jax.device_put` alone would first compare an array across processes, and
`jax.make_array_from_callback` is refused by the guard. A sharding None is the default device.
"""

import itertools
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dfs_jax.data.pipeline import Batch


def place(array: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    """`array`, the same on every process, on the devices of `sharding`."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    pieces = [
        jax.device_put(array[index], device)
        for device, index in sharding.addressable_devices_indices_map(array.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, pieces)


def place_rows(
    part: dict[str, np.ndarray], rows: np.ndarray, batch_size: int, sharding: NamedSharding | None
) -> Batch:
    """The global batch of which `part` is what this process has: `rows` (n,), ascending."""
    if sharding is None:
        return jax.device_put(part)

    def placed(array: np.ndarray) -> jax.Array:
        shape = (batch_size, *array.shape[1:])
        pieces = []
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            wanted = np.arange(batch_size)[index[0]]
            first = np.searchsorted(rows, wanted[0])
            pieces.append(jax.device_put(array[first : first + len(wanted)], device))
        return jax.make_array_from_single_device_arrays(shape, sharding, pieces)

    return {key: placed(array) for key, array in part.items()}


def replicated(sharding: NamedSharding | None) -> NamedSharding | None:
    """A whole copy on each device of `sharding`."""
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())


def one_ahead(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches, each sent on its way to the devices while its predecessor is in use."""
    # pairwise asks for the next batch before it hands out the present one.
    for ready, _ in itertools.pairwise(itertools.chain(batches, [None])):
        yield ready
