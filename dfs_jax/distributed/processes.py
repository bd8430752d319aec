"""The processes of a run: how they meet, agree, and end together."""

import contextlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from dfs_jax.config import ConfigError
from dfs_jax.ops import memory

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
    environment and joined; without one this is a run of a single process. Several processes on
    CPU take no program from the persistent cache. Whatever fails while joining is raised. Raises
    ConfigError if only some are given or they do not fit.
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
    if jax.distributed.is_initialized() and jax.default_backend() == "cpu":
        # A program for CPU that was read from the persistent cache has forgotten in which order
        # the collectives of a function or loop in it and those outside come. Two processes then
        # meet in different ones. Where their sizes differ gloo ends the process; where they
        # agree it would add what does not belong together.
        jax.config.update("jax_enable_compilation_cache", False)


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
        elif memory.is_shortage(error):
            print(f"error: process {jax.process_index()}: {memory.SHORTAGE}", file=sys.stderr)
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


def same_everywhere(digest: bytes) -> bool:
    """Whether `digest` is the same in every process; all of them must ask."""
    if jax.process_count() == 1:
        return True
    own = np.frombuffer(digest, np.uint8)
    with jax.transfer_guard("allow"):
        return bool((multihost_utils.process_allgather(own) == own).all())


def agreed(answer: bool) -> bool:
    """The answer of process 0, in every process; all of them must ask."""
    if jax.process_count() == 1:
        return answer
    with jax.transfer_guard("allow"):
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))
