"""The pictures of a grid's page, as plotly figures.

Every trace says in `meta` which configuration it is of (its number), and where a picture shows
one thing of several (an exit, a segment) which: the page's script switches both on and off. A
configuration has one colour, symbol and dash in all pictures. Accuracies are drawn in percent.
Plotly is imported when something is drawn.
"""

import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfs_jax.evaluation import plots
from dfs_jax.evaluation.conflict import mean_of_pairs
from dfs_jax.sweeps import summaries
from dfs_jax.sweeps.records import Record
from dfs_jax.sweeps.summaries import Summary

# Ten colours that differ for most eyes (Tableau's), then the next symbol and dash.
_COLOURS = [
    "#4e79a7",
    "#f28e2b",
    "#e15759",
    "#76b7b2",
    "#59a14f",
    "#b07aa1",
    "#9c755f",
    "#d4a100",
    "#ff6f91",
    "#555555",
]
_SYMBOLS = (("circle", "●"), ("square", "■"), ("diamond", "◆"), ("triangle-up", "▲"))
_DASHES = ("solid", "dash", "dot", "dashdot")


class Style(NamedTuple):
    """How a configuration is drawn."""

    colour: str
    symbol: str
    sign: str  # the symbol as a character, for the legend
    dash: str


class Picture(NamedTuple):
    """A figure, and the choices of which it shows one at a time; none: it shows all."""

    figure: Any
    choices: tuple[str, ...] = ()


def style(number: int) -> Style:
    """The style of configuration `number`, from 0."""
    turn = number // len(_COLOURS)
    symbol, sign = _SYMBOLS[turn % len(_SYMBOLS)]
    colour = _COLOURS[number % len(_COLOURS)]
    return Style(colour, symbol, sign, _DASHES[turn % len(_DASHES)])


def accuracy(groups: Sequence[Summary]) -> Picture:
    """Mean accuracy of every exit against its cost with intervals over seeds; a dot a run."""
    unit, letter = plots.unit_of([cost for group in groups for cost in group.costs])
    step = _beside(groups) / unit
    traces = []
    for k, group in enumerate(groups):
        x = np.array(group.costs) / unit + step * (k - (len(groups) - 1) / 2)
        found = np.stack(list(group.top1.values()))  # (seeds, N + 1)
        means = [summaries.interval(column) for column in found.T]
        traces.append(_line(k, group, x, means[:-1], mode="lines+markers"))
        # The ensemble costs what its last exit does; it stands apart from the line.
        traces.append(_line(k, group, x[-1:], means[-1:], name="ensemble", star=True))
        if len(found) > 1:
            traces.append(_dots(k, group, np.tile(x, len(found)), found[:, :-1].ravel()))
    values = np.concatenate([v for group in groups for v in group.top1.values()])
    return Picture(
        _figure(
            traces,
            f"cost per image ({letter} multiply-adds)",
            "test accuracy (%)",
            y=_range(100 * values),
        )
    )


def _beside(groups: Sequence[Summary]) -> float:
    """How far apart configurations of one cost are drawn, so that their intervals can be told."""
    gaps = [max(group.costs) - min(group.costs) for group in groups]
    gaps += [10 * (b - a) for group in groups for a, b in itertools.pairwise(group.costs)]
    return 0.03 * min((gap for gap in gaps if gap > 0), default=max(groups[0].costs)) / len(groups)


def differences(groups: Sequence[Summary], baseline: Mapping[str, str]) -> Picture | None:
    """A forest plot: by exit the paired difference of every configuration to its baseline."""
    pairs = {
        k: pair
        for k, group in enumerate(groups)
        if (pair := summaries.reference(group, groups, baseline)) is not None
    }
    exits = max(len(group.costs) for group in groups)
    names = [*(f"exit {i}" for i in range(1, exits + 1)), "ensemble"]
    traces, seen = [], [0.0]
    for place, (k, pair) in enumerate(pairs.items()):
        # All configurations stand within the band of their exit, one below the other.
        shift = 0.8 * ((place + 0.5) / len(pairs) - 0.5)
        intervals, x, y = [], [], []
        for row, found in enumerate(exit_gaps(groups[k], pair, exits)):
            if found:
                intervals.append((row + shift, summaries.interval(found.values())))
                x += [100 * gap for gap in found.values()]
                y += [row + shift] * len(found)
        if intervals:
            traces.append(_forest(k, groups[k], intervals))
            traces.append(_dots(k, groups[k], np.array(y), np.array(x) / 100, across=True))
            seen += x
    if not traces:
        return None
    figure = _figure(traces, "difference of test accuracy (points)", "", x=_range(np.array(seen)))
    figure.update_layout(height=90 + len(names) * max(30, 11 * len(pairs)), hovermode="closest")
    figure.add_vline(0, line={"color": "#888", "width": 1})
    for row in range(1, len(names)):
        figure.add_hline(row - 0.5, line={"color": "#ddd", "width": 1})
    figure.update_yaxes(
        tickvals=[*range(len(names))],
        ticktext=names,
        range=[len(names) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    return Picture(figure)


def exit_gaps(group: Summary, pair: Summary, exits: int) -> list[dict[str, float]]:
    """Differences to `pair` by seed, of each exit and of the ensemble; {} where one lacks it."""
    both = min(len(group.costs), len(pair.costs))

    def column(of: Summary, row: int) -> dict[str, float]:
        return {seed: float(values[row]) for seed, values in of.top1.items()}

    rows = [summaries.gaps(column(group, i), column(pair, i)) for i in range(both)]
    last = summaries.gaps(column(group, -1), column(pair, -1))
    return [*rows, *({} for _ in range(exits - both)), last]


def learning(groups: Sequence[Summary]) -> Picture | None:
    """Accuracy over training: the mean over seeds, and a band from the lowest to the highest."""
    names = dict.fromkeys(n for g in groups for r in g.runs.values() for n in r.curves)
    choices = sorted({*names} - {"step"}, key=_in_order)
    traces = []
    for k, group in enumerate(groups):
        for name in choices:
            runs = [r.curves for r in group.runs.values() if name in r.curves]
            curves = [(r["step"], np.array(r[name], float) * 100) for r in runs]
            traces += _band(k, group, curves, _readable(name))
    if not traces:
        return None
    figure = _figure(traces, "step", "accuracy on held-out images (%)")
    return Picture(figure, tuple(map(_readable, choices)))


def budgeted(groups: Sequence[Summary]) -> Picture | None:
    """Early exit: accuracy against mean cost of every budget; mean over seeds, and the band."""
    records = [r for group in groups for r in group.runs.values() if r.budgeted]
    if not records:
        return None
    unit, letter = plots.unit_of([row["cost"] for r in records for row in r.budgeted])
    traces = []
    for k, group in enumerate(groups):
        runs = [r.budgeted for r in group.runs.values() if r.budgeted]
        # A budget's cost depends on the run a little: the curve is drawn at the mean cost.
        ratios = [dict.fromkeys(row["ratio"] for row in run) for run in runs]
        if not runs or any(found != ratios[0] for found in ratios):
            continue
        x = np.mean([[row["cost"] for row in run] for run in runs], axis=0) / unit
        curves = [(x, 100 * np.array([row["top1"] for row in run])) for run in runs]
        traces += _band(k, group, curves)
    label = f"mean cost per image ({letter} multiply-adds)"
    return Picture(_figure(traces, label, "test accuracy (%)"))


def speed(groups: Sequence[Summary]) -> Picture | None:
    """Images per second as bars, the mean over seeds; a dot a run."""
    traces, shown = [], []
    for k, group in enumerate(groups):
        found = logged(group.runs.values(), "train/images_per_second")
        if found:
            at, colour = len(shown), style(k).colour
            shown.append(group.title)
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "x": [float(np.mean(found))],
                    "y": [at],
                    "text": [html.escape(_shortened(group.title, 30))],
                    "textposition": "inside",
                    "insidetextanchor": "start",
                    "constraintext": "none",  # a long name goes on beside its bar
                    "textfont": {"color": "#111"},
                    "marker": {"color": colour, "opacity": 0.6},
                    "hovertemplate": f"{html.escape(group.title)}: %{{x:,.0f}}<extra></extra>",
                    "meta": {"configuration": k},
                }
            )
            dots = np.full(len(found), float(at)), np.array(found) / 100
            traces.append(_dots(k, group, *dots, across=True, colour="#222"))
    if not traces:
        return None
    figure = _figure(traces, "training images per second", "")
    figure.update_layout(height=90 + 34 * len(shown), hovermode="closest", bargap=0.25)
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(visible=False, autorange="reversed")
    return Picture(figure)


def logged(records: Iterable[Record], name: str) -> list[float]:
    """The medians of a metric of those runs that logged it."""
    return [record.speed[name] for record in records if name in record.speed]


def conflict(groups: Sequence[Summary]) -> Picture | None:
    """Mean cosine over pairs of exits, over training; of all segments, or of one."""
    traces, choices = [], {"all segments": None}
    for k, group in enumerate(groups):
        found = [r.conflict for r in group.runs.values() if r.conflict is not None]
        if not found:
            continue
        for s in range(-1, min(history.segments.shape[1] for history in found)):
            name = "all segments" if s < 0 else f"segment {s + 1}"
            choices[name] = None
            matrices = [(h.steps, h.overall if s < 0 else h.segments[:, s]) for h in found]
            curves = [(steps, mean_of_pairs(of_steps)) for steps, of_steps in matrices]
            traces += _band(k, group, curves, name)
    if not traces:
        return None
    figure = _figure(traces, "step", "mean cosine over pairs of exits")
    figure.add_hline(0, line={"color": "#888", "width": 1})
    return Picture(figure, tuple(choices))


# Traces.


def _line(
    k: int,
    group: Summary,
    x: np.ndarray,
    means: Sequence[summaries.Interval],
    *,
    mode: str = "markers",
    name: str = "exits",
    star: bool = False,
) -> dict[str, Any]:
    own = style(k)
    marker = {"symbol": "star-open" if star else own.symbol, "size": 12 if star else 7}
    halves = [100 * m.halfwidth for m in means]
    known = not np.isnan(halves).any()
    spread = "±%{error_y.array:.2f}" if known else "one seed"
    title = html.escape(group.title)
    return {
        "type": "scatter",
        "mode": mode,
        "x": x.tolist(),
        "y": [100 * m.mean for m in means],
        "error_y": {"array": halves, "thickness": 1.2, "width": 4} if known else None,
        "marker": {"color": own.colour, **marker},
        "line": {"color": own.colour, "dash": own.dash, "width": 2},
        "name": title,
        "hovertemplate": f"{title}, {name}<br>%{{y:.2f}} {spread}<extra></extra>",
        "meta": {"configuration": k},
    }


def _forest(
    k: int, group: Summary, intervals: Sequence[tuple[float, summaries.Interval]]
) -> dict[str, Any]:
    own, title = style(k), html.escape(group.title)
    halves = [100 * m.halfwidth for _, m in intervals]
    known = not np.isnan(halves).all()
    spread = "±%{error_x.array:.2f}" if known else "one seed"
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [100 * m.mean for _, m in intervals],
        "y": [y for y, _ in intervals],
        "error_x": {"array": halves, "thickness": 1.6, "width": 3} if known else None,
        "marker": {"color": own.colour, "symbol": own.symbol, "size": 8},
        "name": title,
        "hovertemplate": f"{title}<br>%{{x:+.2f}} {spread}<extra></extra>",
        "meta": {"configuration": k},
    }


def _dots(
    k: int,
    group: Summary,
    at: np.ndarray,
    values: np.ndarray,
    *,
    across: bool = False,
    colour: str | None = None,
) -> dict[str, Any]:
    """Faint dots, one a run, at 100 `values`; along x if `across`."""
    x, y = (100 * values, at) if across else (at, 100 * values)
    return {
        "type": "scatter",
        "mode": "markers",
        "x": x.tolist(),
        "y": y.tolist(),
        "marker": {"color": colour or style(k).colour, "size": 5, "opacity": 0.5},
        "name": html.escape(group.title),
        "hoverinfo": "skip",
        "meta": {"configuration": k},
    }


def _band(
    k: int,
    group: Summary,
    curves: Sequence[tuple[Sequence[float], np.ndarray]],
    choice: str | None = None,
) -> list[dict[str, Any]]:
    """The mean of curves (x, values) at what x they share, and the band that they fill."""
    if not curves:
        return []
    by_x = [dict(zip(map(float, x), map(float, y), strict=True)) for x, y in curves]
    x = sorted(at for at in by_x[0] if all(at in other for other in by_x))
    values = np.array([[curve[at] for at in x] for curve in by_x])  # (seeds, points)
    own, title = style(k), html.escape(group.title)
    meta = {"configuration": k} | ({"choice": choice} if choice else {})
    line = {
        "type": "scatter",
        "mode": "lines+markers" if len(x) < 60 else "lines",
        "x": x,
        "y": values.mean(axis=0).tolist(),
        "line": {"color": own.colour, "dash": own.dash, "width": 2},
        "marker": {"color": own.colour, "symbol": own.symbol, "size": 5},
        "name": title,
        "hovertemplate": f"{title}: %{{y:.4g}}<extra></extra>",
        "meta": meta,
    }
    if len(curves) == 1 or not x:
        return [line]
    band = {
        "type": "scatter",
        "mode": "lines",
        "x": [*x, *reversed(x)],
        "y": [*values.max(axis=0).tolist(), *reversed(values.min(axis=0).tolist())],
        "fill": "toself",
        "fillcolor": own.colour,
        "opacity": 0.15,
        "line": {"width": 0},
        "hoverinfo": "skip",
        "meta": meta,
    }
    return [band, line]


def _figure(
    traces: Sequence[Mapping[str, Any]],
    x_title: str,
    y_title: str,
    x: tuple[float, float] | None = None,
    y: tuple[float, float] | None = None,
) -> Any:
    from plotly import graph_objects

    axis = {"automargin": True, "gridcolor": "#e6e6e6", "zeroline": False}
    layout = {
        "template": "none",
        "height": 420,
        "margin": {"l": 10, "r": 12, "t": 34, "b": 50},
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "showlegend": False,  # the page has one for all pictures
        "xaxis": {**axis, "title": {"text": x_title}, "range": x},
        "yaxis": {**axis, "title": {"text": y_title}, "range": y},
    }
    return graph_objects.Figure({"data": traces, "layout": layout})


def _range(values: np.ndarray) -> tuple[float, float]:
    """What shows all `values`. An interval of two seeds can be far wider, and may leave it."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    room = 0.1 * (high - low) or 1.0
    return low - room, high + room


def _readable(name: str) -> str:
    """`exit 3` for exit3, `mean of exits` for mean."""
    if name == "mean":
        return "mean of exits"
    return name.replace("exit", "exit ") if name.startswith("exit") else name


def _in_order(name: str) -> tuple[int, int]:
    """The mean, the exits, the ensemble."""
    if name == "mean":
        return 0, 0
    number = name.removeprefix("exit")
    return (1, int(number)) if number.isdecimal() else (2, 0)


def _shortened(text: str, most: int) -> str:
    """Both ends of a `text` that is too long: names of a grid begin and end alike."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} … {text[-(most - most // 2) :]}"
