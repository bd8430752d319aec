"""Cost and parameters of every exit of a network.

    python -m dfs_jax.flops --config configs/cifar100.py:msdnet [--config.a.b=value]
    python -m dfs_jax.flops --network msdnet_cifar100 --image-size 32 --num-classes 100

What is counted, and how, is in `models/cost.py`.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from dfs_jax.models.cost import cost_table

# Image shape and number of classes by `config.data.name`: the command must not prepare data.
DATA_SETS: dict[str, tuple[tuple[int, int, int], int]] = {
    "digits": ((8, 8, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "double_digits/clean": ((32, 32, 3), 100),
    "double_digits/hard": ((32, 32, 3), 100),
    "double_digits/units": ((32, 32, 3), 10),
    "imagenet2012": ((224, 224, 3), 1000),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command with arguments `argv`."""
    from dfs_jax.config import command

    parser = command.parser(__doc__)
    command.add_config(parser, required=False)
    parser.add_argument("--network", metavar="NAME", help="a network, instead of a configuration")
    parser.add_argument("--image-size", type=int, metavar="N", help="side of the images in pixels")
    parser.add_argument("--channels", type=int, metavar="C", help="channels of the images")
    parser.add_argument("--num-classes", type=int, metavar="K", help="width of the logits")

    def run(arguments, config):
        with _refusals():
            print(cost_table(*_requested(arguments, config)))

    return command.run(parser, argv, run)


def _requested(
    arguments: argparse.Namespace, config: Any | None
) -> tuple[Any, tuple[int, int, int]]:
    """The network that the command line asks for, and its image shape."""
    from dfs_jax import models
    from dfs_jax.surgery import Surgery
    from dfs_jax.training.run import create_network

    size, channels, classes = arguments.image_size, arguments.channels, arguments.num_classes
    for flag, value in (("image-size", size), ("channels", channels), ("num-classes", classes)):
        if value is not None and value < 1:
            raise ValueError(f"--{flag} must be at least 1, got {value}")
    if (config is None) == (arguments.network is None):
        raise ValueError("give either --config FILE or --network NAME")
    if config is None:
        if size is None or classes is None:
            raise ValueError("--network needs --image-size and --num-classes too")
        network = models.create_model(arguments.network, num_classes=classes, surgery=Surgery())
        return network, (size, size, channels or 3)
    data = config.data.name
    if data not in DATA_SETS and None in (size or config.data.image_size or None, classes):
        raise ValueError(
            f"the images of data set {data!r} are not known here; give --image-size and "
            f"--num-classes (known: {', '.join(DATA_SETS)})"
        )
    (side, _, own_channels), own_classes = DATA_SETS.get(data, ((size, size, 3), classes))
    side = size or config.data.image_size or side
    network = create_network(config, classes or own_classes)
    return network, (side, side, channels or own_channels)


@contextlib.contextmanager
def _refusals():
    """Tell a value that networks or counting refuse as a request that cannot be carried out."""
    from dfs_jax.config import ConfigError

    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
