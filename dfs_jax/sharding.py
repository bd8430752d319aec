"""Processes, the device mesh, and where arrays live on it.

The mesh has two axes. `data` cuts the batch; `fsdp` cuts the batch as well and, on top, spreads
parameters and optimizer state, so that each device keeps a part of them. What is placed how is
decided by the training loop, with the functions here; nothing else in the package names a
device.
"""

import contextlib
import importlib.util
import math
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dfs_jax.config import ConfigError

# Every device works on examples of its own, so both axes cut the batch.
BATCH_AXES = ("data", "fsdp")

# A process that says nothing for so long is taken for dead, and the others end.
_HEARTBEAT_SECONDS = 10
# How long a process that is done waits for the others.
_SHUTDOWN_SECONDS = 30

# Words of the errors that collectives raise when another process is gone.
_LOST = ("gloo", "connection", "peer", "unavailable", "heartbeat", "coordination", "deadline")


def start_processes(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the processes of this run; must come before anything asks for a device.

    With all three given, processes 0..num_processes-1 meet at `coordinator` (HOST:PORT, process
    0's). With none, a Cloud TPU slice, SLURM job, MPI job or Kubernetes job is recognised by its
    environment and joined; without one this is a run of a single process. Whatever fails while
    joining is raised. Raises ConfigError if only some are given or they do not fit.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    patience = {
        "heartbeat_timeout_seconds": _HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": _SHUTDOWN_SECONDS,
    }
    if any(given) and not all(given):
        raise ConfigError(
            "--coordinator, --num-processes and --process-id belong together; give all or none"
        )
    if all(given):
        if not 0 <= process_id < num_processes:
            raise ConfigError(
                f"--process-id must lie in 0..{num_processes - 1} for --num-processes "
                f"{num_processes}, got {process_id}"
            )
        if ":" not in coordinator:
            raise ConfigError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
        if num_processes > 1:
            jax.distributed.initialize(coordinator, num_processes, process_id, **patience)
    elif _in_cluster():
        jax.distributed.initialize(**patience)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends this process at once, with status 1, when it cannot go on with the others.

    That is when another one has died, which gets one sentence, and when something unexpected
    happens here, which shows its traceback. Python's usual end would first wait for all of the
    processes. A refusal or an end that all of them reach alike takes its usual way, and so does
    everything in a run of one process.
    """
    try:
        yield
    except Exception as error:
        alike = type(error).__module__.split(".")[0] == "dfs_jax"
        if jax.process_count() == 1 or alike:
            raise
        if _lost_another(error):
            print(
                f"error: process {jax.process_index()} of {jax.process_count()} ends, for another "
                "one has died or cannot be reached; the same command goes on from the newest "
                "checkpoint, also with another number of processes",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _lost_another(error: Exception) -> bool:
    """Whether that is how the runtime reports that it cannot reach another process."""
    text = str(error).lower()
    if isinstance(error, jax.errors.JaxRuntimeError):
        return any(word in text for word in _LOST)
    # With synchronous dispatch (allocator.py) a step fails while it is called, with this type.
    return isinstance(error, ValueError) and "gloo" in text


def _in_cluster() -> bool:
    """Whether the environment is that of a job of several processes which JAX can join."""
    several = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(os.environ.get(name, "1")) > 1 for name in several):
        return True
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
        return True
    chips = any(os.path.exists(f"/dev/{name}") for name in ("accel0", "vfio/0"))
    return chips and importlib.util.find_spec("libtpu") is not None


def create_mesh(config: ml_collections.ConfigDict) -> Mesh:
    """The mesh of `config.mesh`: axes `data` (-1: all devices that are left) and `fsdp`.

    Raises ConfigError if there are not that many devices, or fsdp does not divide them.
    """
    devices = jax.devices()
    data, fsdp = config.mesh.data, config.mesh.fsdp
    kind = f"{len(devices)} {devices[0].platform} devices"
    if fsdp < 1 or (data == -1 and len(devices) % fsdp):
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


def agreed(answer: bool) -> bool:
    """The answer of process 0, in every process; all of them must ask."""
    if jax.process_count() == 1:
        return answer
    with jax.transfer_guard("allow"):
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


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
