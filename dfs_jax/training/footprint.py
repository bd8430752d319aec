"""Whether a training step fits into memory, known before anything is written or allocated.

The compiled step says itself what it needs. It is the very program that the run then uses: JAX
keeps what was compiled for these shapes and places.
"""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dfs_jax.config import ConfigError
from dfs_jax.data.augment.mixing import Mixing
from dfs_jax.distributed import placement
from dfs_jax.ops import compiler, memory
from dfs_jax.training.run import Run
from dfs_jax.training.state import abstract_state

log = logging.getLogger(__name__)

_KEPT_FREE = 0.1  # share of the memory that a suggested batch size leaves
_MOST_PARTS = 1024  # microbatches that are suggested


def check_step(run: Run, step: compiler.jit) -> None:
    """Compile `step`, of `make_train_step(run)`; raise ConfigError unless it fits into memory.

    The error says what the step needs, what there is, and which batch size would fit.
    """
    state, batch = abstract_state(run), _abstract_batch(run)
    held = placement.bytes_per_device(state) + placement.bytes_per_device(state.params)
    free = _least(memory.available(run.mesh.local_devices))
    _check_before_compiling(run, held, placement.bytes_per_device(batch), free)
    log.info("compiling the training step")
    try:
        analysis = step.lower(state, batch).compile().memory_analysis()
    except Exception as error:
        if not memory.is_shortage(error):
            raise
        raise ConfigError(_sentence(run, None, free, held)) from error
    if analysis is None or free is None:
        return
    needed = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    if needed > free:
        raise ConfigError(_sentence(run, needed, free, held))


def _check_before_compiling(run: Run, held: int, batch: int, free: int | None) -> None:
    """Refuse what is too large by its parameters or its examples alone; sizes in bytes."""
    if free is None:
        return
    if held + batch > free:
        raise ConfigError(_sentence(run, None, free, held))
    train = run.config.train
    evaluated = batch / train.batch_size * train.eval_batch_size
    if held + evaluated > free:
        raise ConfigError(
            f"train.eval_batch_size {train.eval_batch_size}: its inputs alone take "
            f"{memory.in_words(evaluated)} of memory, there are {memory.in_words(free)}; take a "
            "smaller one"
        )


def fitting_batch(batch_size: int, multiple: int, needed: float, held: float, free: float) -> int:
    """The largest multiple of `multiple` whose step is likely to fit into `free` bytes, or 0.

    A step of `batch_size` examples takes `needed` bytes, of which the parameters, their gradients
    and what the optimizer keeps are `held`; what a step makes of its examples grows with them.
    """
    room = (1 - _KEPT_FREE) * free - held
    if room <= 0 or not needed > held:
        return 0
    return int(batch_size * room / (needed - held)) // multiple * multiple


def _sentence(run: Run, needed: int | None, free: int | None, held: int) -> str:
    """Why the step does not fit and what would; sizes in bytes, None where they are not known."""
    train, devices = run.config.train, run.mesh.size
    there = "" if free is None else f"{memory.in_words(free)} of "
    where = "" if devices == 1 else " of each device"
    told = f"a step of train.batch_size {train.batch_size} "
    if needed is None:
        told += f"does not fit into the {there}memory{where}"
    else:
        told += f"needs {memory.in_words(needed)} and there are {there}memory{where}"
    if free is not None and held > (1 - _KEPT_FREE) * free:
        return (
            f"{told}; the parameters of {run.config.model.name}, their gradients and what "
            f"{run.config.optimizer.name} and gradients {run.config.gradients.name} keep of them "
            f"are {memory.in_words(held)}, whatever the batch size"
        )
    fits = 0
    if free is not None and needed is not None:
        multiple = devices * train.accumulation
        fits = fitting_batch(train.batch_size, multiple, needed, held, free)
    smaller = f"train.batch_size {fits} would fit" if fits else "take a smaller train.batch_size"
    ways = []
    if (parts := _accumulation(run, fits)) is not None:
        ways.append(f"train.accumulation {parts}")
    on_cpu = run.mesh.devices.flat[0].platform == "cpu"  # whose compiler undoes it
    if not train.rematerialise and not on_cpu:
        ways.append("train.rematerialise")
    also = f"; {' or '.join(ways)} keeps the batch size and needs less" if ways else ""
    return f"{told}; {smaller}{also}"


def _accumulation(run: Run, fits: int) -> int | None:
    """The number of microbatches that brings the batch down to what fits, if one does."""
    train = run.config.train
    if run.method.cycle > 1:
        return None
    most = min(train.batch_size // run.mesh.size, _MOST_PARTS)
    for parts in range(train.accumulation + 1, most + 1):
        whole = train.batch_size % (parts * run.mesh.size) == 0
        examples = train.batch_size // parts
        if whole and run.method.smallest_batch <= examples <= fits / train.accumulation:
            return parts
    return None


def _abstract_batch(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    """The training batch as shapes, types and places."""
    size, spec, place = run.config.train.batch_size, run.data.spec, placement.batch(run.mesh)

    def of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=place)

    batch = {name: of(x.shape, x.dtype) for name, x in spec.inputs.items()}
    mixed = bool(Mixing.from_config(run.config))
    label = of((spec.num_classes,), jnp.float32) if mixed else of((), jnp.int32)
    return {**batch, "label": label}


def _least(free: int | None) -> int | None:
    """The least of all processes, so that they decide alike."""
    if free is None or jax.process_count() == 1:
        return free
    megabytes = multihost_utils.process_allgather(np.asarray(free // 2**20, np.int32))
    return int(np.min(megabytes)) * 2**20
