"""A grid of runs on one recipe, and its report.

    python -m dfs_jax.ablate --config configs/ablations/beta.py --workdir DIR [--shard 3/8]
    python -m dfs_jax.ablate --report DIR

Runs the grid one run after another, or every eighth run with `--shard`, so that a job array
spreads it over machines. When a run ends its figures are kept as small text, record.json in its
folder. The second form makes the report again, from the records in DIR/*/ or DIR/runs/*/ alone.
What happens is in `sweeps/`, what the report is in `sweeps/report.py`.
"""

import argparse
import re
import sys
from collections.abc import Sequence

from etils import epath

from dfs_jax.config import ConfigError, command
from dfs_jax.sweeps import report
from dfs_jax.sweeps.grid import Grid, load
from dfs_jax.sweeps.runs import run

__all__ = ["Grid", "main"]  # files that define a grid may import it from here


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the ablation command: 1 if a run failed."""
    parser = command.parser(__doc__)
    parser.add_argument("--config", dest="grid", metavar="FILE", help="the grid")
    command.add_workdir(parser, required=False)
    parser.add_argument("--shard", default="1/1", metavar="K/N", help="run K, K+N, … of the grid")
    parser.add_argument("--report", metavar="DIR", help="make its report again, train nothing")
    return command.run(parser, argv, lambda arguments, _: _ablate(arguments))


def _ablate(arguments: argparse.Namespace) -> int:
    if arguments.report is not None:
        if arguments.grid or arguments.workdir:
            raise ConfigError("--report DIR stands alone: it reads records, and trains nothing")
        report.again(epath.Path(arguments.report))
        return 0
    if not (arguments.grid and arguments.workdir):
        raise ConfigError(
            "give a grid and its folder, --config FILE --workdir DIR, or --report DIR"
        )
    grid, cells = load(arguments.grid)
    return int(not run(grid, cells, arguments.workdir, _shard(arguments.shard)))


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--shard must be K/N with 1 <= K <= N, got {text!r}")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
