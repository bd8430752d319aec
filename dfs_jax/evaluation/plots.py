"""Plots of evaluations and benchmarks, returned as bytes of PNG files.

What the numbers are is said by whoever computes them: accuracies in [0, 1], costs in multiply-adds
per image. Matplotlib is imported when something is drawn, and never touches a display.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dfs_jax.evaluation.calibration import Calibration, Reliability
from dfs_jax.evaluation.published import Published

_OWN = "black"  # the curve of the run that is shown; published ones have colours


def anytime(
    title: str,
    costs: Sequence[float],
    top1: Sequence[float],
    ensemble: float,
    published: Published | None = None,
) -> bytes:
    """Accuracy (N,) of every exit against its cost (N,), and of the ensemble of all exits."""
    figure, axes = _figure(title, wide=published is not None)
    unit, name = unit_of(costs)
    if published:
        colours = _colours(published)
        for method, values in published.top1.items():
            colour = colours[method]
            axes.plot(_in(published.costs, unit), values, ".-", lw=1, c=colour, label=method)
            if method in published.ensemble:
                axes.plot(published.costs[-1] / unit, published.ensemble[method], "*", c=colour)
    x, y = _in(costs, unit), _percent(top1)
    axes.plot(x, y, "o-", c=_OWN, lw=2, label="this run: exits", zorder=5)
    _number_exits(axes, x, y)
    together = {"label": "this run: all exits together", "ms": 13, "mfc": "white", "zorder": 6}
    axes.plot(costs[-1] / unit, 100 * ensemble, "*", c=_OWN, **together)
    _label(axes, f"cost per image ({name} multiply-adds)", "accuracy (%)")
    _legend(axes, published)
    return png(figure)


def budgeted(
    title: str,
    costs: Sequence[float],
    top1: Sequence[float],
    mean_costs: np.ndarray,
    accuracies: np.ndarray,
    leaving: np.ndarray,
    published: Published | None = None,
) -> bytes:
    """Accuracy (P,) of P budgets against their mean cost (P,), and who leaves where.

    Args:
      costs, top1: (N,) of the exits alone, for comparison.
      leaving: (P, N) share of the images that leave at each exit, in [0, 1].
    """
    import matplotlib

    figure, (axes, below) = _figure(title, wide=published is not None, rows=2)
    unit, name = unit_of(costs)
    if published:
        for method, points in published.budgeted.items():
            at, values = zip(*points, strict=True)
            axes.plot(_in(at, unit), values, "D", c=_colours(published)[method], label=method)
    x, y = _in(costs, unit), _percent(top1)
    axes.plot(x, y, "o:", c="grey", label="this run: all at one exit")
    _number_exits(axes, x, y)
    order = np.argsort(mean_costs, kind="stable")
    x, y = _in(mean_costs[order], unit), _percent(accuracies[order])
    axes.plot(x, y, ".-", c=_OWN, lw=2, label="this run: early exit", zorder=5)
    _label(axes, "", "accuracy (%)")
    _legend(axes, published)
    colours = matplotlib.colormaps["viridis"](np.linspace(0.95, 0.15, len(costs)))
    exits = [f"exit {i}" for i in range(1, len(costs) + 1)]
    below.stackplot(x, _percent(leaving[order].T), labels=exits, colors=colours)
    _label(below, f"mean cost per image ({name} multiply-adds)", "images leaving at (%)")
    below.set_ylim(0, 100)
    below.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, reverse=True)
    return png(figure)


def reliability(title: str, trained: Calibration, calibrated: Calibration | None) -> bytes:
    """One reliability diagram per exit."""
    from matplotlib.figure import Figure

    exits = trained.reliability
    columns = min(4, len(exits))
    rows = -(-len(exits) // columns)
    figure = Figure(figsize=(max(6.5, 2.7 * columns), 3.2 * rows + 1.0), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        if i >= len(exits):
            axes.set_axis_off()
            continue
        heading = f"exit {i + 1}: error {exits[i].error:.3f}"
        axes.plot([0, 1], [0, 1], ":", c="grey", label="perfectly calibrated")
        _bars(axes, exits[i])
        if calibrated is not None:
            after = calibrated.reliability[i]
            _markers(axes, after)
            heading += f"\ntemperature {calibrated.temperatures[i]:.2f}: {after.error:.3f}"
        axes.set_title(heading, fontsize=10)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), aspect="equal", xlabel="confidence")
        axes.set_ylabel("accuracy" if i % columns == 0 else "")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    side_by_side = 3 if columns == 4 else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=side_by_side, frameon=False)
    return png(figure)


def accuracy_against_cost(curves: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> bytes:
    """One curve per (name, costs (N,), accuracies (N,)), exits from shallow to deep."""
    figure, axes = _figure("test accuracy of every exit", wide=True)
    unit, name = unit_of([cost for _, costs, _ in curves for cost in costs])
    for number, (label, costs, top1) in enumerate(curves):
        style = ("-", "--", ":", "-.")[number // 10 % 4]  # ten colours, then the next line style
        axes.plot(_in(costs, unit), _percent(top1), "o" + style, ms=4, label=label)
    _label(axes, f"cost per image ({name} multiply-adds)", "accuracy (%)")
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)
    return png(figure)


def step_times(title: str, groups: Mapping[int, Mapping[str, Mapping[str, float]]]) -> bytes:
    """Seconds of a training step as stacked bars, as milliseconds per image.

    `groups` holds, by batch size and by method, the parts of a step, from the bottom up. A part
    that noise made negative is drawn as nothing.
    """
    figure, axes = _figure(title, wide=True)
    labels, places, at, highest = [], [], 0.0, 0.0
    colours = ("tab:blue", "tab:orange", "lightgrey")
    for batch_size, methods in groups.items():
        begin = at
        for method, parts in methods.items():
            bottom = 0.0
            for (part, seconds), colour in zip(parts.items(), colours, strict=True):
                height = max(0.0, 1e3 * seconds / batch_size)
                label = part if not places else None
                axes.bar(at, height, 0.8, bottom, color=colour, label=label)
                bottom += height
            axes.annotate(f"{bottom:.3g}", (at, bottom), ha="center", va="bottom", fontsize=8)
            highest = max(highest, bottom)
            labels.append(method)
            places.append(at)
            at += 1
        axes.annotate(
            f"batch {batch_size}",
            ((begin + at - 1) / 2, 1.0),
            (0, -4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="top",
        )
        at += 0.6
    axes.set_xticks(places, labels, rotation=30 if len(labels) > 6 else 0)
    axes.set_ylabel("ms per image")
    axes.set_ylim(0, 1.2 * highest or 1)  # room for the batch sizes
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, reverse=True)
    return png(figure)


def _bars(axes: Any, exit_: Reliability) -> None:
    # Nearly all answers of a good network are in the last bin; the others are mostly noise.
    for b, (count, accuracy) in enumerate(zip(exit_.count, exit_.accuracy, strict=True)):
        if count:
            strength = 0.15 + 0.75 * np.sqrt(count / exit_.count.sum())
            width = 1 / len(exit_.count)
            axes.bar((b + 0.5) * width, accuracy, width, color="tab:blue", alpha=strength)
    axes.bar(0, 0, color="tab:blue", label="as trained (darker: more answers)")


def _markers(axes: Any, exit_: Reliability) -> None:
    sizes = 8 + 60 * np.sqrt(exit_.count / exit_.count.sum())
    axes.plot(exit_.confidence, exit_.accuracy, c="tab:red", lw=0.7)
    style = {"c": "tab:red", "label": "with temperature (larger: more answers)", "zorder": 3}
    axes.scatter(exit_.confidence, exit_.accuracy, sizes, clip_on=False, **style)


def _figure(title: str, *, wide: bool, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    width = 8.5 if wide or rows > 1 else 6.5
    figure = Figure(figsize=(width, 2.8 + 2.0 * rows), layout="constrained")
    figure.suptitle(title)
    ratios = {"height_ratios": (3, 2)} if rows > 1 else {}
    return figure, figure.subplots(rows, sharex=True, gridspec_kw=ratios)


def _label(axes: Any, x: str, y: str) -> None:
    low, high = axes.dataLim.intervalx
    if low > 0 and high > 30 * low:  # published networks can cost far more than one's own
        axes.set_xscale("log")
    axes.set(xlabel=x, ylabel=y)
    axes.margins(y=0.1)  # room for the numbers below the first exit
    axes.grid(alpha=0.3)


def _legend(axes: Any, published: Published | None) -> None:
    if published is None:
        axes.legend(loc="best")
    else:  # too many lines to stand inside
        outside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "frameon": False}
        title = f"with published results:\n{published.title}"
        axes.legend(title=title, reverse=True, **outside)


def _colours(published: Published) -> dict[str, Any]:
    """One colour for each method; the last ten get strong ones, those before lighter ones."""
    import matplotlib

    colours = matplotlib.colormaps["tab20"].colors
    return dict(zip(reversed(published.top1), (*colours[::2], *colours[1::2]), strict=False))


def _number_exits(axes: Any, x: np.ndarray, y: np.ndarray) -> None:
    style = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "zorder": 7}
    for i, point in enumerate(zip(x, y, strict=True), 1):
        axes.annotate(str(i), point, (0, -14), **style)


def unit_of(costs: Sequence[float]) -> tuple[float, str]:
    """The unit in which `costs` are read easily, and its letter."""
    return (1e9, "G") if max(costs) >= 1e9 else (1e6, "M")


def _in(costs: Sequence[float] | np.ndarray, unit: float) -> np.ndarray:
    return np.asarray(costs, np.float64) / unit


def _percent(fractions: Sequence[float] | np.ndarray) -> np.ndarray:
    return 100 * np.asarray(fractions, np.float64)


def png(figure: Any) -> bytes:
    """The PNG file of a matplotlib figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)  # whatever backend the environment asks for
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()
