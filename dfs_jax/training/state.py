"""The training state: what a checkpoint holds, and where the first one comes from.

That is the workdir's newest checkpoint, else the weights of `train.init_from`, else fresh weights.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dfs_jax.config import ConfigError
from dfs_jax.distributed import placement
from dfs_jax.training import checkpoint
from dfs_jax.training.run import Run

log = logging.getLogger(__name__)


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds. `step` counts completed updates."""

    step: jax.Array  # () int32
    params: Any
    batch_stats: Any
    opt_state: Any
    method_state: Any
    ema: Any  # averaged parameters and statistics, as `variables`; or None

    @property
    def variables(self) -> dict[str, Any]:
        """What is evaluated: the averages where they are kept."""
        if self.ema is not None:
            return self.ema
        return {"params": self.params, "batch_stats": self.batch_stats}


def restore_or_initialise(run: Run, saver: checkpoint.Checkpointer) -> TrainState:
    """The state to go on from, placed on the mesh."""
    restored = saver.restore(abstract_state(run))
    if restored is not None:
        log.info("going on from the checkpoint of step %d", restored.step)
        return restored.state
    state = initial_state(run)
    if run.config.train.init_from:
        state = with_weights(state, *read_weights(run.config.train.init_from))
    return state


def restore(run: Run, workdir: str, which: str = "latest") -> tuple[int, TrainState]:
    """Step and state of the checkpoint "latest", "best" or a number of a trained `workdir`.

    Nothing there is changed. Raises ConfigError if there is no such checkpoint.
    """
    directory = epath.Path(workdir) / "checkpoints"
    if not directory.exists():
        raise ConfigError(f"--workdir: {workdir} holds no checkpoint")
    with checkpoint.Checkpointer(
        directory, best_metric=run.config.train.best_metric, read_only=True
    ) as saver:
        if which not in ("latest", "best") and not which.isdecimal():
            raise ConfigError(f"--step must be latest, best or a number, got {which!r}")
        step = {"latest": None, "best": saver.best_step()}.get(which, which)
        if which == "best" and step is None:
            raise ConfigError(
                f"--step: no checkpoint in {workdir} was scored on a validation split"
            )
        if step is not None and int(step) not in saver.all_steps():
            steps = ", ".join(map(str, saver.all_steps()))
            raise ConfigError(f"--step: {workdir} has no checkpoint of step {step}; it has {steps}")
        restored = saver.restore(abstract_state(run), step=None if step is None else int(step))
    if restored is None:
        raise ConfigError(f"--workdir: {workdir} holds no checkpoint")
    return restored.step, restored.state


def read_weights(workdir: str) -> tuple[str, dict[str, Any]]:
    """Where the weights of a trained `workdir` come from, and what its evaluation would use.

    Takes any network; nothing there is changed.
    """
    directory = epath.Path(workdir) / "checkpoints"
    with checkpoint.Checkpointer(directory, best_metric=None, read_only=True) as saver:
        step = checkpoint.newest_step(directory)
        saved = saver.restore(saver.metadata(step), step).state
    weights = saved.get("ema") or {name: saved.get(name) for name in ("params", "batch_stats")}
    return f"step {step} of {workdir}", weights


def with_weights(state: TrainState, source: str, weights: Mapping[str, Any]) -> TrainState:
    """`state` with the `weights` of `source`, matched by name and shape; the log tells the rest.

    Raises ConfigError if none fits.
    """
    given = dict(jax.tree_util.tree_leaves_with_path(weights))
    fresh = []

    def choose(path, leaf):
        value = given.pop(path, None)
        if value is None or value.shape != leaf.shape:
            fresh.append(jax.tree_util.keystr(path, simple=True, separator="/"))
            return leaf
        return jax.device_put(np.asarray(value).astype(leaf.dtype), leaf.sharding)

    before = {"params": state.params, "batch_stats": state.batch_stats}
    after = jax.tree_util.tree_map_with_path(choose, before)
    total = len(jax.tree.leaves(before))
    if len(fresh) == total:
        raise ConfigError(f"train.init_from: no array of {source} fits this network")
    log.info("%d of %d arrays are those of %s", total - len(fresh), total, source)
    if fresh:
        log.info("these start fresh: %s", ", ".join(fresh))
    ema = state.ema if state.ema is None else jax.tree.map(jnp.copy, after)
    return state.replace(**after, ema=ema)


def initial_state(run: Run) -> TrainState:
    """Fresh weights, drawn from the configuration's seed, placed on the mesh."""
    # Hundreds of small random draws that run once: compiling them well would take longer.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    placement = state_placement(run)
    return jax.jit(_create_state(run), out_shardings=placement, compiler_options=quick)()


def abstract_state(run: Run) -> TrainState:
    """Shapes, types and placement of the state, without computing it."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(_create_state(run)),
        state_placement(run),
    )


def state_placement(run: Run) -> TrainState:
    """Where each array of the state lives: spread over the fsdp axis, statistics replicated."""
    state = jax.eval_shape(_create_state(run))
    return placement.spread(run.mesh, state).replace(
        batch_stats=jax.tree.map(lambda _: placement.replicated(run.mesh), state.batch_stats)
    )


def _create_state(run: Run) -> Callable[[], TrainState]:
    def create():
        example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), run.data.spec.batch(1))
        variables = run.network.init(jax.random.key(run.config.seed), example)
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        averages = {"params": params, "batch_stats": batch_stats}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=run.optimizer.init(params),
            method_state=run.method.init(params),
            ema=jax.tree.map(jnp.copy, averages) if run.config.train.ema else None,
        )

    return create
