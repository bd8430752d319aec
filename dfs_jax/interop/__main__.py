"""PyTorch weights into a workdir, and a workdir's weights out for PyTorch.

    python -m dfs_jax.interop --network NAME --weights FILE --workdir DIR
    python -m dfs_jax.interop --workdir DIR --export FILE

FILE is .npz or .safetensors, or .pth for reading where PyTorch is installed. The first form
makes DIR look like a run of 0 steps, which `dfs_jax.evaluate` reads as it does any other.
The number of classes and the size of the images are taken from the weights. Averaged weights are
preferred where a file has both kinds, and what stands before the names ("module.", "model." …) is
taken off; what was taken is told. With
`--config FILE[:preset]` everything that the weights do not say comes from there.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dfs_jax import config as configuration
from dfs_jax import data
from dfs_jax.config import ConfigError, command
from dfs_jax.data.pipeline import Spec
from dfs_jax.distributed import placement
from dfs_jax.interop import files, torch
from dfs_jax.models import inputs
from dfs_jax.training import checkpoint, lineage, optim
from dfs_jax.training import workdir as workdirs
from dfs_jax.training.run import Run, create_method, create_network, create_objective, prepare
from dfs_jax.training.state import initial_state, refuse_not_finite, restore


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command with arguments `argv`."""
    parser = command.parser(__doc__)
    command.add_workdir(parser)
    command.add_config(parser, required=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", metavar="FILE", help="weights to put into the workdir")
    what.add_argument("--export", metavar="FILE", help="where to write the workdir's weights")

    load = parser.add_argument_group("with --weights")
    load.add_argument("--network", metavar="NAME", help="one of dfs_jax.models.names()")
    load.add_argument("--num-classes", type=int, metavar="N", help="default: as the weights say")
    load.add_argument("--data", metavar="NAME", help="default: by the name of the network")
    load.add_argument("--beta", type=float, help="where surgery cuts, and VGG's kernels")
    load.add_argument("--exit-gradient", choices=("own", "all"))
    load.add_argument("--no-partition", action="store_true", help="a network without surgery")
    load.add_argument("--no-referencing", action="store_true", help="partition alone")
    load.add_argument("--adapters", action="store_true", help="weights of adapters are there")
    load.add_argument(
        "--backbone",
        action="store_true",
        help="the weights lack the exits, or have others: those start from initial values",
    )
    save = parser.add_argument_group("with --export")
    command.add_data_dir(save)
    save.add_argument("--step", default="latest", metavar="latest|best|N", help="checkpoint")
    return command.run(parser, argv, _run)


def _run(arguments: argparse.Namespace, config: ml_collections.ConfigDict | None) -> None:
    try:
        if arguments.export:
            _export(arguments)
        else:
            _load(arguments, config)
    except torch.InteropError as error:
        raise ConfigError(str(error)) from error


def _load(arguments: argparse.Namespace, config: ml_collections.ConfigDict | None) -> None:
    """Write the weights as the checkpoint of step 0 of a new workdir."""
    config = _configuration(arguments, config)
    if workdirs.load(arguments.workdir) is not None:
        raise ConfigError(f"--workdir: {arguments.workdir} holds a run; choose a new one")
    arrays = files.read_weights(arguments.weights)
    made = torch.made_for(create_network(config, num_classes=1), arrays)
    if arguments.backbone:
        network = create_network(config, _num_classes_asked(arguments))
        variables = torch.from_backbone(network, arrays, jax.random.key(config.seed))
    else:
        # Without its last exit a file is refused, and the exit named.
        network = create_network(config, made.num_classes or arguments.num_classes or 1)
        variables = torch.from_state_dict(network, arrays)
        _check_classes(arguments, config, network.num_classes)
    variables = _cast(arguments, config, network, variables)
    state = _first_state(config, network, made.image_shape, variables)
    directory = workdirs.create(config, arguments.workdir)
    lineage.record_origin(directory, arguments.weights)
    with checkpoint.Checkpointer(directory / "checkpoints", best_metric=None) as saver:
        saver.save(0, state, {"step": 0}, {})
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    print(
        f"{config.model.name} with {network.num_classes} classes, {count:,} parameters, "
        f"as the checkpoint of step 0 in {arguments.workdir}"
    )


def _num_classes_asked(arguments: argparse.Namespace) -> int:
    if arguments.num_classes is None:
        raise ConfigError("--backbone needs --num-classes: the exits will be new ones")
    if arguments.num_classes < 1:
        raise ConfigError(f"--num-classes must be at least 1, got {arguments.num_classes}")
    return arguments.num_classes


def _check_classes(
    arguments: argparse.Namespace, config: ml_collections.ConfigDict, made_for: int
) -> None:
    """Refuse weights whose exits are for another number of classes than is asked for."""
    asked = arguments.num_classes is not None
    wanted = arguments.num_classes if asked else data.known_images(config)[1]
    if wanted in (None, made_for):
        return
    source = "--num-classes" if asked else f"data set {config.data.name!r}"
    raise ConfigError(
        f"--weights: {arguments.weights} is made for {made_for} classes, {source} says {wanted}: "
        f"--backbone --num-classes {wanted} takes all but the exits, which then start from initial "
        "values; --data names another data set"
    )


def _cast(
    arguments: argparse.Namespace,
    config: ml_collections.ConfigDict,
    network: Any,
    variables: Mapping[str, Any],
) -> Mapping[str, Any]:
    """`variables` in the type of a run's weights; refuses what are no finite numbers in it."""
    where = f"--weights: {arguments.weights}"
    for name, value in torch.to_state_dict(network, variables).items():
        counter = name.endswith("num_batches_tracked")
        if not (counter or jnp.issubdtype(value.dtype, jnp.floating)):
            raise ConfigError(f"{where} has {value.dtype} in {name}, not floating-point numbers")
    kind = np.promote_types(np.float32, config.train.precision)
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        variables = jax.tree.map(lambda leaf: np.asarray(leaf).astype(kind), variables)
    refuse_not_finite(torch.to_state_dict(network, variables), f"{where}, as {kind},")
    return variables


def _configuration(
    arguments: argparse.Namespace, config: ml_collections.ConfigDict | None
) -> ml_collections.ConfigDict:
    """The given configuration, or the default one, with the flags applied."""
    if arguments.network is None and config is None:
        raise ConfigError("--weights needs --network NAME, or --config FILE[:preset]")
    fresh = config is None
    config = config or configuration.default()
    if arguments.network is not None and (fresh or arguments.network != config.model.name):
        configuration.set_network(config, arguments.network)
    if arguments.adapters:
        config.model.options.adapters = True
    if arguments.beta is not None:
        config.surgery.beta = arguments.beta
    if arguments.exit_gradient is not None:
        config.surgery.exit_gradient = arguments.exit_gradient
    config.surgery.partition &= not arguments.no_partition
    config.surgery.referencing &= not arguments.no_referencing
    if fresh or arguments.data:
        config.data.name = _data_for(arguments)
    if config.train.steps == 0 and config.train.epochs == 0:
        config.train.steps = 1  # a configuration needs a length, though nothing was trained
    return config


def _data_for(arguments: argparse.Namespace) -> str:
    """`--data`, or what the network's name ends in: "vgg7_cifar100" is for "cifar100"."""
    word = arguments.data or arguments.network.rsplit("_", 1)[-1]
    for name in data.names():
        if name == word or (name.startswith(word) and not arguments.data):
            return name
    known = ", ".join(data.names())
    if arguments.data:
        raise ConfigError(f"--data: there is no data set {word!r}; known: {known}")
    raise ConfigError(f"--data: {arguments.network} does not say what it is for; known: {known}")


def _first_state(
    config: ml_collections.ConfigDict,
    network: Any,
    image_shape: tuple[int, int, int],
    variables: Mapping[str, Any],
) -> Any:
    """The state of a run of `config` before its first step, with `variables` as its weights.

    Needs no data: all that a state depends on is the shape of the images.
    """
    optimizer, schedule = optim.create_optimizer(config, steps_per_epoch=1.0, total_steps=1)
    objective = create_objective(config, network.num_exits)
    spec = Spec(config.data.name, inputs.images(image_shape), network.num_classes, (), 0, 0, 0)
    run = Run(
        config,
        data.Data(train=None, validation=None, test=None, spec=spec),
        network,
        objective,
        create_method(config, network, objective),
        optimizer,
        schedule,
        placement.create_mesh(config),
        steps_per_epoch=1.0,
        total_steps=1,
    )
    return initial_state(run, variables)


def _export(arguments: argparse.Namespace) -> None:
    """Write the weights of a run's checkpoint, those that evaluation uses, to a file."""
    config = workdirs.saved_config(arguments.workdir, arguments.data_dir)
    run = prepare(config, arguments.workdir)  # the data say how many classes there are
    step, state = restore(run, arguments.workdir, arguments.step)
    entries = torch.to_state_dict(run.network, jax.device_get(state.variables))
    files.write_weights(arguments.export, entries)
    print(f"{len(entries)} entries of the checkpoint of step {step} in {arguments.export}")


if __name__ == "__main__":
    sys.exit(main())
