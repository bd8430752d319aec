"""What a run's metrics tell about conflict between its exits: conflict.csv and conflict.png.

The cosines are those of `gradients/conflict.py`, as the training loop wrote them every
`train.conflict_every` steps. Several runs stand side by side in one picture. Matplotlib is
imported when something is drawn.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from dfs_jax.evaluation import plots
from dfs_jax.training import metrics
from dfs_jax.writing.tables import csv_table

_PAIR = re.compile(r"conflict/(?:segment(\d+)/)?exit(\d+)_exit(\d+)")
_LAYER = re.compile(r"conflict/segment(\d+)/layer/(.+)")
_STRONG = 0.5  # the least cosine that gets the strongest colour: weak conflict looks weak
_NUMBERS = re.compile(r"(\d+)")


class History(NamedTuple):
    """Cosines at T steps of a run with N exits; NaN where an exit has no gradient."""

    steps: np.ndarray  # (T,)
    overall: np.ndarray  # (T, N, N) over all that two exits share
    segments: np.ndarray  # (T, N - 1, N, N); the last segment has one exit alone
    layers: Mapping[tuple[int, str], np.ndarray]  # (T,) by segment (from 0) and path, in order


def history(records: Sequence[Mapping[str, Any]]) -> History | None:
    """What the lines of a metrics.jsonl hold, or None if conflict was not measured."""
    lines = [r for r in records if any(_PAIR.fullmatch(name) for name in r)]
    if not lines:
        return None
    pairs = [match for line in lines for match in map(_PAIR.fullmatch, line) if match]
    count = max(int(match[3]) for match in pairs)
    overall = np.full((len(lines), count, count), np.nan)
    segments = np.full((len(lines), count - 1, count, count), np.nan)
    layers: dict[tuple[int, str], np.ndarray] = {}
    for t, line in enumerate(lines):
        for name, value in line.items():
            if match := _PAIR.fullmatch(name):
                i, j = int(match[2]) - 1, int(match[3]) - 1
                matrix = segments[t, int(match[1]) - 1] if match[1] else overall[t]
                matrix[i, j] = matrix[j, i] = value
            elif match := _LAYER.fullmatch(name):
                key = int(match[1]) - 1, match[2]
                layers.setdefault(key, np.full(len(lines), np.nan))[t] = value
    steps = np.array([line["step"] for line in lines])
    in_order = {key: layers[key] for key in sorted(layers, key=_in_order)}
    return History(steps, overall, segments, in_order)


def of_workdir(workdir: epath.PathLike) -> History | None:
    """The history of the run in `workdir`, as `history` makes it."""
    return history(metrics.read_metrics(workdir))


def files(runs: Mapping[str, History]) -> dict[str, str | bytes]:
    """The first run's table and the picture of all, by the names of the files that they become."""
    return {"conflict.csv": table(next(iter(runs.values()))), "conflict.png": picture(runs)}


def table(found: History) -> str:
    """conflict.csv: one line a step, one column a metric, as they are named in metrics.jsonl."""
    found_columns = columns(found)
    return csv_table(
        [
            {name: None if np.isnan(v[t]) else v[t] for name, v in found_columns.items()}
            for t in range(len(found.steps))
        ]
    )


def columns(found: History) -> dict[str, np.ndarray]:
    """Steps and every cosine (T,) of a history, by the metrics' names after "conflict/"."""
    count = found.overall.shape[-1]
    pairs = {f"exit{i + 1}_exit{j + 1}": (i, j) for i, j in np.transpose(np.triu_indices(count, 1))}
    result = {"step": found.steps}
    result |= {name: found.overall[:, *pair] for name, pair in pairs.items()}
    for s in range(count - 1):
        result |= {
            f"segment{s + 1}/{name}": found.segments[:, s, *pair]
            for name, pair in pairs.items()
            if pair[0] >= s
        }
    result |= {f"segment{s + 1}/layer/{path}": v for (s, path), v in found.layers.items()}
    return result


def from_columns(values: Mapping[str, Sequence[float]]) -> History | None:
    """The inverse of `columns`."""
    lines = [
        {name if name == "step" else f"conflict/{name}": v[t] for name, v in values.items()}
        for t in range(len(values.get("step", ())))
    ]
    return history(lines)


def picture(runs: Mapping[str, History]) -> bytes:
    """Heat maps exits × exits per segment, one row a run; below them training and layers.

    All runs share one scale of colours, so that what surgery removes is seen at once. Maps are
    means over the measurements.
    """
    from matplotlib.figure import Figure

    columns = max(2, max(found.segments.shape[1] for found in runs.values()))
    size = min(2.3, 15 / columns)
    height = (size + 0.35) * len(runs)
    figure = Figure(figsize=(max(9.0, size * columns + 1.6), height + 4.3), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(height, 3.6))
    above.suptitle("cosine between the gradients of two exits' losses (grey: only one reaches it)")
    _maps(above, runs, columns)
    over_time, by_layer = below.subplots(1, 2)
    _over_training(over_time, runs)
    _by_layer(by_layer, runs)
    return plots.png(figure)


def _maps(figure: Any, runs: Mapping[str, History], columns: int) -> None:
    import matplotlib

    means = {label: _mean(found.segments) for label, found in runs.items()}
    largest = max(np.nanmax(np.abs(m), initial=_STRONG) for m in means.values())
    colours = matplotlib.colormaps["RdBu"].with_extremes(bad="0.9")
    scale = {"vmin": -largest, "vmax": largest, "cmap": colours}
    grid = figure.subplots(len(runs), columns, squeeze=False)
    image = None
    for row, (label, matrices) in zip(grid, means.items(), strict=True):
        for s, axes in enumerate(row):
            if s >= len(matrices):
                axes.set_axis_off()
                continue
            image = axes.imshow(matrices[s], **scale)
            exits = range(1, len(matrices[s]) + 1)
            axes.set_xticks(range(len(exits)), exits)
            axes.set_yticks(range(len(exits)), exits)
            axes.set_title(f"segment {s + 1}", fontsize=10)
            axes.set_ylabel(f"{label}\nexit" if s == 0 else "")
            axes.set_xlabel("exit" if axes in grid[-1] else "")
            _write_values(axes, matrices[s], scale["vmax"])
    bar = figure.colorbar(image, ax=grid, shrink=0.9, pad=0.01)
    bar.set_label("opposed  ←  cosine  →  agree")


def _write_values(axes: Any, matrix: np.ndarray, largest: float) -> None:
    small = 8 if len(matrix) <= 5 else 6
    for (i, j), value in np.ndenumerate(matrix):
        if not np.isnan(value):
            text = "0" if value == 0 else f"{value:.2f}".replace("0.", ".")
            colour = "white" if abs(value) > 0.6 * largest else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=small, color=colour)


def _over_training(axes: Any, runs: Mapping[str, History]) -> None:
    """One line a run, the mean over all pairs; a run by itself has one line a segment."""
    for label, found in runs.items():
        mean = mean_of_pairs(found.overall)
        axes.plot(found.steps, mean, ".-", lw=2, label=label if len(runs) > 1 else "overall")
    if len(runs) == 1:
        (found,) = runs.values()
        for s in range(found.segments.shape[1]):
            values = mean_of_pairs(found.segments[:, s])
            axes.plot(found.steps, values, ".-", lw=1, label=f"segment {s + 1}")
    axes.axhline(0, c="grey", lw=0.8)
    axes.set(xlabel="step", ylabel="mean cosine over pairs", title="over training")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _by_layer(axes: Any, runs: Mapping[str, History]) -> None:
    """One dot a layer, the mean over pairs and measurements; layers of one segment together."""
    keys = dict.fromkeys(key for found in runs.values() for key in found.layers)
    keys = sorted(keys, key=_in_order)
    place = {key: x for x, key in enumerate(keys)}
    for label, found in runs.items():
        x = [place[key] for key in found.layers]
        axes.plot(x, [_mean(v) for v in found.layers.values()], ".", ms=6, label=label)
    ends = [x for x, key in enumerate(keys) if x and key[0] != keys[x - 1][0]]
    for x in ends:
        axes.axvline(x - 0.5, c="grey", lw=0.8, ls=":")
    axes.axhline(0, c="grey", lw=0.8)
    middles = [(a + b - 1) / 2 for a, b in zip([0, *ends], [*ends, len(keys)], strict=True)]
    segments = dict.fromkeys(segment for segment, _ in keys)
    axes.set_xticks(middles, [str(s + 1) for s in segments])
    axes.set(xlabel="layers, by segment", title="by layer")
    axes.grid(axis="y", alpha=0.3)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is there; NaN where nothing is."""
    there = ~np.isnan(values)
    counts = there.sum(axis=0)
    return np.where(counts, np.where(there, values, 0).sum(axis=0) / np.maximum(counts, 1), np.nan)


def mean_of_pairs(matrices: np.ndarray) -> np.ndarray:
    """Mean cosine (T,) over the pairs of exits of (T, N, N)."""
    upper = np.triu_indices(matrices.shape[-1], 1)
    return _mean(matrices[:, *upper].T)


def _in_order(layer: tuple[int, str]) -> tuple:
    """Segments one after the other, numbers in paths by their value."""
    segment, path = layer
    parts = _NUMBERS.split(path)
    return segment, [int(p) if i % 2 else p for i, p in enumerate(parts)]
