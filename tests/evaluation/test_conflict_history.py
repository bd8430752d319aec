"""What is shown of conflict: values at their places, and a picture with everything on it."""

import csv
import io
import json

import matplotlib.image
import numpy as np
import pytest
from etils import epath
from matplotlib.text import Text

from dfs_jax import config, evaluate
from dfs_jax.evaluation import conflict, plots
from dfs_jax.sweeps import report
from dfs_jax.sweeps.records import Record

COSINES = {"conflict/exit1_exit2": 0.3, "conflict/exit1_exit3": -0.2, "conflict/exit2_exit3": 0.5}
FIRST = {
    "step": 100,
    **COSINES,
    "conflict/segment1/exit1_exit2": 0.0,
    "conflict/segment1/exit2_exit3": -0.4,
    "conflict/segment2/exit2_exit3": 0.9,
    "conflict/segment1/layer/convs_0": 0.1,
    "conflict/segment2/layer/convs_10": 0.6,
    "conflict/segment2/layer/convs_9": 0.7,
}
SECOND = {"step": 200, **{k: v / 2 for k, v in FIRST.items() if k != "step"}}
RECORDS = [{"step": 100, "train/loss": 1.0}, FIRST, SECOND, {"step": 250, "eval/exit9/top1": 0.5}]


def test_every_value_at_its_place():
    found = conflict.history(RECORDS)
    np.testing.assert_array_equal(found.steps, [100, 200])
    np.testing.assert_array_equal(
        found.overall[0], [[np.nan, 0.3, -0.2], [0.3, np.nan, 0.5], [-0.2, 0.5, np.nan]]
    )
    assert found.segments.shape == (2, 2, 3, 3)
    assert found.segments[0, 0, 1, 2] == found.segments[0, 0, 2, 1] == -0.4
    assert found.segments[1, 1, 1, 2] == 0.45
    assert np.isnan(found.segments[:, 0, 0, 2]).all()  # one of the two has no gradient there
    assert np.isnan(found.segments[:, 1, 0]).all()
    order = [path for _, path in found.layers]
    assert order == ["convs_0", "convs_9", "convs_10"]
    np.testing.assert_array_equal(found.layers[1, "convs_9"], [0.7, 0.35])


def test_without_measurements_there_is_no_history():
    assert conflict.history([{"step": 1, "train/exit1/loss": 0.1}]) is None


def test_table_holds_every_metric():
    rows = list(csv.DictReader(io.StringIO(conflict.table(conflict.history(RECORDS)))))
    for row, record in zip(rows, (FIRST, SECOND), strict=True):
        given = {name.removeprefix("conflict/"): v for name, v in record.items()}
        assert {name: float(v) for name, v in row.items() if v} == given
        assert row["segment1/exit1_exit3"] == ""


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    original = plots.png
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or original(figure))
    return figures


def _random(exits, seed=0):
    rng, records = np.random.default_rng(seed), []
    for step in range(1, 4):
        record = {"step": step}
        for i in range(1, exits + 1):
            for j in range(i + 1, exits + 1):
                record[f"conflict/exit{i}_exit{j}"] = rng.uniform(-1, 1)
                for s in range(1, i + 1):
                    record[f"conflict/segment{s}/exit{i}_exit{j}"] = rng.uniform(-1, 1)
        record |= {f"conflict/segment{s}/layer/conv": 0.1 * s for s in range(1, exits)}
        records.append(record)
    return conflict.history(records)


@pytest.mark.parametrize(
    "exits", [(2,), (4, 4), (7, 3, 7)], ids=["one run", "two runs", "different networks"]
)
def test_picture(drawn, exits):
    runs = {f"run {k} of a long name": _random(n, k) for k, n in enumerate(exits)}
    png = conflict.picture(runs)
    pixels = matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3]
    assert pixels.std() > 0.1
    (figure,) = drawn
    maps = [axes for axes in figure.axes if axes.images]
    assert len(maps) == sum(n - 1 for n in exits)
    strongest = {axes.images[0].get_clim() for axes in maps}
    assert len(strongest) == 1  # one scale for all runs
    first = next(iter(runs.values()))
    np.testing.assert_allclose(
        np.ma.filled(maps[0].images[0].get_array(), np.nan),
        np.where(np.eye(exits[0]) == 1, np.nan, first.segments[:, 0].mean(axis=0)),
    )
    figure.draw_without_rendering()  # places that were computed for the file's resolution
    for axes in figure.axes:
        texts = (axes.title, axes.xaxis.label, axes.yaxis.label)
        for part in filter(Text.get_text, texts):
            box = part.get_window_extent()
            assert box.x0 >= -1, part
            assert box.y0 >= -1, part
            assert box.x1 <= figure.bbox.x1 + 1, part
            assert box.y1 <= figure.bbox.y1 + 1, part
    lines = figure.axes[-2].get_legend().get_texts()
    assert [text.get_text() for text in lines] == (
        list(runs) if len(runs) > 1 else ["overall", "segment 1"]
    )


def test_report_of_a_grid_shows_a_configuration_once(tmp_path, drawn):
    scores = {"test/exit1/top1": 0.5, "test/exit1/cost": 1.0, "test/ensemble/top1": 0.5}
    rows = [
        Record({"method": m, "seeds": s}, scores, None, history)
        for m, history in (("joint", _random(3)), ("dfs", _random(3)), ("ge", None))
        for s in ("0", "1")
    ]
    report.write(epath.Path(tmp_path), rows, {})
    assert [axes.get_ylabel() for axes in drawn[-1].axes if axes.images][::2] == [
        "joint\nexit",
        "dfs\nexit",
    ]
    without = [row._replace(conflict=None) for row in rows]
    (tmp_path / "without").mkdir()
    report.write(epath.Path(tmp_path / "without"), without, {})
    assert not (tmp_path / "without" / "conflict.png").exists()


def test_evaluation_refuses_a_run_that_measured_nothing(tmp_path, capsys):
    default = config.default()
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config.to_json(default))
    (tmp_path / "one" / "metrics.jsonl").write_text(json.dumps(FIRST) + "\n")
    places = [str(tmp_path / name) for name in ("one", "other")]
    assert evaluate.main(["--workdir", places[0], "--beside", places[1]]) != 0
    error = capsys.readouterr().err
    assert "--beside" in error
    assert places[1] in error
    assert "train.conflict_every" in error
