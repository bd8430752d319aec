"""The record of a finished run: record.json, small text from which the report is made.

It holds what a report shows and nothing else: labels, configuration, test scores, costs, learning
curves, speed, cosines between exits, budgeted evaluation. Long histories are thinned. So a grid's
figures can be kept, and its report made again, without checkpoints.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from etils import epath

from dfs_jax import config as configuration
from dfs_jax.config import ConfigError
from dfs_jax.config.loader import flatten
from dfs_jax.evaluation import conflict
from dfs_jax.evaluation.conflict import History
from dfs_jax.training import metrics
from dfs_jax.training.workdir import FREE
from dfs_jax.writing.files import json_text, write_whole

NAME = "record.json"
SEEDS = "seeds"  # the axis over which results are averaged
_VERSION = 1
_POINTS = 200  # of a learning curve
_MEASUREMENTS = 24  # of conflict; each has hundreds of numbers
# Digits of numbers that are drawn and not compared.
_DIGITS = 6
_COSINE_DIGITS = 4
_PLACES = ("data.dir", "train.init_from")  # fields that name folders of a machine

# The medians that a record keeps of what a run has logged.
_SPEED = ("train/images_per_second", "train/step_seconds", "train/data_wait", "train/mfu")


class Record(NamedTuple):
    """One finished run. N exits."""

    labels: Mapping[str, str]  # by axis
    scores: Mapping[str, float]  # test/exit1/top1 …, test/exit1/cost …, test/ensemble/top1
    seconds: float | None = None  # of the process that finished it
    conflict: History | None = None  # between the exits' gradients
    number: int = 0  # place in the grid
    baseline: Mapping[str, str] = {}  # of the grid
    config: Mapping[str, Any] = {}  # by path; without what a run may change on its way
    curves: Mapping[str, Sequence[float]] = {}  # step, exit1 … exitN, ensemble, mean: eval/…/top1
    speed: Mapping[str, float] = {}  # medians of what was logged, by the metrics' names
    step: int = 0  # at which it was tested
    step_flops: float | None = None  # the fewest that a training step takes
    budgeted: Sequence[Mapping[str, Any]] | None = None  # ratio, cost, top1 … of every budget

    @property
    def seed(self) -> str:
        return self.labels.get(SEEDS, "0")

    @property
    def choices(self) -> dict[str, str]:
        """The labels without the seed."""
        return {axis: label for axis, label in self.labels.items() if axis != SEEDS}


def of_run(place: epath.Path, scores: Mapping[str, float], **known: Any) -> Record:
    """The record of the finished run in `place`, from what it logged; `known` are more fields."""
    lines = metrics.read_metrics(place)
    probes = [
        {n: _short(v, _COSINE_DIGITS) for n, v in line.items() if n.startswith("conflict/")}
        | {"step": line["step"]}
        for line in lines
        if any(name.startswith("conflict/") for name in line)
    ]
    step = max(line["step"] for line in lines if "test/ensemble/top1" in line)
    return Record(
        scores=scores,
        conflict=conflict.history(_thinned(probes, _MEASUREMENTS)),
        config=_config(place),
        curves=_curves(lines),
        speed=_medians(lines),
        step=step,
        **known,
    )


def check(record: Record, config: ml_collections.ConfigDict, place: epath.Path) -> None:
    """Raise ConfigError, naming the fields, if the `record` in `place` is not of `config`.

    Fields that came after the record must have their defaults.
    """
    now = _kept(flatten(json.loads(configuration.to_json(config))))
    usual = flatten(json.loads(configuration.to_json(configuration.default())))
    lines = []
    for path in sorted(now.keys() | record.config.keys()):
        before = record.config.get(path, usual.get(path))
        if before != now.get(path):
            lines.append(f"{path}: {before!r} there, {now.get(path)!r} now")
    if lines:
        raise ConfigError(f"{place / NAME} is of another experiment; {'; '.join(lines)}")


def _config(place: epath.Path) -> dict[str, Any]:
    path = place / "config.json"
    return _kept(flatten(json.loads(path.read_text())) if path.exists() else {})


def _kept(fields: Mapping[str, Any]) -> dict[str, Any]:
    free = {p for p in fields if p in FREE or p.split(".")[0] in FREE}
    kept = {path: value for path, value in fields.items() if path not in free}
    # Of places the name and a digest: which of two folders it was, and not where on a machine.
    found = {path: _place(fields[path]) for path in _PLACES if path in fields}
    return kept | found


def _place(path: str | None) -> str | None:
    digest = hashlib.sha256((path or "").encode()).hexdigest()[:6]
    return f"{epath.Path(path).name} #{digest}" if path else None


def _curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    lines = _thinned([line for line in lines if "eval/mean/top1" in line], _POINTS)
    if not lines:
        return {}
    names = [n for n in lines[0] if n.startswith("eval/") and n.endswith("/top1")]
    curves = {n.split("/")[1]: [_short(line.get(n, math.nan)) for line in lines] for n in names}
    return {"step": [line["step"] for line in lines], **curves}


def _medians(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    logged = {name: [line[name] for line in lines if name in line] for name in _SPEED}
    return {name: _short(float(np.median(v))) for name, v in logged.items() if v}


def _thinned(lines: Sequence[Any], most: int) -> list[Any]:
    """At most so many of `lines`, evenly spread, the first and the last among them."""
    kept = np.unique(np.linspace(0, len(lines) - 1, min(most, len(lines))).round().astype(int))
    return [lines[i] for i in kept]


def _short(value: float, digits: int = _DIGITS) -> float:
    return float(f"{value:.{digits}g}")


def budgeted_file(place: epath.Path) -> list[dict[str, float]] | None:
    """Costs and accuracies of the budgeted.csv in `place`, or None if there is none."""
    path = place / "budgeted.csv"
    if not path.exists():
        return None
    return budgets(csv.DictReader(io.StringIO(path.read_text())))


def budgets(rows: Any) -> list[dict[str, float]]:
    """What a record keeps of the lines of budgeted.csv."""
    return [{name: float(row[name]) for name in ("ratio", "cost", "top1")} for row in rows]


def write(place: epath.Path, record: Record) -> None:
    """Make `record` the record.json of the run in `place`; the same one is not written again."""
    document = {"version": _VERSION, **record._asdict()}
    if record.conflict is not None:
        columns = conflict.columns(record.conflict)
        document["conflict"] = {name: v.tolist() for name, v in columns.items()}
    # A line a field: a change can be read, and the file is short.
    lines = [f"{json.dumps(name)}: {json_text(v).strip()}" for name, v in document.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    path = place / NAME
    if not path.exists() or path.read_text() != text:
        write_whole(path, text)


def read(place: epath.Path) -> Record | None:
    """The record in `place`, or None if there is none. Raises ConfigError for what is no record."""
    path = place / NAME
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text())
        if document.pop("version") != _VERSION:
            raise ValueError("it is of another version")
        columns = document["conflict"] or {}
        values = {name: [math.nan if v is None else v for v in c] for name, c in columns.items()}
        document["conflict"] = conflict.from_columns(values)
        record = Record(**document)
        _check(record)
        return record
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not the record of a run: {error}") from error


def _check(record: Record) -> None:
    for name in ("test/ensemble/top1", "test/exit1/top1", "test/exit1/cost"):
        if not isinstance(record.scores.get(name), int | float):
            raise ValueError(f"it has no {name}")
    if not all(isinstance(label, str) for label in record.labels.values()):
        raise ValueError("its labels are no texts")


def read_all(directory: epath.Path) -> list[Record]:
    """The records of all runs in `directory`, a grid's workdir or a folder of their folders.

    They come in the grid's order. Raises ConfigError if there are none, or not of one grid.
    """
    places = [path.parent for d in (directory, directory / "runs") for path in d.glob(f"*/{NAME}")]
    found = [record for place in sorted(places) if (record := read(place)) is not None]
    if not found:
        raise ConfigError(
            f"--report: {directory} holds no records of runs; they are called RUN/{NAME} or "
            f"runs/RUN/{NAME}, and a grid writes one when a run of it ends"
        )
    first = found[0]
    for record in found:
        if [*record.labels] != [*first.labels] or record.baseline != first.baseline:
            raise ConfigError(
                f"--report: {directory} holds records of two grids, with axes "
                f"{', '.join(first.labels)} and {', '.join(record.labels)}; give each a folder"
            )
    return sorted(found, key=lambda record: record.number)
