"""The report of a grid of runs: results.csv, timings.csv, a Markdown table, curves and a page.

    results.csv   one line a run: its labels and test accuracies; the same bytes for the same runs
    timings.csv   one line a run: its labels and seconds
    report.md     one line a configuration: mean ± deviation over seeds, in percent, best in bold,
                  and the paired difference to the baseline with its 95 % interval
    curves.png    accuracy against cost of every configuration
    conflict.png  angles between the exits' gradients, where training has measured them
    report.html   the table and the pictures in one file that needs nothing else

Which runs there are is the business of `runs.py`.
"""

import base64
import html
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from dfs_jax.evaluation import conflict, plots
from dfs_jax.evaluation.conflict import History
from dfs_jax.writing.files import write_whole
from dfs_jax.writing.tables import csv_table, markdown_table

SEEDS = "seeds"  # the axis over which results are averaged
_PICTURED = 12  # configurations whose conflict is drawn; more make no readable picture


class Row(NamedTuple):
    """One finished run."""

    labels: Mapping[str, str]  # by axis
    scores: Mapping[str, float]  # test/exit1/top1 …, test/exit1/cost …, test/ensemble/top1
    seconds: float | None
    conflict: History | None = None  # between the exits' gradients


class Summary(NamedTuple):
    """One configuration: its accuracies (seeds, N + 1), all exits and then the ensemble."""

    labels: Mapping[str, str]  # by axis, without the seeds
    top1: dict[str, np.ndarray]  # (N + 1,) by seed
    costs: tuple[float, ...]  # (N,)


class Difference(NamedTuple):
    """Paired difference over the seeds that two configurations share."""

    mean: float
    halfwidth: float  # of the 95 % interval; NaN for a single seed


def write(directory: epath.Path, rows: Sequence[Row], baseline: Mapping[str, str]) -> None:
    """Write every file of the report into `directory`, each whole or not at all."""
    curves = plots.accuracy_against_cost(
        [(_title(s.labels), s.costs, _mean(s)[:-1]) for s in summaries(rows)]
    )
    angles = _conflict(rows)
    results = [
        {**row.labels, **{k: v for k, v in row.scores.items() if not k.endswith("/loss")}}
        for row in rows
    ]
    files: dict[str, str | bytes] = {
        "results.csv": csv_table(results),
        "timings.csv": csv_table([{**row.labels, "seconds": row.seconds} for row in rows]),
        "report.md": markdown(rows, baseline) + "\n",
        "curves.png": curves,
        "report.html": _page(rows, baseline, curves, angles),
    }
    if angles is not None:
        files["conflict.png"] = angles
    for name, content in files.items():
        write_whole(directory / name, content)


def _conflict(rows: Sequence[Row]) -> bytes | None:
    """The picture of conflict in the first run of every configuration that measured it."""
    measured: dict[str, History] = {}
    for row in rows:
        if row.conflict is not None:
            measured.setdefault(_title(_without_seed(row)), row.conflict)
    if not measured:
        return None
    return conflict.picture(dict(itertools.islice(measured.items(), _PICTURED)))


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """The runs grouped by configuration, in the order of their first run."""
    found: dict[tuple, Summary] = {}
    for row in rows:
        labels = _without_seed(row)
        summary = Summary(labels, {}, _costs(row.scores))
        top1 = found.setdefault(tuple(labels.items()), summary).top1
        top1[row.labels.get(SEEDS, "0")] = _accuracies(row.scores)
    return list(found.values())


def _without_seed(row: Row) -> dict[str, str]:
    return {axis: label for axis, label in row.labels.items() if axis != SEEDS}


def difference(one: Mapping[str, float], other: Mapping[str, float]) -> Difference | None:
    """`one` minus `other`, accuracies by seed; None without a common seed.

    The interval is Student's t over the seeds' differences.
    """
    gaps = np.array([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])
    if not len(gaps):
        return None
    if len(gaps) == 1:
        return Difference(gaps[0], math.nan)
    from scipy import stats

    t = stats.t.ppf(0.975, len(gaps) - 1)
    return Difference(gaps.mean(), t * gaps.std(ddof=1) / math.sqrt(len(gaps)))


def markdown(rows: Sequence[Row], baseline: Mapping[str, str]) -> str:
    """The table of all configurations as Markdown."""
    headers, body = _table(rows, baseline)
    lines = [[f"**{text}**" if best else text for text, best in line] for line in body]
    return markdown_table(lines, headers)


def _table(
    rows: Sequence[Row], baseline: Mapping[str, str]
) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Headers, and lines of (text, whether it is the best of its column)."""
    groups = summaries(rows)
    exits = max(len(group.costs) for group in groups)
    axes = list(groups[0].labels)
    columns = [*(f"exit {i}" for i in range(1, exits + 1)), "ensemble"]
    headers = [*axes, "seeds", *columns, *(["Δ mean of exits", "Δ last exit"] if baseline else [])]
    means = [_padded(_mean(group), exits) for group in groups]
    best = np.nanmax(np.stack(means), axis=0)
    body = []
    for group, mean in zip(groups, means, strict=True):
        spread = _padded(_deviation(np.stack(list(group.top1.values()))), exits)
        line = [(group.labels[axis], False) for axis in axes]
        line.append((str(len(group.top1)), False))
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
    wanted = {**group.labels, **baseline}
    reference = next((g for g in groups if g.labels == wanted and g is not group), None)
    if reference is None:
        return "", ""

    def gap(reduce):
        pair = ({s: reduce(v[:-1]) for s, v in g.top1.items()} for g in (group, reference))
        found = difference(*pair)
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


def _accuracies(scores: Mapping[str, float]) -> np.ndarray:
    exits = len(_costs(scores))
    names = [*(f"test/exit{i}/top1" for i in range(1, exits + 1)), "test/ensemble/top1"]
    return np.array([scores[name] for name in names])


def _costs(scores: Mapping[str, float]) -> tuple[float, ...]:
    costs = []
    while (name := f"test/exit{len(costs) + 1}/cost") in scores:
        costs.append(scores[name])
    return tuple(costs)


def _mean(summary: Summary) -> np.ndarray:
    return np.mean(list(summary.top1.values()), axis=0)


def _title(labels: Mapping[str, str]) -> str:
    return ", ".join(labels.values()) or "all runs"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Ablation</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 110rem; padding: 0 1rem;
  color: #1a1a1a; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
.best {{ font-weight: 700; }}
.wide {{ overflow-x: auto; }}
p {{ max-width: 60rem; }}
img {{ max-width: 100%; margin-top: 1.5rem; }}
</style></head><body>
<h1>Ablation</h1>
<p>{runs} runs. Test accuracy in percent: mean ± standard deviation over seeds, the best of each
column in bold.{compared}</p>
<div class="wide"><table><thead><tr>{headers}</tr></thead><tbody>
{body}
</tbody></table></div>
{pictures}
</body></html>
"""
_PICTURE = '<img alt="{}" src="data:image/png;base64,{}">'


def _page(
    rows: Sequence[Row], baseline: Mapping[str, str], curves: bytes, angles: bytes | None
) -> str:
    headers, body = _table(rows, baseline)
    compared = ""
    if baseline:
        named = ", ".join(f"{axis} {label}" for axis, label in baseline.items())
        compared = (
            f" Differences (Δ) are to {html.escape(named)}, seed by seed, with 95 % intervals: of "
            "the mean over exits, and of the last exit."
        )
    pictures = {"Accuracy of every configuration against its cost": curves}
    if angles is not None:
        pictures["Cosine between the gradients of the exits' losses"] = angles
    lines = []
    for line in body:
        columns = (
            f"<td{' class=best' if best else ''}>{html.escape(text)}</td>" for text, best in line
        )
        lines.append(f"<tr>{''.join(columns)}</tr>")
    return _PAGE.format(
        runs=len(rows),
        compared=compared,
        headers="".join(f"<th>{html.escape(name)}</th>" for name in headers),
        body="\n".join(lines),
        pictures="\n".join(
            _PICTURE.format(html.escape(alt), base64.b64encode(png).decode())
            for alt, png in pictures.items()
        ),
    )
