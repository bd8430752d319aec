"""A grid: every combination of some choices on one configuration, and the run of each."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from dfs_jax import config as configuration
from dfs_jax.config import ConfigError
from dfs_jax.config.errors import shown

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
      has: whether the grid has the run of these labels, by axis; None: it has all combinations.
    """

    base: str
    axes: Mapping[str, Axis | Sequence[Any]]
    baseline: Mapping[str, str] = dataclasses.field(default_factory=dict)
    overrides: Sequence[str] = ()
    has: Callable[[Mapping[str, str]], bool] | None = None

    def __post_init__(self):
        if isinstance(self.overrides, str) or not isinstance(self.axes, Mapping):
            raise ConfigError("a grid's overrides are a list of texts, its axes a dictionary")
        for name, values in self.axes.items():
            if isinstance(values, str) or not isinstance(values, Mapping | Sequence | range):
                raise ConfigError(
                    f"the grid's axis {name} is a list of values, got {shown(values)}"
                )
            if not values:
                raise ConfigError(f"the grid's axis {name} has no values")


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
        if grid.has is not None and not grid.has(chosen):
            continue
        overrides = [*grid.overrides]
        overrides += [item for axis, label in chosen.items() for item in axes[axis][label]]
        words = [item.partition("=")[2] for item in overrides if item.startswith("preset=")]
        fields = [item for item in overrides if not item.startswith("preset=")]
        base = f"{directory / grid.base}:{','.join(words)}"
        result.append(Cell(chosen, configuration.load(base, fields)))
    if not result:
        raise ConfigError("the grid has no runs: `has` is False for every combination")
    for name, count in collections.Counter(cell.name for cell in result).items():
        if count > 1:
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
    with configuration.refusing_mistakes(path):
        grid = module.get_grid()
    if not isinstance(grid, Grid):
        raise ConfigError(f"{path}: get_grid() must return a Grid, it returned {shown(grid)}")
    return grid, cells(grid, Path(path).resolve().parent)
