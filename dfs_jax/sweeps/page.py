"""The page of a grid: one HTML file with pictures and tables that needs no network.

The pictures are plotly's (`figures.py`), whose script stands in the file; the frame around them is
`page.html.jinja`. Everything is in percent and over seeds, with 95 % intervals by Student's t.
Plotly and Jinja are imported when a page is written.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from dfs_jax.sweeps import equal, figures, summaries
from dfs_jax.sweeps.figures import Picture
from dfs_jax.sweeps.records import Record
from dfs_jax.sweeps.summaries import Interval, Summary

# For `Plotly.newPlot`. The logo is a link into the network.
_PLOTLY = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "autoScale2d", "resetScale2d"]],
}


class Cell(NamedTuple):
    """What stands in a table, and the value by which it is sorted."""

    text: str
    value: float | str | None = None  # None: nothing is known, which comes last
    best: bool = False


class Table(NamedTuple):
    """Rows by the number of their configuration."""

    headers: Sequence[str]
    rows: Sequence[tuple[int, Sequence[Cell]]]


class Section(NamedTuple):
    """One thing that the runs tell."""

    title: str
    text: str
    picture: Picture | None = None
    table: Table | None = None
    folded: bool = False  # shown when it is opened


def page(groups: Sequence[Summary], baseline: Mapping[str, str]) -> str:
    """The HTML of the page on `groups`, compared to `baseline`."""
    import jinja2
    from plotly import offline

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = resources.files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    sections = [s for s in _sections(groups, baseline) if s.picture or s.table]
    return environment.from_string(text).render(
        plotly=offline.get_plotlyjs(),
        runs=sum(len(group.runs) for group in groups),
        groups=groups,
        styles=[figures.style(k) for k in range(len(groups))],
        parts=_parts(groups),
        baseline=", ".join(f"{axis} {label}" for axis, label in baseline.items()),
        same=summaries.same_lines(groups),
        sections=sections,
        drawn=[_drawn(section.picture, f"picture{i}") for i, section in enumerate(sections)],
    )


def _drawn(picture: Picture | None, name: str) -> str:
    """The HTML of a picture, which draws itself."""
    if picture is None:
        return ""
    return picture.figure.to_html(
        config=_PLOTLY, full_html=False, include_plotlyjs=False, div_id=name
    )


def _parts(groups: Sequence[Summary]) -> dict[str, dict[str, list[int]]]:
    """By axis and label the configurations that have it, where that is more than each alone."""
    found: dict[str, dict[str, list[int]]] = {}
    for axis in groups[0].labels:
        by_label = found.setdefault(axis, {})
        for k, group in enumerate(groups):
            for label in dict.fromkeys(own[axis] for own in (group.labels, *group.same)):
                by_label.setdefault(label, []).append(k)
    return {axis: parts for axis, parts in found.items() if 1 < len(parts) < len(groups)}


_ACCURACY = """Test accuracy of every exit against its cost, and of all exits together (star). Mean
over seeds with its 95 % interval; faint dots are the runs. Configurations of one cost stand side by
side. An interval of few seeds can be wider than the picture: double-click into it to see all."""
_DIFFERENCES = """Test accuracy minus that of the baseline with the same other choices, seed by
seed: what a seed does to both does not count. Mean with its 95 % interval; faint dots are the
seeds. An interval that holds 0 shows no difference."""
_LEARNING = """Accuracy while training, on the {} split. Mean over seeds; the band goes from the
lowest to the highest."""
_EARLY_EXIT = """Images leave at the first exit that is sure enough; the thresholds of each budget
are fitted on the validation split. Mean over seeds; the band goes from the lowest to the
highest."""
_SPEED = """Medians of what each run logged, then the mean over seeds; dots are the runs. FLOPs are
the fewest that a step takes (2 for a multiply-add), counted in its computation."""
_CONFLICT = """Cosine between the gradients of two exits' losses, over the parameters that both see:
1 where they agree, negative where a step for one sets the other back. Mean over the pairs in the
picture, over the measurements in the table."""
_FIELDS = "Fields of the resolved configurations that decide what is learnt."


def _sections(groups: Sequence[Summary], baseline: Mapping[str, str]) -> list[Section]:
    first = next(iter(groups[0].runs.values()))
    held_out = "validation" if first.config.get("data.validation_size", 1) else "test"
    forest, gaps = figures.differences(groups, baseline), _difference_table(groups, baseline)
    speeds, angles = figures.speed(groups), figures.conflict(groups)
    return [
        Section("Accuracy and cost", _ACCURACY, figures.accuracy(groups), _accuracy_table(groups)),
        Section("Differences to the baseline", _DIFFERENCES, forest, gaps),
        Section("Learning curves", _LEARNING.format(held_out), figures.learning(groups)),
        Section("Early exit", _EARLY_EXIT, figures.budgeted(groups)),
        Section("Speed", _SPEED, speeds, _speed_table(groups)),
        Section("Conflict between exits", _CONFLICT, angles, _conflict_table(groups)),
        Section("What the configurations differ in", _FIELDS, None, _field_table(groups), True),
    ]


def _columns(groups: Sequence[Summary]) -> list[str]:
    exits = max(len(group.costs) for group in groups)
    return [*(f"exit {i}" for i in range(1, exits + 1)), "ensemble"]


def _accuracy_table(groups: Sequence[Summary]) -> Table:
    """Mean and interval of each exit, of their mean, and of the ensemble."""
    headers = _columns(groups)
    rows = []
    for group in groups:
        columns = np.stack(list(group.top1.values())).T  # (N + 1, seeds)
        missing = [None] * (len(headers) - len(columns))
        found = [*map(summaries.interval, columns)]
        mean = summaries.interval(columns[:-1].mean(axis=0))
        rows.append([*found[:-1], *missing, found[-1], mean])
    best = [max(m.mean for m in column if m) for column in zip(*rows, strict=True)]
    lines = []
    for k, row in enumerate(rows):
        count = len(groups[k].runs)
        cells = [Cell(str(count), count)]
        cells += [_percent(m, top) for m, top in zip(row, best, strict=True)]
        lines.append((k, cells))
    return Table(["seeds", *headers, "mean of exits"], lines)


def _difference_table(groups: Sequence[Summary], baseline: Mapping[str, str]) -> Table | None:
    headers = _columns(groups)
    lines = []
    for k, group in enumerate(groups):
        pair = summaries.reference(group, groups, baseline)
        if pair is None:
            continue
        found = figures.exit_gaps(group, pair, len(headers) - 1)
        shared = len(group.runs.keys() & pair.runs.keys())
        cells = [_percent(summaries.interval(g.values()) if g else None, sign="+") for g in found]
        cells += [Cell(str(shared), shared), Cell(pair.title, pair.title)]
        lines.append((k, cells))
    return Table([*headers, "seeds", "minus"], lines) if lines else None


# Header, metric of `Record.speed` or a function of the record, factor, and how it is written.
_LOGGED: tuple[tuple[str, str | Callable[[Record], float | None], float, str], ...] = (
    ("images/s", "train/images_per_second", 1, "{:,.0f}"),
    ("ms a step", "train/step_seconds", 1e3, "{:,.4g}"),
    ("GFLOP a step", lambda record: record.step_flops, 1e-9, "{:,.4g}"),
    ("waiting for data (%)", "train/data_wait", 100, "{:.1f}"),
    ("MFU (%)", "train/mfu", 100, "{:.1f}"),
    ("seconds of the run", lambda record: record.seconds, 1, "{:,.0f}"),
)


def _speed_table(groups: Sequence[Summary]) -> Table | None:
    """What is known, a column each; a column that no run knows is left out."""
    columns: dict[str, list[Cell]] = {}
    for header, source, factor, form in _LOGGED:
        cells = []
        for group in groups:
            runs = group.runs.values()
            if isinstance(source, str):
                found = figures.logged(runs, source)
            else:
                found = [v for v in map(source, runs) if v is not None]
            mean = factor * float(np.mean(found)) if found else None
            cells.append(Cell("") if mean is None else Cell(form.format(mean), mean))
        if any(cell.value is not None for cell in cells):
            columns[header] = cells
    rows = [*enumerate(zip(*columns.values(), strict=True))]
    return Table([*columns], rows) if columns else None


def _conflict_table(groups: Sequence[Summary]) -> Table | None:
    """Cosines of every pair of exits, the mean over measurements and seeds."""
    means: dict[int, np.ndarray] = {}
    for k, group in enumerate(groups):
        found = [r.conflict.overall for r in group.runs.values() if r.conflict is not None]
        if found and len({m.shape[1:] for m in found}) == 1:
            means[k] = np.mean(
                [np.ma.masked_invalid(m).mean(axis=0).filled(np.nan) for m in found], 0
            )
    if not means:
        return None
    exits = max(map(len, means.values()))
    pairs = [(i, j) for i in range(exits) for j in range(i + 1, exits)]
    rows = []
    for k, mean in means.items():
        there = [mean[pair] if pair[1] < len(mean) else math.nan for pair in pairs]
        rows.append((k, [Cell("") if np.isnan(v) else Cell(f"{v:.3f}", float(v)) for v in there]))
    return Table([f"{i + 1} and {j + 1}" for i, j in pairs], rows)


def _field_table(groups: Sequence[Summary]) -> Table | None:
    """By configuration the fields in which some differ, as its first run has them."""
    configs = {k: next(iter(group.runs.values())).config for k, group in enumerate(groups)}
    found = equal.differing(configs)
    if not found:
        return None

    def cell(value: Any) -> Cell:
        if value is None:
            return Cell("")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return Cell(str(value), value if number else str(value))

    return Table([*found], [(k, [cell(values[k]) for values in found.values()]) for k in configs])


def _percent(found: Interval | None, best: float | None = None, sign: str = "") -> Cell:
    if found is None:
        return Cell("")
    text = f"{100 * found.mean:{sign}.2f}"
    if not math.isnan(found.halfwidth):
        text += f" ± {100 * found.halfwidth:.2f}"
    return Cell(text, found.mean, found.mean == best)
