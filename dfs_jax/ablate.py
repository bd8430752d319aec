"""A grid of runs on one recipe, and its report; own command.

    python -m dfs_jax.ablate --config configs/ablations/beta.py --workdir DIR [--shard 3/8]

Runs the grid one run after another, or every eighth run with `--shard`, so that a job array
spreads it over machines. A finished run is skipped, an unfinished one goes on where it stopped, a
failed one is listed and the rest go on. What is written of the results is in
`ablation_report.py`; how a run is trained in `train.py`.
"""

import dataclasses
import itertools
import logging
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from etils import epath

from dfs_jax import ablation_report, command, conflict_report, metrics, train
from dfs_jax import config as configuration
from dfs_jax.config import ConfigError
from dfs_jax.saving import Preempted

log = logging.getLogger(__name__)

_SECONDS = "seconds.txt"  # of a run: how long the process that finished it took

# Labels of an axis and the overrides that each stands for; "preset=WORD" chooses a preset word.
Axis = Mapping[str, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Every combination of the values of some axes, on one configuration.

    Attributes:
      base: configuration file, relative to the file that defines the grid.
      axes: for each axis either labels with their overrides, or the name of a field with its
        values. "seeds" is the axis over which results are averaged: it sets `seed` and
        `data.seed` together.
      baseline: labels of the configuration to which the others are compared, by axis; an axis
        that it leaves out is compared at equal values.
      overrides: fields that every run sets.
    """

    base: str
    axes: Mapping[str, Axis | Sequence[Any]]
    baseline: Mapping[str, str] = dataclasses.field(default_factory=dict)
    overrides: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a grid: its labels by axis, and its configuration."""

    labels: Mapping[str, str]
    config: ml_collections.ConfigDict

    @property
    def name(self) -> str:
        """Folder of the run."""
        words = [f"{axis.rsplit('.', 1)[-1]}={label}" for axis, label in self.labels.items()]
        return re.sub(r"[^\w=.,+-]+", "_", ",".join(words))


def cells(grid: Grid, directory: Path) -> list[Cell]:
    """All runs of `grid`, in order, the seeds changing fastest; raises ConfigError."""
    axes = {name: _axis(name, values) for name, values in grid.axes.items()}
    if "seeds" in axes:
        axes["seeds"] = axes.pop("seeds")
    for axis, label in grid.baseline.items():
        if label not in axes.get(axis, ()):
            raise ConfigError(
                f"the grid's baseline names {axis}={label}, which is not an axis value"
            )
    result = []
    for labels in itertools.product(*axes.values()):
        chosen = dict(zip(axes, labels, strict=True))
        overrides = [*grid.overrides]
        overrides += [item for axis, label in chosen.items() for item in axes[axis][label]]
        words = [item.partition("=")[2] for item in overrides if item.startswith("preset=")]
        fields = [item for item in overrides if not item.startswith("preset=")]
        base = f"{directory / grid.base}:{','.join(words)}"
        result.append(Cell(chosen, configuration.load(base, fields)))
    names = [cell.name for cell in result]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two runs of the grid have the same labels: {name}")
    return result


def _axis(name: str, values: Axis | Sequence[Any]) -> dict[str, tuple[str, ...]]:
    if isinstance(values, Mapping):
        return {label: tuple(overrides) for label, overrides in values.items()}
    if name == "seeds":
        return {str(seed): (f"seed={seed}", f"data.seed={seed}") for seed in values}
    return {str(value): (f"{name}={value}",) for value in values}


def load(path: str) -> tuple[Grid, list[Cell]]:
    """The grid that the file `path` defines with `get_grid()`, and its runs."""
    module = configuration.load_module(path)
    if not hasattr(module, "get_grid"):
        raise ConfigError(f"--config: {path!r} has no function get_grid()")
    grid = module.get_grid()
    return grid, cells(grid, Path(path).resolve().parent)


def run(grid: Grid, runs: Sequence[Cell], workdir: str, shard: tuple[int, int] = (1, 1)) -> bool:
    """Train the runs of `shard` (k of n, from 1) and report on all that are finished.

    Returns whether every run of the shard succeeded.
    """
    directory = epath.Path(workdir)
    mine = runs[shard[0] - 1 :: shard[1]]
    failed: dict[str, str] = {}
    began, trained = time.monotonic(), 0
    for number, cell in enumerate(mine, 1):
        place = directory / "runs" / cell.name
        if scores(place) is not None:
            log.info("[%d/%d] %s: finished before", number, len(mine), cell.name)
            continue
        log.info("[%d/%d] %s", number, len(mine), cell.name)
        since = time.monotonic()
        try:
            command.configure_jax(cell.config)
            train.train_and_evaluate(cell.config, str(place))
        except Preempted:  # the machine is wanted back: the grid ends, and goes on from here
            raise
        except Exception as error:  # one bad run must not cost the night's others
            failed[cell.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("%s failed: %s", cell.name, failed[cell.name])
        else:
            trained += 1
            seconds = time.monotonic() - since
            (place / _SECONDS).write_text(f"{seconds:.1f}\n")
            left = (time.monotonic() - began) / number * (len(mine) - number)
            log.info("%s took %.0f s; about %.0f min to go", cell.name, seconds, left / 60)
        jax.clear_caches()  # the next run compiles programs of its own
    rows = []
    for cell in runs:
        place = directory / "runs" / cell.name
        result = scores(place)
        if result is not None:
            conflict = conflict_report.of_workdir(place)
            rows.append(ablation_report.Row(cell.labels, result, _seconds(place), conflict))
    if rows:
        ablation_report.write(directory, rows, grid.baseline)
        print(ablation_report.markdown(rows, grid.baseline), flush=True)
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", flush=True)
    print(f"{len(rows)} of {len(runs)} runs are finished; report in {directory}", flush=True)
    return not failed


def scores(place: epath.Path) -> dict[str, float] | None:
    """The test metrics of the finished run in `place`, or None if it is unfinished."""
    final = [line for line in metrics.read_metrics(place) if "test/ensemble/top1" in line]
    if not final:
        return None
    return {name: value for name, value in final[-1].items() if name.startswith("test/")}


def _seconds(place: epath.Path) -> float | None:
    path = place / _SECONDS
    return float(path.read_text()) if path.exists() else None


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the ablation command: 1 if a run failed."""
    parser = command.parser(__doc__)
    parser.add_argument("--config", dest="grid", required=True, metavar="FILE", help="the grid")
    command.add_workdir(parser)
    parser.add_argument("--shard", default="1/1", metavar="K/N", help="run K, K+N, … of the grid")
    failed = []

    def body(arguments: Any, _: None) -> None:
        grid, runs = load(arguments.grid)
        shard = _shard(arguments.shard)
        failed.append(not run(grid, runs, arguments.workdir, shard))

    status = command.run(parser, argv, body)
    return status or int(any(failed))


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--shard must be K/N with 1 <= K <= N, got {text!r}")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
