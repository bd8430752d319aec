"""Grids of runs and their report; training is replaced by a function that writes metrics."""

import csv
import json
import math
import re

import numpy as np
import pytest
from etils import epath

from dfs_jax import ablate
from dfs_jax.sweeps import grid, report, runs
from dfs_jax.sweeps.records import Record
from dfs_jax.training import loop, workdir
from dfs_jax.training.save_policy import Preempted

GRID = """
from dfs_jax.ablate import Grid

def get_grid():
    return Grid(
        base="{base}",
        axes={{
            "method": {{"joint": ["preset=joint"], "dfs": ["preset=dfs", "surgery.beta=0.25"]}},
            "train.batch_size": (32, 64),
            "seeds": range(3),
        }},
        baseline={{"method": "joint"}},
        overrides=("train.epochs=1.0",),
    )
"""


@pytest.fixture
def grid_file(tmp_path, request):
    base = request.config.rootpath / "configs" / "digits.py"
    path = tmp_path / "grid.py"
    path.write_text(GRID.format(base=base))
    return path


class Trainer:
    """Stands in for training: accuracies are a function of the configuration."""

    def __init__(self, stop_after=math.inf, fails=lambda config: False):
        self.runs, self.stop_after, self.fails = [], stop_after, fails

    def __call__(self, config, path):
        if len(self.runs) >= self.stop_after:
            raise KeyboardInterrupt
        if self.fails(config):
            raise loop.ConfigError("this one cannot be")
        self.runs.append(path)
        place = workdir.create(config, path)
        rng = np.random.default_rng([config.seed, config.train.batch_size])
        top1 = 0.5 + rng.random(3) / 10 + 0.1 * config.surgery.partition
        scores = {"step": 7, "test/ensemble/top1": top1[2], "test/exit1/loss": 1.0}
        for i in (1, 2):
            scores |= {f"test/exit{i}/top1": top1[i - 1], f"test/exit{i}/cost": 1000.0 * i}
        (place / "metrics.jsonl").write_text(json.dumps(scores) + "\n")


@pytest.fixture
def trainer(monkeypatch):
    def use(**options):
        made = Trainer(**options)
        monkeypatch.setattr(loop, "train_and_evaluate", made)
        return made

    return use


def test_every_combination_is_one_run_of_its_own_configuration(grid_file):
    _, runs = grid.load(str(grid_file))
    assert len(runs) == len({run.name for run in runs}) == 2 * 2 * 3
    for run in runs:
        assert run.config.surgery.partition == (run.labels["method"] == "dfs")
        assert run.config.train.batch_size == int(run.labels["train.batch_size"])
        assert run.config.seed == run.config.data.seed == int(run.labels["seeds"])
        assert run.config.train.epochs == 1.0
        assert run.config.surgery.beta == (0.25 if run.labels["method"] == "dfs" else 0.5)


def test_shards_cover_the_grid_once_and_report_together(grid_file, tmp_path, trainer):
    made = trainer()
    found, cells = grid.load(str(grid_file))
    for k in range(1, 6):
        assert runs.run(found, cells, str(tmp_path / "work"), (k, 5))
    names = [path.rsplit("/", 1)[-1] for path in made.runs]
    assert sorted(names) == sorted(cell.name for cell in cells)
    with open(tmp_path / "work" / "results.csv") as file:
        assert len(list(csv.DictReader(file))) == len(cells)


def test_a_grid_that_was_stopped_ends_with_the_same_bytes(grid_file, tmp_path, trainer):
    found, cells = grid.load(str(grid_file))
    trainer()
    runs.run(found, cells, str(tmp_path / "whole"))
    trainer(stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        runs.run(found, cells, str(tmp_path / "stopped"))
    again = trainer()
    runs.run(found, cells, str(tmp_path / "stopped"))
    assert len(again.runs) == len(cells) - 5, "finished runs are not trained again"
    whole, stopped = (tmp_path / d / "results.csv" for d in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()


def test_numbers_of_another_configuration_are_not_the_grids(grid_file, tmp_path, trainer, capsys):
    work = tmp_path / "work"
    trainer()
    assert ablate.main(["--config", str(grid_file), "--workdir", str(work)]) == 0
    grid_file.write_text(grid_file.read_text().replace("beta=0.25", "beta=0.75"))
    again = trainer(fails=lambda config: config.surgery.partition)
    argv = ["--config", str(grid_file), "--workdir", str(work), "--shard", "2/2"]
    assert ablate.main(argv) == 1
    assert not again.runs
    printed = capsys.readouterr().out
    assert printed.count("holds another experiment; surgery.beta: 0.25") == 6
    assert "6 of 12 runs are finished" in printed
    with open(work / "results.csv") as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"joint"}


def test_a_longer_grid_goes_on(grid_file, tmp_path, trainer):
    text = grid_file.read_text().replace("epochs=1.0", 'epochs=1.0", "optimizer.schedule=constant')
    grid_file.write_text(text)
    trainer()
    argv = ["--config", str(grid_file), "--workdir", str(tmp_path / "work")]
    assert ablate.main(argv) == 0
    grid_file.write_text(text.replace("epochs=1.0", "epochs=2.0"))
    again = trainer()
    assert ablate.main(argv) == 0
    assert len(again.runs) == 12


def test_a_grid_that_is_told_to_end_ends(grid_file, tmp_path, monkeypatch, capsys):
    started = []

    def told(config, workdir):
        started.append(workdir)
        raise Preempted("told to end: step 5 is saved; the same command goes on from it")

    monkeypatch.setattr(loop, "train_and_evaluate", told)
    status = ablate.main(["--config", str(grid_file), "--workdir", str(tmp_path / "grid")])
    assert status == 1
    assert len(started) == 1
    assert "told to end: step 5 is saved" in capsys.readouterr().err


def test_a_failed_run_is_listed_and_the_rest_go_on(grid_file, tmp_path, trainer, capsys):
    made = trainer(fails=lambda config: config.seed == 1 and config.surgery.partition)
    status = ablate.main(["--config", str(grid_file), "--workdir", str(tmp_path / "work")])
    assert status == 1
    assert len(made.runs) == 12 - 2
    printed = capsys.readouterr().out
    assert len(re.findall(r"failed: method=dfs.*seeds=1: ConfigError: this one", printed)) == 2
    assert "10 of 12 runs are finished" in printed


def rows_of(values):
    """Rows of a two-exit network from {(method, seed): (exit 1, exit 2, ensemble)}."""
    return [
        Record(
            {"method": method, "seeds": str(seed)},
            {
                "test/exit1/top1": v[0],
                "test/exit2/top1": v[1],
                "test/ensemble/top1": v[2],
                "test/exit1/cost": 10.0,
                "test/exit2/cost": 20.0,
            },
            1.5,
        )
        for (method, seed), v in values.items()
    ]


def test_table_has_means_deviations_and_paired_intervals():
    rng = np.random.default_rng(0)
    values = {(m, s): rng.random(3) for m in ("joint", "dfs") for s in range(4)}
    lines = report.markdown(rows_of(values), {"method": "joint"}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    joint, dfs = (np.stack([values[m, s] for s in range(4)]) for m in ("joint", "dfs"))
    for row, data in zip(cells[2:], (joint, dfs), strict=True):
        for column, text in enumerate(row[2:5]):
            other = (dfs if data is joint else joint)[:, column].mean()
            expected = (
                f"{100 * data[:, column].mean():.2f} ± {100 * data[:, column].std(ddof=1):.2f}"
            )
            best = data[:, column].mean() > other
            assert text == (f"**{expected}**" if best else expected)
    t975 = 3.182446305284263  # Student's t, three degrees of freedom
    gaps = (dfs - joint)[:, 1]
    half = t975 * gaps.std(ddof=1) / 2
    assert cells[3][6] == f"{100 * gaps.mean():+.2f} ± {100 * half:.2f}"
    assert cells[2][5:] == ["", ""], "the baseline is not compared to itself"


def test_seconds_are_apart_from_results(tmp_path):
    rows = rows_of({("dfs", 0): (0.5, 0.6, 0.7), ("joint", 0): (0.4, 0.5, 0.6)})
    report.write(epath.Path(tmp_path), rows, {"method": "joint"})
    timings = (tmp_path / "timings.csv").read_text()
    assert timings.splitlines()[0] == "method,seeds,seconds"
    assert "seconds" not in (tmp_path / "results.csv").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("surgery.beta=0.25", "surgery.bata=0.25"), "did you mean 'beta'"),
        (("preset=dfs", "preset=dsf"), "preset word 'dsf' is unknown"),
        (('"method": "joint"}', '"method": "jiont"}'), "baseline names method=jiont"),
        (("def get_grid", "def grid"), "has no function get_grid"),
        (("digits.py", "digit.py"), "there is no file"),
    ],
)
def test_bad_grids_are_refused(grid_file, tmp_path, change, message, capsys):
    text = grid_file.read_text()
    assert change[0] in text
    grid_file.write_text(text.replace(*change))
    status = ablate.main(["--config", str(grid_file), "--workdir", str(tmp_path / "work")])
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b"])
def test_bad_shards_are_refused(grid_file, tmp_path, shard, capsys):
    arguments = ["--config", str(grid_file), "--workdir", str(tmp_path / "w"), "--shard", shard]
    assert ablate.main(arguments) == 2
    assert "--shard must be K/N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("grid_text", "message"),
    [
        ("Grid(base=BASE, axes=3)", "its axes a dictionary"),
        ("Grid(base=BASE, axes={'seeds': 3})", "axis seeds is a list of values, got 3"),
        ("Grid(base=BASE, axes={'seeds': ()})", "axis seeds has no values"),
        ("Grid(base=BASE, axes={}, overrides='train.steps=3')", "overrides are a list of texts"),
        ("Grid(bas=BASE, axes={})", r"TypeError: .*'bas' \(line 5\)"),
        ("None", r"get_grid\(\) must return a Grid, it returned None"),
        ("Grid(base=BASE, axes={'seeds': ['x']})", "config.seed: 'x' is not a value of type int"),
    ],
)
def test_a_mistake_in_a_grid_is_told_in_a_sentence(grid_text, message, tmp_path, request, capsys):
    base = request.config.rootpath / "configs" / "digits.py"
    file = tmp_path / "grid.py"
    file.write_text(
        f"from dfs_jax.ablate import Grid\n\nBASE = {str(base)!r}\n"
        f"def get_grid():\n    return {grid_text}\n"
    )
    assert ablate.main(["--config", str(file), "--workdir", str(tmp_path / "runs")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


def test_a_grid_need_not_have_all_combinations(request):
    cells = grid.load(str(request.config.rootpath / "configs/ablations/fashion_mnist.py"))[1]
    methods = {}
    for cell in cells:
        methods.setdefault(cell.labels["setting"], set()).add(cell.labels["method"])
        assert [cell.config.seed, cell.config.data.seed] == [int(cell.labels["seeds"])] * 2
    everywhere = {"joint", "dfs", "dfs_all", "ge"}
    assert methods["vgg7 short"] > everywhere | {"mixed", "boost", "dfs, from exit 3"}
    assert methods["msdnet long"] == everywhere
    assert methods["resnet18 short, distilled"] == {"joint", "dfs"}
    assert len(cells) == 3 * sum(map(len, methods.values()))


def test_a_grid_without_runs_is_refused(tmp_path, request):
    file = tmp_path / "empty.py"
    base = request.config.rootpath / "configs" / "digits.py"
    text = GRID.format(base=base).replace("overrides=", "has=lambda labels: False, overrides=")
    file.write_text(text)
    with pytest.raises(loop.ConfigError, match="no runs"):
        grid.load(str(file))


def test_a_record_alone_is_a_finished_run(grid_file, tmp_path, trainer, capsys):
    made, work = trainer(), tmp_path / "work"
    argv = ["--config", str(grid_file), "--workdir", str(work)]
    assert ablate.main(argv) == 0
    before = (work / "report.md").read_text()
    kept = tmp_path / "kept"
    for place in (work / "runs").iterdir():
        (kept / "runs" / place.name).mkdir(parents=True)
        (kept / "runs" / place.name / "record.json").write_bytes(
            (place / "record.json").read_bytes()
        )
    argv = ["--config", str(grid_file), "--workdir", str(kept)]
    count = len(made.runs)
    assert ablate.main(argv) == 0
    assert len(made.runs) == count
    assert (kept / "report.md").read_text() == before

    grid_file.write_text(grid_file.read_text().replace("train.epochs=1.0", "train.epochs=2.0"))
    capsys.readouterr()
    assert ablate.main(argv) == 1
    assert capsys.readouterr().out.count("train.epochs: 1.0 there, 2.0 now") == count
