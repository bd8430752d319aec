"""A grid that is killed and started again, with real training in real processes."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny_run

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

    def start(workdir):
        command = [sys.executable, "-m", "dfs_jax.ablate", "--config", str(grid)]
        log = (tmp_path / f"{workdir.name}.log").open("w")
        environment = {**os.environ, "XLA_FLAGS": ""}
        return subprocess.Popen(
            [*command, "--workdir", str(workdir)], stdout=log, stderr=log, env=environment
        )

    def steps(workdir):
        return sum(len(metrics.read_metrics(run)) for run in workdir.glob("runs/*"))

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert start(straight).wait(timeout=300) == 0, (tmp_path / "straight.log").read_text()
    moment = random.randint(1, 2 * 20)
    print(f"killed after {moment} lines of metrics")
    process = start(killed)
    deadline = time.monotonic() + 300
    while steps(killed) < moment:
        assert process.poll() is None, (tmp_path / "killed.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "results.csv").exists()
    assert start(killed).wait(timeout=300) == 0, (tmp_path / "killed.log").read_text()
    results = (straight / "results.csv").read_bytes()
    assert results.count(b"\n") == 3
    assert (killed / "results.csv").read_bytes() == results
