"""Memory that a training step frees is kept for the next one, where steps run on CPU.

XLA asks the C library for a step's scratch memory and frees it afterwards. glibc maps and unmaps
blocks of that size, so that every step takes its hundreds of megabytes from the system anew, a
page fault for every 4 KiB of them. It can be told not to, but only the main thread's heap grows to
that size, while XLA asks from a thread of its own unless steps are dispatched synchronously.
docs/performance.md has what both cost.
"""

import ctypes
import importlib.metadata
import importlib.util
import sys

import jax

# Of glibc's malloc.h; `mallopt` takes an int.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; whether it will.

    To be called before anything asks for a device, and by the main thread, which is then the one
    that computes. Its heap grows and is not given back: the process stays as large as its largest
    step. False, and nothing changed, where JAX may find an accelerator and where the C library is
    not glibc.
    """
    if not sys.platform.startswith("linux") or not _only_cpu():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return all(mallopt(*choice) for choice in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER)))


def _only_cpu() -> bool:
    """Whether JAX will run on CPU, told without starting a backend."""
    if named := jax.config.jax_platforms:
        return named == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None
