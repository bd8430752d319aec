"""The choices of a configuration made into objects: network, objective, gradient method.

`prepare` makes all of them; it checks every value first, so that a configuration is refused
before data are prepared or anything is compiled.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import optax

from dfs_jax import data, gradients, models
from dfs_jax.config import ConfigError, limits, refusals
from dfs_jax.config.errors import shown
from dfs_jax.data import pipeline
from dfs_jax.distributed import placement
from dfs_jax.gradients import GradientMethod
from dfs_jax.models import MultiExit, traced
from dfs_jax.objectives import Objective
from dfs_jax.surgery import Surgery
from dfs_jax.training import data_record, freeze, optim, phases
from dfs_jax.training import workdir as workdirs

log = logging.getLogger(__name__)

PRECISIONS = ("float32", "bfloat16", "float64")


class Run(NamedTuple):
    """The pieces of one run, made from its configuration.

    Of a run with phases, each has pieces of its own, from `first_step` completed updates on.
    """

    config: ml_collections.ConfigDict
    data: data.Data
    network: MultiExit
    objective: Objective
    method: GradientMethod
    optimizer: optax.GradientTransformation
    schedule: Callable[[int], Any]
    mesh: jax.sharding.Mesh
    steps_per_epoch: float
    total_steps: int
    first_step: int = 0
    goes_on: bool = False  # with the optimizer's state of the phase before
    phases: tuple["Run", ...] = ()

    def taking(self, step: int) -> "Run":
        """The run, or its phase, that takes the step after `step`."""
        begun = [phase for phase in self.phases if phase.first_step <= step]
        return begun[-1] if begun else self


def prepare(
    config: ml_collections.ConfigDict,
    workdir: str | None = None,
    *,
    source: data.Data | None = None,
) -> Run:
    """Check the whole configuration, then prepare its data; nothing is compiled.

    With a `workdir`, refuses one that another experiment used, data that are not those of its run,
    and data with nothing to tell apart. A `source` takes the place of the configured data. Raises
    ConfigError.
    """
    limits.check(config)
    network = create_network(config, num_classes=1)
    objective = create_objective(config, network.num_exits)
    method = create_method(config, network, objective)
    _check_train(config, network.num_exits)
    planned = phases.from_config(config)
    _check_phases(config, planned, network, method)
    optim.create_optimizer(config, steps_per_epoch=1.0, total_steps=1)
    mesh = placement.create_mesh(config)
    pipeline.check_batch(config, mesh.size)
    _check_accumulation(config, mesh.size, method)
    workdirs.check_source(config)
    if workdir is not None:
        workdirs.check(config, workdir)

    if source is None:
        source = data_record.create(config, workdir)
    if workdir is not None:
        _check_classes(source.spec)
    network = network.clone(num_classes=source.spec.num_classes)
    _check_inputs(network, objective, source.spec.batch(2), config.train.freeze)
    steps_per_epoch = source.train.size / config.train.batch_size
    total = _total_steps(config, steps_per_epoch)
    optimizer, schedule = optim.create_optimizer(config, steps_per_epoch, total)
    optimizer = freeze.optimizer(optimizer, config.train.freeze)
    pieces = source, network, objective, method, optimizer, schedule, mesh
    run = Run(config, *pieces, steps_per_epoch, total)
    return _with_phases(run, planned) if planned else run


def _with_phases(run: Run, planned: tuple[phases.Phase, ...]) -> Run:
    """`run` with the pieces of each phase."""
    firsts = phases.first_steps(planned, run.total_steps)
    extents = phases.schedule_extents(planned, firsts, run.total_steps)
    made: list[Run] = []
    for i, (phase, first, extent) in enumerate(zip(planned, firsts, extents, strict=True)):
        with phases.named(i):
            before = made[-1].config if phase.goes_on else run.config
            made.append(_phase(run, phase, first, extent, before))
            if not phases.same_layout(made[0].optimizer, made[-1].optimizer, _parameters(run)):
                raise ValueError(
                    "its optimizer keeps other things than that of phase 1; name, momentum and "
                    "clip_norm of all phases must be alike, or 0 in all"
                )
    return run._replace(optimizer=made[0].optimizer, phases=tuple(made))


def _phase(
    run: Run,
    phase: phases.Phase,
    first: int,
    extent: tuple[int, int],
    before: ml_collections.ConfigDict,
) -> Run:
    """The pieces of a phase; `extent` is the first step and the length of its schedule."""
    config = phase.config(run.config)
    config.optimizer = before.optimizer if phase.goes_on else config.optimizer
    network = run.network.clone(surgery=Surgery(**config.surgery.to_dict()))
    objective = create_objective(config, network.num_exits)
    objective = phases.counted(phase, objective, network.num_exits)
    batch = run.data.spec.batch(2)
    _check_inputs(network, objective, batch, config.train.freeze)
    freeze.check([pattern for pattern, _ in phase.rates], _parameters(run), "rates")
    stays = phases.kept(phase, network, batch)
    config.train.freeze = (*config.train.freeze, *stays)
    began, length = extent
    update, schedule = optim.create_optimizer(config, run.steps_per_epoch, length)
    return run._replace(
        config=config,
        network=network,
        objective=objective,
        method=create_method(config, network, objective),
        optimizer=phases.optimizer(update, phase, config.train.freeze),
        schedule=lambda step: schedule(step - began),
        first_step=first,
        goes_on=phase.goes_on,
    )


def _parameters(run: Run) -> Any:
    """The network's parameters, as shapes."""
    return traced.variables(run.network, run.data.spec.batch(2))["params"]


def _total_steps(config: ml_collections.ConfigDict, steps_per_epoch: float) -> int:
    total = config.train.steps or math.ceil(config.train.epochs * steps_per_epoch)
    if total > limits.LARGEST_INTEGER:
        raise ConfigError(
            f"train.epochs = {config.train.epochs:g} are {total:.3g} steps; there can be "
            f"{limits.LARGEST_INTEGER:,}"
        )
    return total


def warn(run: Run) -> None:
    """Log what was chosen for training and, in a run of this length, hardly meant."""
    for sentence in _doubtful(run):
        log.warning("%s", sentence)


def _doubtful(run: Run) -> list[str]:
    config, steps = run.config, run.total_steps
    found = optim.without_effect(config.optimizer, steps / run.steps_per_epoch)
    weights, patterns = config.objective.exit_weights, config.train.freeze
    if weights and not any(weights):
        found.append("objective.exit_weights are all 0: no exit is trained")
    if patterns and not config.train.init_from:
        found.append(
            "train.freeze keeps fresh weights; train.init_from names the run that has better ones"
        )
    for kept in (patterns, *(phase.config.train.freeze for phase in run.phases)):
        if kept and all(jax.tree.leaves(freeze.chosen(kept, _parameters(run)))):
            found.append(f"train.freeze = {shown(kept)} keeps every parameter: nothing is trained")
    if steps % run.method.cycle:
        found.append(
            f"the run's {steps} steps end within a cycle of {run.method.cycle} steps of gradients "
            f"{config.gradients.name}: its last parameters are unfinished"
        )
    if config.train.profile_steps and config.train.profile_steps[0] > steps:
        found.append(
            f"train.profile_steps = {config.train.profile_steps} lie beyond the run of {steps} "
            "steps: there will be no trace"
        )
    return found


def create_network(config: ml_collections.ConfigDict, num_classes: int) -> MultiExit:
    """The configured network. Raises ConfigError for an unknown name or bad values."""
    if config.train.precision not in PRECISIONS:
        raise ConfigError(
            f"train.precision must be one of {', '.join(PRECISIONS)}, "
            f"got {shown(config.train.precision)}"
        )
    with refusals():
        network = models.create_model(
            config.model.name,
            num_classes=num_classes,
            surgery=Surgery(**config.surgery.to_dict()),
            dtype=np.dtype(config.train.precision),  # "bfloat16" is known to numpy through JAX
            **config.model.options.to_dict(),
        )
    return network.clone(rematerialise=config.train.rematerialise)


def create_objective(config: ml_collections.ConfigDict, num_exits: int) -> Objective:
    """The configured losses for a network of `num_exits`. Raises ConfigError for bad values."""
    with refusals():
        chosen = Objective(**config.objective.to_dict())
        chosen.check(num_exits)
    return chosen


def create_method(
    config: ml_collections.ConfigDict, network: MultiExit, objective: Objective
) -> GradientMethod:
    """The configured gradient method for a network and its losses.

    Raises ConfigError for an unknown name, bad values, and what makes no sense together.
    """
    name, options = config.gradients.name, config.gradients.options.to_dict()
    with refusals():
        chosen = gradients.create(name, num_exits=network.num_exits, **options)
        chosen.check(network, objective)
    if chosen.cycle > 1 and config.train.accumulation > 1:
        raise ConfigError(
            f"gradients {name} restarts from earlier parameters and has no gradients to "
            f"accumulate; train.accumulation must be 1, got {config.train.accumulation}"
        )
    return chosen


def _check_train(config: ml_collections.ConfigDict, num_exits: int) -> None:
    train = config.train
    if (train.epochs > 0) == (train.steps > 0) or min(train.epochs, train.steps) < 0:
        raise ConfigError(
            "set exactly one of train.epochs and train.steps to a positive number, "
            f"got {train.epochs} and {train.steps}; the other one is 0"
        )
    steps = tuple(train.profile_steps)
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise ConfigError(
            f"train.profile_steps must be (), or (first, last) with 1 <= first, got {shown(steps)}"
        )
    names = [f"eval/exit{i}/top1" for i in range(1, num_exits + 1)]
    names += ["eval/mean/top1", "eval/ensemble/top1"]
    if train.best_metric not in names:
        raise ConfigError(
            f"train.best_metric must be one of {', '.join(names)}, got {shown(train.best_metric)}"
        )


def _check_phases(
    config: ml_collections.ConfigDict,
    planned: tuple[phases.Phase, ...],
    network: MultiExit,
    method: GradientMethod,
) -> None:
    """Check what needs no data: the fields of each phase, and whether they go together."""
    if planned and method.cycle > 1:
        raise ConfigError(
            f"gradients {config.gradients.name} has phases of its own; train.phases must be ()"
        )
    for i, phase in enumerate(planned):
        with phases.named(i):
            own = phase.config(config)
            surgery = Surgery(**own.surgery.to_dict())
            create_objective(own, network.num_exits)
            optim.create_optimizer(own, steps_per_epoch=1.0, total_steps=1)
            if not phases.same_answers(surgery, network.surgery):
                raise ValueError(
                    "with this surgery the network would answer otherwise than with the "
                    "configuration's; a partition without referencing is for all phases or none"
                )


def _check_accumulation(
    config: ml_collections.ConfigDict, devices: int, method: GradientMethod
) -> None:
    count, batch_size = config.train.accumulation, config.train.batch_size
    if count < 1 or batch_size % (count * devices):
        raise ConfigError(
            f"train.accumulation = {count} does not cut train.batch_size {batch_size} into equal "
            f"microbatches for {devices} devices"
        )
    if batch_size // count < method.smallest_batch:
        raise ConfigError(
            f"gradients {config.gradients.name} needs {method.smallest_batch} examples at a time, "
            f"got train.batch_size {batch_size} with train.accumulation {count}"
        )


def _check_classes(spec: data.pipeline.Spec) -> None:
    if spec.num_classes < 2:
        raise ConfigError(
            f"data {spec.name!r} have one class, {', '.join(map(repr, spec.class_names))}, and "
            "nothing to tell apart; give two or more"
        )


def _check_inputs(
    network: MultiExit, objective: Objective, batch: Any, frozen: Sequence[str]
) -> None:
    """Check what depends on the shapes of a batch: input, features and parameter names."""
    try:
        outputs, variables = jax.eval_shape(
            lambda batch: network.init_with_output(jax.random.key(0), batch), batch
        )
    except ValueError as error:
        hint = "; see data.image_size" if "image" in str(error) else ""
        raise ConfigError(f"{error}{hint}") from error
    with refusals():
        objective.check_features([feature.shape for feature in outputs.features])
    freeze.check(frozen, variables["params"])
