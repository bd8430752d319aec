"""Files that are whole or not there, and JSON without what JSON lacks."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from dfs_jax.writing.files import json_text, open_whole, write_whole


@pytest.mark.parametrize("kind", [str, epath.Path, lambda path: path])
def test_text_and_bytes_are_written(tmp_path, kind):
    path = tmp_path / "file.md"
    write_whole(kind(path), "± 1\n")
    assert path.read_bytes() == "± 1\n".encode()
    write_whole(kind(path), b"\x00\r\n")
    assert path.read_bytes() == b"\x00\r\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_file_before(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "before")

    def fail_halfway():
        with open_whole(path) as file:
            file.write(b"half")
            file.flush()
            assert path.read_text() == "before"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert path.read_text() == "before"
    write_whole(path, "after")
    assert path.read_text() == "after"
    with pytest.raises(OSError, match="No such file"):
        write_whole(tmp_path / "nowhere" / "file", "x")


def test_a_bucket_is_written_through_etils(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(epath, "Path", lambda path: seen.append(path) or tmp_path / "object")
    write_whole("gs://bucket/object", "x")
    assert seen == ["gs://bucket/object"]
    assert (tmp_path / "object").read_text() == "x"


def test_json_has_plain_numbers_and_null_for_what_it_lacks():
    content = {
        "a": np.float32(0.5),
        "b": (math.nan, np.int64(3), -math.inf),
        "c": [None, "é", True],
    }
    text = json_text({**content, "d": np.arange(2)})
    assert text.endswith("}\n")
    assert json.loads(text) == {"a": 0.5, "b": [None, 3, None], "c": [None, "é", True], "d": [0, 1]}
    assert json_text([1], indent=2) == "[\n  1\n]\n"


def test_writing_needs_numpy_alone():
    code = (
        "import sys, dfs_jax.writing.files, dfs_jax.writing.tables\n"
        "sys.exit(any(name in sys.modules for name in ('jax', 'etils', 'ml_collections')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
