"""The report of a grid of runs: results.csv, timings.csv, a Markdown table, pictures and a page.

    results.csv   one line a run: its labels and test accuracies; the same bytes for the same runs
    timings.csv   one line a run: its labels and seconds
    report.md     one line a configuration: mean ± deviation over seeds, in percent, best in bold,
                  and the paired difference to the baseline with its 95 % interval
    curves.png    accuracy against cost of every configuration
    conflict.png  angles between the exits' gradients, where training has measured them
    report.html   all that the runs have told, to be looked at (`page.py`); it needs no network

All of it is made of the runs' records (`records.py`). Which runs there are is the business of
`runs.py`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from dfs_jax.evaluation import conflict, plots
from dfs_jax.evaluation.conflict import History
from dfs_jax.sweeps import page, records, summaries
from dfs_jax.sweeps.records import Record
from dfs_jax.sweeps.summaries import Summary
from dfs_jax.writing.files import write_whole
from dfs_jax.writing.tables import csv_table, markdown_table

_PICTURED = 12  # configurations whose conflict is drawn; more make no readable picture


def again(directory: epath.Path) -> None:
    """Write and print the report on the records in `directory` alone; raises ConfigError."""
    found = records.read_all(directory)
    write(directory, found, found[0].baseline)
    print(markdown(found, found[0].baseline))
    print(f"{len(found)} runs; report in {directory}", flush=True)


def write(directory: epath.Path, runs: Sequence[Record], baseline: Mapping[str, str]) -> None:
    """Write every file of the report into `directory`, each whole or not at all."""
    groups = summaries.summaries(runs)
    results = [
        {**run.labels, **{k: v for k, v in run.scores.items() if not k.endswith("/loss")}}
        for run in runs
    ]
    files: dict[str, str | bytes] = {
        "results.csv": csv_table(results),
        "timings.csv": csv_table([{**run.labels, "seconds": run.seconds} for run in runs]),
        "report.md": markdown(runs, baseline) + "\n",
        "curves.png": plots.accuracy_against_cost(
            [(group.title, group.costs, group.mean[:-1]) for group in groups]
        ),
        "report.html": page.page(groups, summaries.baseline_of(runs, baseline)),
    }
    if (angles := _conflict(groups)) is not None:
        files["conflict.png"] = angles
    for name, content in files.items():
        write_whole(directory / name, content)


def _conflict(groups: Sequence[Summary]) -> bytes | None:
    """The picture of conflict in the first run of every configuration that measured it."""
    measured: dict[str, History] = {}
    for group in groups:
        for run in group.runs.values():
            if run.conflict is not None:
                measured.setdefault(group.title, run.conflict)
    if not measured:
        return None
    return conflict.picture(dict(itertools.islice(measured.items(), _PICTURED)))


def markdown(runs: Sequence[Record], baseline: Mapping[str, str]) -> str:
    """The table of all configurations as Markdown, and which of them train the same."""
    groups = summaries.summaries(runs)
    headers, body = _table(groups, summaries.baseline_of(runs, baseline))
    lines = [[f"**{text}**" if best else text for text, best in line] for line in body]
    text = markdown_table(lines, headers)
    if same := summaries.same_lines(groups):
        text += f"\n\nThese train the same and are shown once: {'; '.join(same)}."
    return text


def _table(
    groups: Sequence[Summary], baseline: Mapping[str, str]
) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Headers, and lines of (text, whether it is the best of its column)."""
    exits = max(len(group.costs) for group in groups)
    axes = list(groups[0].labels)
    columns = [*(f"exit {i}" for i in range(1, exits + 1)), "ensemble"]
    headers = [*axes, "seeds", *columns, *(["Δ mean of exits", "Δ last exit"] if baseline else [])]
    means = [_padded(group.mean, exits) for group in groups]
    best = np.nanmax(np.stack(means), axis=0)
    body = []
    for group, mean in zip(groups, means, strict=True):
        spread = _padded(_deviation(np.stack(list(group.top1.values()))), exits)
        line = [(group.label(axis), False) for axis in axes]
        line.append((str(len(group.runs)), False))
        for value, deviation, highest in zip(mean, spread, best, strict=True):
            line.append((_plus_minus(value, deviation), value == highest))
        if baseline:
            line += [(text, False) for text in _compared(group, groups, baseline)]
        body.append(line)
    return headers, body


def _compared(
    group: Summary, groups: Sequence[Summary], baseline: Mapping[str, str]
) -> tuple[str, str]:
    """Differences to the baseline of the mean over exits and of the last exit, as text."""
    reference = summaries.reference(group, groups, baseline)
    if reference is None:
        return "", ""

    def gap(reduce):
        pair = ({s: reduce(v[:-1]) for s, v in g.top1.items()} for g in (group, reference))
        found = summaries.difference(*pair)
        return "" if found is None else _plus_minus(found.mean, found.halfwidth, sign="+")

    return gap(np.mean), gap(lambda exits: exits[-1])


def _plus_minus(mean: float, spread: float, sign: str = "") -> str:
    """Both in percent; nothing in the place of a NaN."""
    if math.isnan(mean):
        return ""
    text = f"{100 * mean:{sign}.2f}"
    return text if math.isnan(spread) else f"{text} ± {100 * spread:.2f}"


def _deviation(values: np.ndarray) -> np.ndarray:
    """Sample standard deviation (columns,) of (seeds, columns); NaN for a single seed."""
    if len(values) < 2:
        return np.full(values.shape[1], math.nan)
    return values.std(axis=0, ddof=1)


def _padded(values: np.ndarray, exits: int) -> np.ndarray:
    """(N + 1,) as (exits + 1,), the ensemble last, NaN for exits that a network lacks."""
    missing = exits + 1 - len(values)
    return np.concatenate([values[:-1], np.full(missing, math.nan), values[-1:]])
