"""The training state: what a checkpoint holds, and where the first one comes from.

That is the workdir's newest checkpoint, else the weights of `train.init_from`, else fresh weights.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dfs_jax.config import ConfigError
from dfs_jax.distributed import placement
from dfs_jax.models import traced
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


class Weights(NamedTuple):
    """The weights of another run."""

    source: str  # for people
    values: Mapping[str, Any]  # as `TrainState.variables`


def given_weights(run: Run, workdir: str) -> Weights | None:
    """What a run that begins in `workdir` starts from by `train.init_from`; None: nothing.

    Nothing is compiled or changed. Raises ConfigError for weights that cannot be used.
    """
    source = run.config.train.init_from
    if not source or checkpoint.newest_step(epath.Path(workdir) / "checkpoints") is not None:
        return None
    weights = read_weights(source)
    fitting = matching(abstract_state(run), weights)
    refuse_not_finite(fitting, f"train.init_from: {weights.source}")
    return weights


def restore_or_initialise(
    run: Run, saver: checkpoint.Checkpointer, weights: Weights | None = None
) -> TrainState:
    """The state to go on from, placed on the mesh; a run that begins takes `weights`, if given.

    Raises ConfigError for a checkpoint with values that are not finite.
    """
    restored = saver.restore(abstract_state(run))
    if restored is not None:
        where = f"--workdir: the checkpoint of step {restored.step} in {saver.directory.parent}"
        saved = restored.state
        kept = {"params": saved.params, "batch_stats": saved.batch_stats, "ema": saved.ema}
        refuse_not_finite(kept, where)
        log.info("going on from the checkpoint of step %d", restored.step)
        return saved
    state = initial_state(run)
    return state if weights is None else with_weights(state, weights)


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
    where = f"--workdir: the checkpoint of step {restored.step} in {workdir}"
    refuse_not_finite(restored.state.variables, where)
    return restored.step, restored.state


def refuse_not_finite(arrays: Any, where: str) -> None:
    """Raise ConfigError, naming the first, if an array of the tree `arrays` has NaN or infinity.

    `where` begins the sentence. Arrays that are not of floating point pass.
    """
    for name, leaf in _by_path(arrays).items():
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
            leaf = leaf.addressable_data(0)
        there = np if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable else jnp
        if not bool(there.all(there.isfinite(leaf))):
            raise ConfigError(f"{where} has NaN or infinity in {name}: such weights answer nothing")


def read_weights(workdir: str) -> Weights:
    """The weights of a trained `workdir` that its evaluation would use.

    Takes any network; nothing there is changed.
    """
    directory = epath.Path(workdir) / "checkpoints"
    with checkpoint.Checkpointer(directory, best_metric=None, read_only=True) as saver:
        step = checkpoint.newest_step(directory)
        saved = saver.restore(saver.metadata(step), step).state
    weights = saved.get("ema") or {name: saved.get(name) for name in ("params", "batch_stats")}
    return Weights(f"step {step} of {workdir}", weights)


def matching(state: TrainState, weights: Weights) -> dict[str, np.ndarray]:
    """Those of `weights` that fit parameters or statistics of `state` by path and shape.

    In the type of `state`, whose arrays may be mere shapes. Raises ConfigError if none fits.
    """
    given = _by_path(weights.values)
    wanted = _by_path({"params": state.params, "batch_stats": state.batch_stats})
    fitting = {
        path: np.asarray(given[path]).astype(leaf.dtype)
        for path, leaf in wanted.items()
        if path in given and given[path].shape == leaf.shape
    }
    if not fitting:
        raise ConfigError(f"train.init_from: no array of {weights.source} fits this network")
    return fitting


def with_weights(state: TrainState, weights: Weights) -> TrainState:
    """`state` with the `weights` that match; the log tells the rest. Raises as `matching`."""
    fitting = matching(state, weights)
    fresh = []

    def choose(path, leaf):
        name = _name(path)
        if name not in fitting:
            fresh.append(name)
            return leaf
        return jax.device_put(fitting[name], leaf.sharding)

    before = {"params": state.params, "batch_stats": state.batch_stats}
    after = jax.tree_util.tree_map_with_path(choose, before)
    total = len(jax.tree.leaves(before))
    log.info("%d of %d arrays are those of %s", len(fitting), total, weights.source)
    if fresh:
        log.info("these start fresh: %s", ", ".join(fresh))
    ema = state.ema if state.ema is None else jax.tree.map(jnp.copy, after)
    return state.replace(**after, ema=ema)


def _by_path(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def initial_state(run: Run, variables: Mapping[str, Any] | None = None) -> TrainState:
    """The state before the first step, placed on the mesh.

    With fresh weights, drawn from the configuration's seed, or with `variables`.
    """
    return _creator(run)(variables)


def _creator(run: Run) -> Callable[[Mapping[str, Any] | None], TrainState]:
    # Hundreds of small random draws that run once: compiling them well would take longer.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None

    def create(variables):
        if variables is None:
            example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), run.data.spec.batch(1))
            variables = run.network.init(jax.random.key(run.config.seed), example)
        return _state(run, variables)

    return jax.jit(create, out_shardings=state_placement(run), compiler_options=quick)


def abstract_state(run: Run) -> TrainState:
    """Shapes, types and placement of the state, without computing it."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        _shapes(run),
        state_placement(run),
    )


def state_placement(run: Run) -> TrainState:
    """Where each array of the state lives: spread over the fsdp axis, statistics replicated."""
    state = _shapes(run)
    return placement.spread(run.mesh, state).replace(
        batch_stats=jax.tree.map(lambda _: placement.replicated(run.mesh), state.batch_stats)
    )


def _shapes(run: Run) -> TrainState:
    variables = traced.variables(run.network, run.data.spec.batch(1))
    return jax.eval_shape(lambda variables: _state(run, variables), variables)


def _state(run: Run, variables: Mapping[str, Any]) -> TrainState:
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
