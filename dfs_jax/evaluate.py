"""Every exit of a trained run on a whole split: accuracy, early exit, calibration, conflict.

    python -m dfs_jax.evaluate --workdir DIR [--step latest|best|N] [--out DIR] [--data_dir DIR]
        [--score max_softmax|margin|entropy|patience] [--published NAME]
        [--budget COST | --accuracy A | --risk E --confidence D] [--beside DIR …]

Every example counts exactly once, on any number of devices and hosts: the last batch is padded
and masked, and counts are integers added on the host. The command measures, on the test split,

    anytime       accuracy of each exit and of their ensemble, against cost
    budgeted      early exit by threshold at 40 budgets, fitted on the validation split
    calibration   whether confidences are probabilities, before and after a temperature

shows what training has measured,

    conflict      angles between the exits' gradients, beside those of other runs (--beside DIR …)

and writes anytime.csv, budgeted.csv, calibration.csv, conflict.csv, evaluation.json, plots of the
four, and budgets.json: thresholds for any cost or accuracy (`early_exit.budget.family`). With a
target it also writes the thresholds that meet it to thresholds.json: a mean cost per image
(--budget 100e6 multiply-adds), a validation accuracy in [0, 1], or an accuracy at most E below the
full network's with probability D. Without a validation split there are no thresholds and no
temperatures; with `--split validation` they are shown on the very images they were fitted to.

The files are those of one evaluation: what this one does not write anew is removed, and told.
Thresholds say the step and the weights that they were fitted to, and warn if the weights may have
been trained on the validation images (`training/lineage.py`).
"""

import sys
from collections.abc import Sequence

from dfs_jax.config import command
from dfs_jax.early_exit import confidence
from dfs_jax.evaluation.trained import evaluate_workdir


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the evaluation command with arguments `argv`."""
    parser = command.parser(__doc__)
    command.add_workdir(parser)
    command.add_data_dir(parser)
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--step", default="latest", metavar="latest|best|N", help="checkpoint")
    parser.add_argument("--out", metavar="DIR", help="where results go; default: the workdir")
    parser.add_argument(
        "--score", default="max_softmax", choices=confidence.names(), help="what thresholds compare"
    )
    parser.add_argument("--published", metavar="NAME", help="published results to plot as well")
    parser.add_argument(
        "--beside", nargs="+", default=(), metavar="DIR", help="workdirs to compare conflict with"
    )
    target = parser.add_argument_group("thresholds for a target")
    target.add_argument("--budget", type=float, metavar="COST", help="multiply-adds per image")
    target.add_argument("--accuracy", type=float, metavar="A", help="on validation, in [0, 1]")
    target.add_argument("--risk", type=float, metavar="E", help="loss of accuracy, in (0, 1)")
    target.add_argument("--confidence", type=float, metavar="D", help="probability of that")
    return command.run(parser, argv, lambda arguments, _: evaluate_workdir(arguments))


if __name__ == "__main__":
    sys.exit(main())
