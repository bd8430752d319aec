"""The tutorial in the README: its commands, run one after the other as they stand."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def commands() -> list[str]:
    """The lines of the blocks marked as shell."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.slow
def test_the_tutorial(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    search = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = {**os.environ, "PATH": search, "XLA_FLAGS": ""}
    outputs = {}
    for line in commands():
        result = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        outputs[line] = result.stdout
    *_, table, lines = outputs.values()
    rows = [line.split() for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == [f"runs/digit{i}.png" for i in range(10)]
    # Digits in their order; a few epochs get most of them right.
    assert sum(int(row[1]) == i for i, row in enumerate(rows)) >= 7
    answer = json.loads(lines)
    assert answer["exit"] in (1, 2, 3, 4)
    assert answer["image"] == "runs/digit8.png"
