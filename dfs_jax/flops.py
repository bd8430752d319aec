"""Cost and parameters of every exit of a network.

    python -m dfs_jax.flops --config configs/cifar100.py:msdnet [--config.a.b=value]
    python -m dfs_jax.flops --network msdnet_cifar100 --image-size 32 --num-classes 100

What is counted, and how, is in `models/cost.py`.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from dfs_jax.models.cost import cost_table


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command with arguments `argv`."""
    from dfs_jax.config import command, refusals

    parser = command.parser(__doc__)
    command.add_config(parser, required=False)
    parser.add_argument("--network", metavar="NAME", help="a network, instead of a configuration")
    parser.add_argument("--image-size", type=int, metavar="N", help="side of the images in pixels")
    parser.add_argument("--channels", type=int, metavar="C", help="channels of the images")
    parser.add_argument("--num-classes", type=int, metavar="K", help="width of the logits")

    def run(arguments, config):
        with refusals():
            print(cost_table(*_requested(arguments, config)))

    return command.run(parser, argv, run)


def _requested(arguments: argparse.Namespace, config: Any | None) -> tuple[Any, Any]:
    """The network that the command line asks for, and a batch of one image, as shapes."""
    from dfs_jax import data, models
    from dfs_jax.models import inputs
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
        shape = (size, size, channels or 3)
    else:
        config.data.image_size = size or config.data.image_size
        shape, known_classes = data.known_images(config)
        classes = classes or known_classes
        if None in (shape, classes):
            raise ValueError(
                f"the images of data set {config.data.name!r} are not known here; give "
                f"--image-size and --num-classes (known: {', '.join(data.KNOWN)})"
            )
        network, shape = create_network(config, classes), (*shape[:2], channels or shape[-1])
    return network, inputs.abstract(inputs.images(shape), 1)


if __name__ == "__main__":
    sys.exit(main())
