"""A grid of runs on one recipe, and its report.

    python -m dfs_jax.ablate --config configs/ablations/beta.py --workdir DIR [--shard 3/8]

Runs the grid one run after another, or every eighth run with `--shard`, so that a job array
spreads it over machines. What happens is in `sweeps/`.
"""

import argparse
import re
import sys
from collections.abc import Sequence

from dfs_jax.config import ConfigError, command
from dfs_jax.sweeps.grid import Grid, load
from dfs_jax.sweeps.runs import run

__all__ = ["Grid", "main"]  # files that define a grid may import it from here


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the ablation command: 1 if a run failed."""
    parser = command.parser(__doc__)
    parser.add_argument("--config", dest="grid", required=True, metavar="FILE", help="the grid")
    command.add_workdir(parser)
    parser.add_argument("--shard", default="1/1", metavar="K/N", help="run K, K+N, … of the grid")
    return command.run(parser, argv, lambda arguments, _: _ablate(arguments))


def _ablate(arguments: argparse.Namespace) -> int:
    grid, cells = load(arguments.grid)
    return int(not run(grid, cells, arguments.workdir, _shard(arguments.shard)))


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--shard must be K/N with 1 <= K <= N, got {text!r}")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
