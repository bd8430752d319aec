"""What a training step costs by method, what it saves, and how fast its input is.

    python -m dfs_jax.benchmark --config FILE[:network] [--methods joint dfs …]
        [--batch_sizes B …] [--pairs N] [--calls N] [--num_classes K] [--out FILE]
    python -m dfs_jax.benchmark --config FILE[:preset] --input_only [--batches N] [--steps N]
        [--start STEP] [--out FILE]
    python -m dfs_jax.benchmark --config FILE[:preset] --overheads [--pairs N] [--out FILE]

The first form needs no data: its images are random. It compiles forward, forward and backward,
and the training step of every method, and times each method in turn with joint training. It
prints two tables and writes them with a chart: FILE.json (with every time), FILE.csv, FILE.md and
FILE.png, where one of these suffixes on FILE is dropped first. Methods are the method words of
the configuration file; `--config.a.b=value` holds for all of them.

`--input_only` measures, on the configured data, batches alone, the step alone (on one batch again
and again), and both together, as training runs them; with `--start`, how long a run that goes on
at that step waits for its first batch. `--overheads` measures what else a run spends time on:
per-exit gradients, reporting, evaluation, compilation. Both write JSON to FILE, as it is named.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_collections

from dfs_jax.config import ConfigError, command, limits
from dfs_jax.config.errors import shown
from dfs_jax.distributed import placement
from dfs_jax.ops import allocator
from dfs_jax.profiling import methods, overheads, random_images, report, step_cost
from dfs_jax.profiling.input_rate import measure_input
from dfs_jax.training.run import prepare
from dfs_jax.writing.files import json_text, write_whole


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command with arguments `argv`."""
    parser = command.parser(__doc__)
    command.add_config(parser)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--input_only", action="store_true", help="measure the input")
    kind.add_argument("--overheads", action="store_true", help="measure what is not the step")
    steps = parser.add_argument_group("the step")
    steps.add_argument(
        "--methods",
        nargs="+",
        default=[step_cost.BASELINE, "dfs"],
        metavar="WORD",
        help="method words of the configuration file; joint is always among them",
    )
    steps.add_argument(
        "--batch_sizes", nargs="+", type=int, metavar="B", help="default: train.batch_size"
    )
    steps.add_argument(
        "--pairs", type=int, default=10, metavar="N", help="measurements of each (default: 10)"
    )
    steps.add_argument(
        "--calls",
        type=int,
        default=1,
        metavar="N",
        help="calls in a row in one measurement (default: 1); more keep an accelerator busy",
    )
    steps.add_argument(
        "--num_classes", type=int, metavar="K", help="where the data set is not known"
    )
    inputs = parser.add_argument_group("the input")
    inputs.add_argument(
        "--batches", type=_positive, default=30, metavar="N", help="batches alone to measure"
    )
    inputs.add_argument(
        "--steps", type=_count, default=10, metavar="N", help="training steps to measure; 0: none"
    )
    inputs.add_argument(
        "--start", type=_count, default=0, metavar="STEP", help="the first batch's step"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write; see above for the names"
    )
    return command.run(parser, argv, _report)


def _report(arguments: argparse.Namespace, config: ml_collections.ConfigDict) -> None:
    allocator.keep_freed_memory()  # as training does
    if arguments.input_only:
        _report_input(arguments, config)
    elif arguments.overheads:
        _report_overheads(arguments, config)
    else:
        _report_steps(arguments, config)


def _report_steps(arguments: argparse.Namespace, config: ml_collections.ConfigDict) -> None:
    _check_at_least_one(arguments, "pairs", "calls", "num_classes")
    batch_sizes = arguments.batch_sizes or [config.train.batch_size]
    configs = methods.method_configs(arguments.config, arguments.methods, arguments.overrides)
    runs = methods.random_runs(configs, batch_sizes, arguments.num_classes)
    _check_out(arguments.out)
    run = runs[batch_sizes[0]][step_cost.BASELINE]
    print(placement.describe(run.mesh), flush=True)
    heading = report.heading(arguments.config, arguments.overrides, run)
    heading |= {"pairs": arguments.pairs, "calls": arguments.calls}
    costs = []
    for size, own in runs.items():
        print(f"batch size {size}: {', '.join(own)}", file=sys.stderr, flush=True)
        costs += step_cost.measure(own, arguments.pairs, arguments.calls)
    print(report.markdown(heading, costs), end="")
    if arguments.out is not None:
        paths = report.write(arguments.out, heading, costs)
        print(f"\nwritten: {', '.join(map(str, paths))}")


def _report_overheads(arguments: argparse.Namespace, config: ml_collections.ConfigDict) -> None:
    _check_at_least_one(arguments, "pairs")
    run = random_images.random_run(config, arguments.num_classes)
    _check_out(arguments.out)
    print(placement.describe(run.mesh), flush=True)
    found = overheads.measure(run, arguments.pairs)
    print(f"{run.config.model.name}, batches of {config.train.batch_size}\n")
    print(found.table())
    if arguments.out is not None:
        figures = report.heading(arguments.config, arguments.overrides, run)
        figures |= {"batch_size": config.train.batch_size}
        figures |= {"config_sha256": step_cost.sha256(config), **found.as_json()}
        write_whole(arguments.out, json_text(figures, indent=2))


def _report_input(arguments: argparse.Namespace, config: ml_collections.ConfigDict) -> None:
    _check_out(arguments.out)
    run = prepare(config)
    found = measure_input(run, arguments.batches, arguments.steps, arguments.start)
    print(placement.describe(run.mesh))
    print(f"{run.data.spec.name}, batches of {config.train.batch_size}, {config.model.name}\n")
    print(found.table())
    if arguments.out is not None:
        figures = {
            "config": arguments.config,
            "data": run.data.spec.name,
            "network": config.model.name,
            "batch_size": config.train.batch_size,
            "devices": placement.describe(run.mesh),
            "jax": jax.__version__,
            **found.as_json(),
        }
        write_whole(arguments.out, json_text(figures, indent=2))


def _check_at_least_one(arguments: argparse.Namespace, *flags: str) -> None:
    for flag in flags:
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} must be at least 1, got {value}")
        if value is not None and value > limits.LARGEST_INTEGER:
            raise ConfigError(f"--{flag} must be below 2**31, got {shown(value)}")


def _check_out(out: Path | None) -> None:
    """Raise ConfigError unless files can be written beside `out`, which takes long to come."""
    if out is None:
        return
    if out.is_dir():
        raise ConfigError(f"--out: {out} is a folder; name a file")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--out: cannot write to folder {out.parent}: {reason}") from error


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    if value > limits.LARGEST_INTEGER:
        raise argparse.ArgumentTypeError(f"{value} is more than {limits.LARGEST_INTEGER:,}")
    return value


def _positive(text: str) -> int:
    value = _count(text)
    if value == 0:
        raise argparse.ArgumentTypeError("give at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
