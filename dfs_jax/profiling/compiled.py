"""Programs compiled from nothing, and what the compiler tells of them."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from dfs_jax.ops import compiler
from dfs_jax.profiling.timing import timed


class Cost(NamedTuple):
    """What the compiler tells of one program; counts and bytes are those of one device."""

    trace_seconds: float  # tracing, and lowering to the compiler's input
    compile_seconds: float  # without the persistent cache
    flops: float
    bytes_accessed: float
    argument_bytes: int
    temporary_bytes: int
    peak_bytes: int  # arguments, temporaries, and results that take no argument's place


class Program:
    """A compiled function (carry, …) -> (carry, result), called with what the last call left.

    Called, it runs `calls` times, waits for the last `result` and returns `calls`.
    """

    result: Any

    def __init__(self, compiled: Any, cost: Cost, carry: Any, arguments: Any, calls: int):
        self.compiled, self.cost = compiled, cost
        self._carry, self._arguments = carry, arguments
        self._calls = calls

    def __call__(self) -> int:
        for _ in range(self._calls):
            self._carry, self.result = self.compiled(self._carry, *self._arguments)
        jax.block_until_ready((self._carry, self.result))
        return self._calls


def compiled_cost(function: Any, *arguments: Any) -> tuple[Any, Cost]:
    """The jitted `function` compiled for `arguments`, from nothing, and what that cost."""
    with persistent_cache(None):
        jax.clear_caches()  # of what earlier programs traced
        lowered, trace_seconds = timed(lambda: function.lower(*arguments))
        compiled, compile_seconds = timed(lowered.compile)
    counts, memory = compiled.cost_analysis(), compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    cost = Cost(
        trace_seconds=trace_seconds,
        compile_seconds=compile_seconds,
        flops=compiler.flops(compiled),
        bytes_accessed=float(counts.get("bytes accessed", 0.0)),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.argument_size_in_bytes + memory.temp_size_in_bytes + results,
    )
    return compiled, cost


@contextlib.contextmanager
def persistent_cache(directory: str | None) -> Iterator[None]:
    """Keeps compiled programs in `directory`, however small, or with None nowhere."""
    wanted = {
        "jax_enable_compilation_cache": directory is not None,
        "jax_compilation_cache_dir": directory,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        _configure(wanted)
        yield
    finally:
        _configure(before)


def _configure(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks at its settings only once
