"""One run at a time in a workdir. The other one is a process that only holds the file."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import subprocess
import sys

import pytest

from dfs_jax.config import ConfigError
from dfs_jax.training import lock

HOLDER = """
import fcntl, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
os.ftruncate(file, 0)
os.write(file, sys.argv[2].encode())
print("held", flush=True)
while True:
    time.sleep(0.05)
    if sys.argv[3] == "touching":
        os.utime(file)
"""


@contextlib.contextmanager
def another(workdir, record, what="silent"):
    """A process that holds the lock of `workdir`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(workdir / "lock"), record, what],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def record(**changes):
    return json.dumps(lock._myself() | {"pid": 7, "host": "here"} | changes)


def test_a_second_run_is_told_whose_the_workdir_is(tmp_path):
    with another(tmp_path, record()) as process:
        before = (tmp_path / "lock").read_bytes()
        sentence = "is in use; process 7 on here trains there: wait for its end, or choose another"
        with pytest.raises(ConfigError, match=sentence), lock.held(str(tmp_path)):
            pass
        assert (tmp_path / "lock").read_bytes() == before
        process.kill()  # and at once the lock is free
        process.wait()
        with lock.held(str(tmp_path)):
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
        with lock.held(str(tmp_path)):
            pass


def test_a_holder_that_has_not_said_who_it_is_holds_it_too(tmp_path):
    with (
        another(tmp_path, ""),
        pytest.raises(ConfigError, match="another process trains there"),
        lock.held(str(tmp_path)),
    ):
        pass


def test_on_another_machine_it_must_show_signs_of_life(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0.5)
    with another(tmp_path, record(boot="another")), lock.held(str(tmp_path)):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert "process 7 on here shows no sign of life" in caplog.text
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 60)
    with (
        another(tmp_path, record(boot="another"), "touching"),
        pytest.raises(ConfigError, match="is in use; process 7 on here"),
        lock.held(str(tmp_path)),
    ):
        pass


def test_a_run_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_TOUCH_SECONDS", 0.01)
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 60)
    file = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    with lock.held(str(tmp_path)):
        (tmp_path / "lock").write_text(record(boot="another"))
        with pytest.raises(BlockingIOError, match="process 7 on here"):
            lock._refuse_living(file)
    os.close(file)


def test_a_disk_without_locks_is_no_obstacle(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with caplog.at_level(logging.INFO), lock.held(str(tmp_path)), lock.held(str(tmp_path)):
        pass
    assert "a second run goes unnoticed" in caplog.text


def test_a_child_that_outlives_the_run_does_not_keep_the_lock(tmp_path):
    with lock.held(str(tmp_path)):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    with lock.held(str(tmp_path)):
        pass
    child.kill()
    child.wait()
