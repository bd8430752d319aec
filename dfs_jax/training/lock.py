"""One run at a time in a workdir; commands that only read may run beside it.

A run holds the file `lock` in its workdir. The kernel takes the lock back however a process ends,
so a restart right after a kill finds it free. On a disk that machines share, the lock of one that
is gone may stay; its run also touches the file every few seconds, and one that does not is passed
over. Where there are no locks (gs://, some network disks) a second run is not noticed.
"""

import contextlib
import fcntl
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from dfs_jax.config import ConfigError
from dfs_jax.distributed import processes

_log = logging.getLogger(__name__)

_TOUCH_SECONDS = 5.0
_PATIENCE_SECONDS = 20.0  # without a touch, after which the run on another machine is gone


@contextlib.contextmanager
def held(workdir: str) -> Iterator[None]:
    """Holds the lock of `workdir`, which is created if need be.

    Process 0 holds it for all. Raises ConfigError, in every process, if another run has it. Of a
    new workdir nothing stays if the run is then refused.
    """
    refused, place = None, epath.Path(workdir)
    new = jax.process_index() == 0 and not place.exists()
    with contextlib.ExitStack() as stack:
        try:
            place.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0 and "://" not in workdir:
                stack.enter_context(_locked(Path(workdir) / "lock"))
        except BlockingIOError as error:
            refused = ConfigError(f"--workdir: {workdir} is in use; {error}")
        except OSError as error:
            refused = ConfigError(f"--workdir: cannot write to {workdir}: {error.strerror}")
        if processes.agreed(refused is not None):
            raise refused or ConfigError(f"--workdir: {workdir} is in use by another run")
        try:
            yield
        except ConfigError:
            if new:
                with contextlib.suppress(OSError):  # there is more than the lock by now
                    (place / "lock").unlink(missing_ok=True)
                    place.rmdir()
            raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds `path`; raises BlockingIOError, which tells of its holder, if another run does."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    done = threading.Event()
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _refuse_living(file)
        except OSError as error:
            _log.info("%s cannot be locked (%s); a second run goes unnoticed", path, error.strerror)
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(_myself()).encode(), 0)
        threading.Thread(target=_touch, args=(file, done), name="lock", daemon=True).start()
        yield
    finally:
        done.set()
        os.close(file)


def _touch(file: int, done: threading.Event) -> None:
    while not done.wait(_TOUCH_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(file)


def _myself() -> dict[str, str | int]:
    """What tells this process and this machine, since its start, from others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = platform.node()
    return {"pid": os.getpid(), "host": platform.node(), "boot": boot}


def _refuse_living(file: int) -> None:
    """Raises BlockingIOError unless the holder of `file` is a machine that is gone."""
    try:
        holder = json.loads(os.pread(file, 1000, 0))
        name = f"process {holder['pid']} on {holder['host']}"
        here = holder["boot"] == _myself()["boot"]
    except (ValueError, KeyError, TypeError):  # it has only just taken it
        name, here = "another process", True
    sentence = f"{name} trains there: wait for its end, or choose another workdir"
    if here:  # this machine's kernel knows
        raise BlockingIOError(sentence)
    touched, deadline = os.fstat(file).st_mtime_ns, time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if os.fstat(file).st_mtime_ns != touched:
            raise BlockingIOError(sentence)
    _log.warning("%s shows no sign of life; the lock that it left behind is passed over", name)
