"""The device mesh, and where arrays live on it: replicated, or cut along the batch axis.

What is sharded how is decided by the training loop, with the functions here; nothing else in
the package names a device.
"""

import jax
import ml_collections
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dfs_jax.config import ConfigError

# The mesh axes along which the batch is cut, outermost first. An axis that also cuts parameters
# would be listed here too, because every device works on examples of its own.
BATCH_AXES = ("data",)


def create_mesh(config: ml_collections.ConfigDict) -> Mesh:
    """The mesh of `config.mesh`: one axis `data` over all devices (-1) or over the first few.

    Raises ConfigError if there are not that many devices.
    """
    devices = jax.devices()
    wanted = config.mesh.data
    count = len(devices) if wanted == -1 else wanted
    if not 1 <= count <= len(devices):
        raise ConfigError(
            f"config.mesh.data = {wanted}, but there are {len(devices)} {devices[0].platform} "
            f"devices; give 1 to {len(devices)}, or -1 for all"
        )
    if jax.process_count() > 1 and count != len(devices):
        raise ConfigError(
            f"config.mesh.data = {wanted}, but a run of {jax.process_count()} processes must use "
            f"all of its {len(devices)} devices; give -1"
        )
    return jax.make_mesh((count,), BATCH_AXES, (AxisType.Auto,), devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """The placement of parameters and of everything else that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh) -> NamedSharding:
    """The placement of arrays (B, …): cut along the leading axis, B a multiple of the devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def describe(mesh: Mesh) -> str:
    """One line for the log: "process 0 of 1, 8 cpu devices, mesh data=8"."""
    devices = jax.devices()
    plural = "" if len(devices) == 1 else "s"
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return (
        f"process {jax.process_index()} of {jax.process_count()}, "
        f"{len(devices)} {devices[0].platform} device{plural}, mesh {axes}"
    )
