"""The runs of a grid, one after another, and the report on all that are finished.

A finished run is skipped, an unfinished one goes on where it stopped, a failed one is listed and
the rest go on; numbers of a configuration that the grid no longer has are refused. Which runs a
grid has is in `grid.py`, what is kept of a run in `records.py`, what is written in `report.py`.
"""

import logging
import time
from collections.abc import Mapping, Sequence

import jax
import ml_collections
from etils import epath

from dfs_jax.config import ConfigError, command
from dfs_jax.sweeps import records, report
from dfs_jax.sweeps.grid import Cell, Grid
from dfs_jax.sweeps.measured import measured
from dfs_jax.sweeps.records import Record
from dfs_jax.training import loop, metrics
from dfs_jax.training import workdir as workdirs
from dfs_jax.training.save_policy import Preempted
from dfs_jax.writing.files import write_whole

log = logging.getLogger(__name__)

_SECONDS = "seconds.txt"  # of a run: how long the process that finished it took


def run(grid: Grid, runs: Sequence[Cell], workdir: str, shard: tuple[int, int] = (1, 1)) -> bool:
    """Train the runs of `shard` (k of n, from 1) and report on all that are finished.

    Returns whether every run of the shard succeeded, and nothing finished is of another grid.
    """
    directory = epath.Path(workdir)
    places = {cell.name: directory / "runs" / cell.name for cell in runs}
    mine = runs[shard[0] - 1 :: shard[1]]
    failed: dict[str, str] = {}
    began, trained = time.monotonic(), 0
    for number, cell in enumerate(mine, 1):
        place = places[cell.name]
        since = time.monotonic()
        try:
            if _record(grid, runs, cell, place) is not None:
                log.info("[%d/%d] %s: finished before", number, len(mine), cell.name)
                _keep(grid, runs, cell, place)
                continue
            log.info("[%d/%d] %s", number, len(mine), cell.name)
            command.configure_jax(cell.config)
            loop.train_and_evaluate(cell.config, str(place))
        except Preempted:  # the machine is wanted back: the grid ends, and goes on from here
            raise
        except Exception as error:  # one bad run must not cost the night's others
            failed[cell.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("%s failed: %s", cell.name, failed[cell.name])
        else:
            trained += 1
            seconds = time.monotonic() - since
            write_whole(place / _SECONDS, f"{seconds:.1f}\n")
            left = (time.monotonic() - began) / number * (len(mine) - number)
            log.info("%s took %.0f s; about %.0f min to go", cell.name, seconds, left / 60)
            _keep(grid, runs, cell, place)
        jax.clear_caches()  # the next run compiles programs of its own
    found = _finished(grid, runs, places, failed)
    if found:
        report.write(directory, found, grid.baseline)
        print(report.markdown(found, grid.baseline), flush=True)
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", flush=True)
    print(f"{len(found)} of {len(runs)} runs are finished; report in {directory}", flush=True)
    return not failed


def _finished(
    grid: Grid, runs: Sequence[Cell], places: Mapping[str, epath.Path], failed: dict[str, str]
) -> list[Record]:
    """What is finished, other shards' included; what cannot be counted is entered in `failed`."""
    found = []
    for cell in runs:
        try:
            record = _record(grid, runs, cell, places[cell.name])
        except ConfigError as error:
            failed.setdefault(cell.name, f"{type(error).__name__}: {error}")
            continue
        if record is not None:
            found.append(record)
    return found


def _keep(grid: Grid, runs: Sequence[Cell], cell: Cell, place: epath.Path) -> None:
    """Write the record of a finished run, for which it is measured if it has not been."""
    record = _record(grid, runs, cell, place)
    if record is not None:
        more = measured(cell.config, place, record.step, _before(place))
        records.write(place, record._replace(**more))


def _record(grid: Grid, runs: Sequence[Cell], cell: Cell, place: epath.Path) -> Record | None:
    """The record of the run in `place` as far as it needs no checkpoint; None if unfinished.

    A record that stands alone, as it was committed, is that of a finished run too.
    """
    number = [other.name for other in runs].index(cell.name)
    told = {"labels": cell.labels, "number": number, "baseline": grid.baseline}
    if workdirs.load(str(place)) is None and (alone := records.read(place)) is not None:
        records.check(alone, cell.config, place)
        return alone._replace(**told)
    result = finished(cell, place)
    if result is None:
        return None
    record = records.of_run(place, result, seconds=_seconds(place), **told)
    if (before := _before(place)) is not None and before.step == record.step:
        record = record._replace(step_flops=before.step_flops, budgeted=before.budgeted)
    return record


def _before(place: epath.Path) -> Record | None:
    """The record that is there; one that cannot be read is made again."""
    try:
        return records.read(place)
    except ConfigError as error:
        log.warning("%s", error)
        return None


def finished(cell: Cell, place: epath.Path) -> dict[str, float] | None:
    """The test metrics of the run in `place`, or None if it has not come to the end of `cell`.

    Raises ConfigError, which names what differs, if it is a run of another configuration.
    """
    workdirs.check(cell.config, str(place))
    before = workdirs.load(str(place))
    if before is not None and _length(before) != _length(cell.config):
        return None
    return scores(place)


def _length(config: ml_collections.ConfigDict) -> tuple[float, int]:
    return config.train.epochs, config.train.steps


def scores(place: epath.Path) -> dict[str, float] | None:
    """The test metrics of the finished run in `place`, or None if it is unfinished."""
    final = [line for line in metrics.read_metrics(place) if "test/ensemble/top1" in line]
    if not final:
        return None
    return {name: value for name, value in final[-1].items() if name.startswith("test/")}


def _seconds(place: epath.Path) -> float | None:
    path = place / _SECONDS
    return float(path.read_text()) if path.exists() else None
