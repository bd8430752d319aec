"""The device mesh, and where arrays live on it.

The mesh has two axes. `data` cuts the batch; `fsdp` cuts the batch as well and, on top, spreads
parameters and optimizer state, so that each device keeps a part of them. What is placed how is
decided by training, with the functions here; nothing else in the package names a device.
"""

import math
from typing import Any

import jax
import ml_collections
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dfs_jax.config import ConfigError

# Every device works on examples of its own, so both axes cut the batch.
BATCH_AXES = ("data", "fsdp")


def create_mesh(config: ml_collections.ConfigDict) -> Mesh:
    """The mesh of `config.mesh`: axes `data` (-1: all devices that are left) and `fsdp`.

    Raises ConfigError if there are not that many devices, or fsdp does not divide them.
    """
    devices = jax.devices()
    data, fsdp = config.mesh.data, config.mesh.fsdp
    kind = f"{len(devices)} {devices[0].platform} devices"
    if not 1 <= fsdp <= len(devices) or (data == -1 and len(devices) % fsdp):
        raise ConfigError(f"config.mesh.fsdp = {fsdp} does not divide the {kind}")
    count = len(devices) if data == -1 else data * fsdp
    if not 1 <= count <= len(devices):
        raise ConfigError(
            f"config.mesh.data = {data} with fsdp = {fsdp}, but there are {kind}; give "
            f"1 to {len(devices) // fsdp}, or -1 for all"
        )
    if jax.process_count() > 1 and count != len(devices):
        raise ConfigError(
            f"config.mesh.data = {data}, but a run of {jax.process_count()} processes must use "
            f"all of its {len(devices)} devices; give -1"
        )
    axis_types = (AxisType.Auto,) * 2
    return jax.make_mesh((count // fsdp, fsdp), BATCH_AXES, axis_types, devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """The placement of what every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh) -> NamedSharding:
    """The placement of arrays (B, …): cut along the leading axis, B a multiple of the devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def microbatches(mesh: Mesh) -> NamedSharding:
    """The placement of stacked microbatches (A, B, …): cut along the second axis."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def spread(mesh: Mesh, tree: Any) -> Any:
    """The placement of every leaf of `tree` (parameters, optimizer state) over the fsdp axis.

    A leaf is cut along its largest dimension that the axis divides; one without is replicated,
    and so is everything if the axis has one device.
    """
    parts = mesh.shape["fsdp"]

    def place(leaf):
        fitting = [d for d, size in enumerate(leaf.shape) if size and size % parts == 0]
        if parts == 1 or not fitting:
            return replicated(mesh)
        longest = max(fitting, key=lambda d: leaf.shape[d])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(place, tree)


def bytes_per_device(tree: Any) -> int:
    """Bytes of the arrays of `tree` that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def describe(mesh: Mesh) -> str:
    """One line for the log: "process 0 of 1, 8 cpu devices, mesh data=8 fsdp=1"."""
    devices = jax.devices()
    plural = "" if len(devices) == 1 else "s"
    axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
    local = "" if jax.process_count() == 1 else f" ({jax.local_device_count()} of them here)"
    return (
        f"process {jax.process_index()} of {jax.process_count()}, "
        f"{len(devices)} {devices[0].platform} device{plural}{local}, mesh {axes}"
    )
