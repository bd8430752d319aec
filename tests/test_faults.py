"""The fault table in short; `python -m tests.faults.run` is all of it."""

import subprocess
import sys
from pathlib import Path

import pytest

# Each way to end a run once, one after the other; each damage; a full disk.
LINES = ("in turn", "newest checkpoint", "disk full")


@pytest.mark.slow
def test_nothing_is_lost_and_no_number_is_wrong():
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.run", "--trials", "1", "--only", *LINES],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(lines) >= 1 + 5  # the heading; without a small disk one line less
    assert all(int(trials) >= 1 and int(wrong) == 0 for _, trials, _, wrong, _ in lines[1:])
