"""What a step frees stays with the process: page faults are counted, not timed."""

import contextlib
import platform
import subprocess
import sys
import types

import jax
import pytest

from dfs_jax.ops import allocator

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from dfs_jax.ops import allocator

if sys.argv[1] == "keep":
    assert allocator.keep_freed_memory()
scratch = jax.lax.optimization_barrier
step = jax.jit(lambda x: jnp.sum(scratch(x + 1).T + x))
x = jnp.ones((4000, 4000))
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[5])  # the heap may still grow in some
"""


def _faults(how: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is asked")
def test_steps_take_no_new_memory():
    pages = 4000 * 4000 * 4 / 4096
    assert _faults("keep") < pages / 20
    assert _faults("leave") > pages / 2  # otherwise there is nothing to keep


@pytest.mark.parametrize(
    ("platforms", "keeps"), [("cuda,cpu", False), ("tpu", False), ("cpu", True)]
)
def test_accelerators_keep_their_allocator(platforms, keeps, monkeypatch):
    told = []
    library = types.SimpleNamespace(mallopt=lambda *choice: told.append(choice) or 1)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    with jax_platforms(platforms), monkeypatch.context() as within:
        within.setattr(jax.config, "update", lambda *choice: told.append(choice))
        assert allocator.keep_freed_memory() is keeps
    assert bool(told) == keeps
    assert (("jax_cpu_enable_async_dispatch", False) in told) == keeps


@contextlib.contextmanager
def jax_platforms(names):
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", names)
    try:
        yield
    finally:
        jax.config.update("jax_platforms", before)
