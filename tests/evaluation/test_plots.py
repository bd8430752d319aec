"""Plots: files that can be read, with everything that was asked for inside the canvas."""

import io
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from shapes import image

from dfs_jax.evaluation import calibration, plots, published
from dfs_jax.models import create_model
from dfs_jax.models.cost import exit_costs
from dfs_jax.surgery import Surgery


@pytest.fixture
def drawn(monkeypatch):
    """The figures, as they are when they become files."""
    figures = []
    original = plots.png
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or original(figure))
    return figures


def _texts(figure):
    legends = [*figure.legends, *(a.get_legend() for a in figure.axes if a.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def _check(png, figure):
    """An image that is not blank, all of whose text and legends lie on the canvas."""
    pixels = matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3]
    assert (pixels < 0.5).mean() > 0.001
    canvas = figure.bbox
    parts = [*figure.legends, *(a.get_legend() for a in figure.axes if a.get_legend())]
    for axes in figure.axes:
        parts += [axes.title, axes.xaxis.label, axes.yaxis.label]
    for part in parts:
        box = part.get_window_extent()
        assert box.x0 >= -1, part
        assert box.y0 >= -1, part
        assert box.x1 <= canvas.x1 + 1, part
        assert box.y1 <= canvas.y1 + 1, part


def _run(num_exits, scale=1e6):
    rng = np.random.default_rng(0)
    costs = np.arange(1, num_exits + 1) * scale
    leaving = rng.dirichlet(np.ones(num_exits), 40)
    return costs, np.linspace(0.6, 0.8, num_exits), leaving @ costs, rng.random(40), leaving


@pytest.mark.parametrize("table", [None, *published.names()])
def test_anytime(drawn, table):
    overlay = published.results(table) if table else None
    png = plots.anytime("a run", *_run(5)[:2], 0.82, overlay)
    _check(png, drawn[0])
    wanted = set(overlay.top1) if table else set()
    assert wanted | {"this run: exits", "this run: all exits together"} == set(_texts(drawn[0]))
    own = next(x for x in drawn[0].axes[0].lines if x.get_label() == "this run: exits")
    assert own.get_xydata()[0] == pytest.approx([1, 60])  # a million multiply-adds, 60 %


@pytest.mark.parametrize("num_exits", [2, 12])
@pytest.mark.parametrize("table", [None, "cifar100_msdnet"])
def test_budgeted(drawn, num_exits, table):
    overlay = published.results(table) if table else None
    png = plots.budgeted("a run", *_run(num_exits, scale=1e9), overlay)
    _check(png, drawn[0])
    assert f"exit {num_exits}" in _texts(drawn[0])
    assert "(G multiply-adds)" in drawn[0].axes[1].get_xlabel()
    line = next(x for x in drawn[0].axes[0].lines if x.get_label() == "this run: early exit")
    assert (np.diff(line.get_xdata()) >= 0).all()  # no zigzag, whatever the order of the budgets


@pytest.mark.parametrize("num_exits", [1, 3, 7])
@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.filterwarnings("error")
def test_reliability(drawn, num_exits, fitted):
    rng = np.random.default_rng(0)
    # Most bins are empty, as those of a well trained network.
    exits = [
        calibration.reliability(rng.uniform(0.8, 1, 50), rng.random(50) < 0.9)
        for _ in range(num_exits)
    ]
    nll = (1.0,) * num_exits
    trained = calibration.Calibration((1.0,) * num_exits, tuple(exits), nll)
    after = calibration.Calibration((1.5,) * num_exits, tuple(exits), nll) if fitted else None
    _check(plots.reliability("a run", trained, after), drawn[0])
    titles = [axes.get_title() for axes in drawn[0].axes[:num_exits]]
    assert all(f"error {e.error:.3f}" in t for e, t in zip(exits, titles, strict=True))
    assert all(("temperature 1.50" in t) == fitted for t in titles)


def test_published_tables_are_whole():
    for name in published.names():
        table = published.results(name)
        assert all(len(row) == len(table.costs) for row in table.top1.values())
        assert set(table.ensemble) | set(table.budgeted) <= set(table.top1)
        assert list(table.costs) == sorted(table.costs)
        assert all(50 < value < 90 for row in table.top1.values() for value in row)
    with pytest.raises(ValueError, match="'cifar'; known: cifar100_msdnet, cifar100_resnet18"):
        published.results("cifar")


@pytest.mark.parametrize("step", [6, 7])
def test_published_costs_of_larger_networks_are_those_counted_here(step):
    """Of step 7 an independent counter, the official one, has printed the same."""
    options = {"num_classes": 1000, "surgery": Surgery(), "steps": (step,) * 5}
    costs = exit_costs(create_model("msdnet_imagenet", **options), image(224, 224, 3)).cumulative
    table = published.results(f"imagenet_msdnet_step{step}")
    np.testing.assert_allclose(costs, table.costs, atol=5e3, rtol=0)


def test_matplotlib_is_loaded_only_to_draw():
    code = "import sys, dfs_jax.evaluate; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
