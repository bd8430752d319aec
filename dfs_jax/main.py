"""The training command; the run is in `training/loop.py`.

python -m dfs_jax.main --config FILE[:preset] --workdir DIR [--config.a.b=value …]
"""

import sys
from collections.abc import Sequence

from dfs_jax.config import command


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the training command with arguments `argv`."""
    parser = command.parser(__doc__)
    command.add_config(parser)
    command.add_workdir(parser)
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where the processes meet")
    parser.add_argument("--num-processes", type=int, metavar="N", help="processes of this run")
    parser.add_argument("--process-id", type=int, metavar="I", help="this one's number, from 0")

    def run(arguments, config):
        from dfs_jax.distributed import processes
        from dfs_jax.ops import allocator
        from dfs_jax.training import loop

        allocator.keep_freed_memory()
        processes.start_processes(
            arguments.coordinator, arguments.num_processes, arguments.process_id
        )
        with processes.ending_together():
            loop.train_and_evaluate(config, arguments.workdir)

    return command.run(parser, argv, run)


if __name__ == "__main__":
    sys.exit(main())
