"""Answers for image files from an exported bundle.

    python -m dfs_jax.predict --bundle BUNDLE [--budget COST] [--json] IMAGE…

Every image gets its label, the confidence of the exit that answered, which exit that was, and
what the answer cost in multiply-adds: in a table, or as JSON lines while it goes on. With
`--budget 100e6` the most accurate thresholds are used whose mean cost per image, as measured on
the validation split, is at most that. A file that is no image is named on standard error and the
others are answered; the exit status then is 1.
"""

import argparse
import sys
from collections.abc import Sequence

from dfs_jax.config import command, refusals
from dfs_jax.early_exit.bundle import EarlyExit
from dfs_jax.early_exit.serving import predictions
from dfs_jax.writing.files import json_text
from dfs_jax.writing.tables import format_table


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command with arguments `argv`."""
    parser = command.parser(__doc__)
    parser.add_argument("--bundle", required=True, metavar="BUNDLE", help="an exported network")
    parser.add_argument("--budget", type=float, metavar="COST", help="multiply-adds per image")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    return command.run(parser, argv, lambda arguments, _: _predict(arguments))


def _predict(arguments: argparse.Namespace) -> int:
    with refusals("--bundle"):
        early_exit = EarlyExit.load(arguments.bundle)
    with refusals("--budget"):
        early_exit.within(arguments.budget)
    failures: list[str] = []
    answers = predictions(early_exit, arguments.images, arguments.budget, failures)
    if arguments.json:
        for answer in answers:
            print(json_text(answer._asdict()), end="", flush=True)
    elif rows := [(*p[:4], f"{p.cost / 1e6:.3f}") for p in answers]:
        print(format_table(rows, ("image", "label", "confidence", "exit", "cost (M)")))
    if failures:
        count = len(arguments.images)
        print(f"{len(failures)} of {count} files could not be read as images", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
