"""The training command; everything happens in `train.py`.

python -m dfs_jax.main --config FILE[:preset] --workdir DIR [--config.a.b=value …]
"""

import sys
from collections.abc import Sequence

from dfs_jax import command


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the training command with arguments `argv`."""
    parser = command.parser(__doc__)
    command.add_config(parser)
    command.add_workdir(parser)

    def run(arguments, config):
        from dfs_jax import train

        train.train_and_evaluate(config, arguments.workdir)

    return command.run(parser, argv, run)


if __name__ == "__main__":
    sys.exit(main())
