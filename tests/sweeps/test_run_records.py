"""Records of finished runs, and the report that is made of them alone."""

import csv
import json
import shutil

import numpy as np
import pytest
import synthetic
import tiny_run
from etils import epath
from tiny_run import few_digits  # noqa: F401

from dfs_jax import ablate, evaluate
from dfs_jax.sweeps import measured, records, report
from dfs_jax.training import metrics

GRID = """
from dfs_jax.ablate import Grid

def get_grid():
    return Grid(
        base={base!r},
        axes={{
            "method": {{"joint": ["preset=joint"], "dfs": ["preset=dfs"]}},
            "surgery.beta": (0.25, 0.5),
            "seeds": range(1),
        }},
        baseline={{"method": "joint"}},
        overrides={overrides!r},
    )
"""
PAGE = ("report.html", "report.md", "results.csv", "timings.csv", "curves.png", "conflict.png")


def kept(folder, found):
    """Writes records as a grid does: one folder each."""
    for record in found:
        place = epath.Path(folder) / f"run{record.number}"
        place.mkdir(parents=True)
        records.write(place, record)


def test_a_record_is_read_as_it_was_written(tmp_path):
    found = synthetic.grid(methods=["dfs"], seeds=1, config_of=lambda *_: {"surgery.beta": 0.5})
    kept(tmp_path, found)
    (read,) = records.read_all(epath.Path(tmp_path))
    np.testing.assert_array_equal(read.conflict.overall, found[0].conflict.overall)
    assert read._replace(conflict=None) == found[0]._replace(conflict=None)


def test_report_is_made_again_from_records_alone(tmp_path, capsys):
    found = synthetic.grid(baseline={"method": "joint"})
    kept(tmp_path / "grid" / "runs", reversed(found))
    assert ablate.main(["--report", str(tmp_path / "grid")]) == 0
    report.write(epath.Path(tmp_path), found, {"method": "joint"})
    for name in ("report.md", "results.csv", "timings.csv", "curves.png"):
        assert (tmp_path / "grid" / name).read_bytes() == (tmp_path / name).read_bytes(), name
    assert (tmp_path / "grid" / "report.html").exists()
    printed = capsys.readouterr().out
    assert (tmp_path / "report.md").read_text().strip() in printed
    assert "9 runs; report in" in printed


def test_long_histories_are_thinned(tmp_path):
    lines = []
    for step in range(1, 5001):
        cosines = {f"conflict/exit1_exit{j}": step / 7 for j in (2, 3)}
        scores = {f"eval/{w}/top1": step / 7000 for w in ("exit1", "exit2", "ensemble", "mean")}
        lines.append({"step": step, **cosines, **scores, "train/images_per_second": float(step)})
    lines.append({"step": 5000, "test/ensemble/top1": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {"test/exit1/top1": 0.5, "test/exit1/cost": 1.0, "test/ensemble/top1": 0.5}
    record = records.of_run(epath.Path(tmp_path), scores, labels={})
    assert len(record.curves["step"]) == 200
    assert record.curves["step"][0] == 1
    assert record.curves["step"][-1] == record.step == 5000
    np.testing.assert_allclose(record.curves["exit2"], np.array(record.curves["step"]) / 7000, 1e-5)
    assert len(record.conflict.steps) == 24
    assert record.speed == {"train/images_per_second": 2500.5}
    records.write(epath.Path(tmp_path), record)
    assert (tmp_path / "record.json").stat().st_size < 20_000


def test_places_of_a_machine_are_not_kept(tmp_path):
    fields = {"data": {"dir": "/home/me/flowers"}, "train": {"compilation_cache": "/home/me/c"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "test/ensemble/top1": 0.5}\n')
    record = records.of_run(epath.Path(tmp_path), {}, labels={})
    assert "home" not in str(record.config)
    assert record.config["data.dir"].startswith("flowers #")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no records of runs; they are called RUN/record.json"),
        ("{", "is not the record of a run"),
        ("[]", "is not the record of a run"),
        ('{"version": 7}', "it is of another version"),
        ('{"version": 1, "conflict": null, "labels": {}, "scores": {}}', "it has no test/ensemble"),
        ('{"version": 1, "conflict": null, "colour": 3}', "is not the record of a run"),
    ],
)
def test_bad_records_are_refused(text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "record.json").write_text(text)
    assert ablate.main(["--report", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_records_of_two_grids_are_refused(tmp_path, capsys):
    kept(tmp_path / "runs", synthetic.grid(seeds=1))
    kept(tmp_path, [synthetic.record(9, {"beta": "0.5"}, np.random.default_rng(0))])
    assert ablate.main(["--report", str(tmp_path)]) == 2
    assert "records of two grids" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a grid and its folder, --config FILE --workdir DIR, or --report DIR"),
        (["--config", "grid.py"], "give a grid and its folder"),
        (["--report", "here", "--workdir", "there"], "--report DIR stands alone"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(arguments, message, capsys):
    assert ablate.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_checkpoints_has_the_budgets_of_an_evaluation(tmp_path):
    place = epath.Path(tmp_path)
    assert measured.measured(None, place, 5, None) == {"budgeted": None}
    (tmp_path / "budgeted.csv").write_text("ratio,cost,top1,leave1\n0.5,10.0,0.75,3\n")
    wanted = [{"ratio": 0.5, "cost": 10.0, "top1": 0.75}]
    assert measured.measured(None, place, 5, None) == {"budgeted": wanted}
    before = records.Record({}, {}, step=5, step_flops=7.0, budgeted=[])
    assert measured.measured(None, place, 5, before) == {"step_flops": 7.0, "budgeted": []}
    assert measured.measured(None, place, 6, before) == {"budgeted": wanted}, "it went on"


def test_a_run_that_cannot_be_measured_is_told(tmp_path, monkeypatch, caplog):
    def prepare(*_):
        raise ValueError("the data are gone")

    monkeypatch.setattr(measured, "prepare", prepare)
    monkeypatch.setattr(measured, "newest_step", lambda _: 5)
    assert measured.measured(None, epath.Path(tmp_path), 5, None) == {"budgeted": None}
    assert "no budgeted evaluation: ValueError: the data are gone" in caplog.text


@pytest.mark.slow
def test_a_grid_keeps_what_its_report_needs(tmp_path, monkeypatch):
    grid, work = tmp_path / "grid.py", tmp_path / "work"
    overrides = tiny_run.overrides("train.conflict_every=4", "train.steps=12")
    grid.write_text(GRID.format(base=tiny_run.DIGITS, overrides=overrides))
    words = ["--config", str(grid), "--workdir", str(work)]
    assert ablate.main(words) == 0
    before = {name: (work / name).read_bytes() for name in PAGE}

    # What stands in a record is what the run and the evaluation command say.
    place = work / "runs" / "method=dfs,beta=0.5,seeds=0"
    record = records.read(epath.Path(place))
    assert evaluate.main(["--workdir", str(place), "--out", str(tmp_path / "evaluated")]) == 0
    with open(tmp_path / "evaluated" / "budgeted.csv") as file:
        rows = list(csv.DictReader(file))
    for kept_row, row in zip(record.budgeted, rows, strict=True):
        assert kept_row == {name: float(row[name]) for name in ("ratio", "cost", "top1")}
    evals = [line for line in metrics.read_metrics(place) if "eval/mean/top1" in line]
    assert record.curves["step"] == [line["step"] for line in evals]
    np.testing.assert_allclose(
        record.curves["exit1"], [line["eval/exit1/top1"] for line in evals], rtol=1e-5
    )
    assert record.step_flops > 0
    assert record.conflict.steps.tolist() == [4, 8, 12]
    assert "joint, 0.25 = joint, 0.5" in before["report.md"].decode()

    # The records are enough.
    for run in (work / "runs").iterdir():
        (tmp_path / "kept" / run.name).mkdir(parents=True)
        shutil.copy(run / "record.json", tmp_path / "kept" / run.name)
    assert ablate.main(["--report", str(tmp_path / "kept")]) == 0
    for name, content in before.items():
        again = (tmp_path / "kept" / name).read_bytes()
        assert again == content, name

    # Nothing is trained or measured twice; a record that is lost is made again.
    lost = (place / "record.json").read_bytes()
    (place / "record.json").unlink()
    evaluated = []

    def budgeted_rows(run, path):
        evaluated.append(path)
        return [row | {name: float(row[name]) for name in row if row[name]} for row in rows]

    monkeypatch.setattr(measured, "budgeted_rows", budgeted_rows)
    assert ablate.main(words) == 0
    assert evaluated == [str(place)]
    assert (place / "record.json").read_bytes() == lost
