"""A grid that is killed and started again, with real training in real processes."""

import random

import processes
import pytest
import tiny_run
from tiny_run import few_digits  # noqa: F401

from dfs_jax import ablate
from dfs_jax.training import metrics

GRID = """
from dfs_jax.ablate import Grid

def get_grid():
    return Grid(
        base={base!r},
        axes={{"method": {{"joint": ["preset=joint"], "dfs": ["preset=dfs"]}}, "seeds": range(1)}},
        baseline={{"method": "joint"}},
        overrides={overrides!r},
    )
"""


@pytest.mark.slow
def test_a_killed_grid_ends_with_the_same_bytes(tmp_path):
    grid = tmp_path / "grid.py"
    overrides = tiny_run.overrides(
        f"train.compilation_cache={tmp_path / 'cache'}", "train.steps=20", "train.log_every=1"
    )
    grid.write_text(GRID.format(base=tiny_run.DIGITS, overrides=overrides))

    def words(workdir):
        return ["--config", str(grid), "--workdir", str(workdir)]

    def steps(workdir):
        return sum(len(metrics.read_metrics(run)) for run in workdir.glob("runs/*"))

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    moment = random.randint(1, 2 * 20)
    print(f"killed after {moment} lines of metrics")
    processes.killed_when(
        lambda: steps(killed) >= moment,
        ["-m", "dfs_jax.ablate", *words(killed)],
        tmp_path / "killed.log",
    )
    assert not (killed / "results.csv").exists()
    for workdir in (killed, straight):
        assert ablate.main(words(workdir)) == 0
    results = (straight / "results.csv").read_bytes()
    assert results.count(b"\n") == 3
    assert (killed / "results.csv").read_bytes() == results
