"""The training command in processes of its own, a tiny run that they share, and its results."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dfs_jax.training import metrics

ROOT = Path(__file__).parents[1]

# All runs have one home, as a user's have, so that many a run is the second one there. Every
# program is kept, however small.
_HOME = tempfile.TemporaryDirectory(prefix="dfs_jax_home_")
KEPT = Path(_HOME.name) / ".cache" / "dfs_jax"

CHILD = ROOT / "tests" / "child.py"
# What `python` is for launch/local.sh, which also has it find a port.
_CHEAP = Path(_HOME.name) / "python"
_CHEAP.write_text(
    f'#!/bin/sh\n[ "$1" = -m ] && exec "{sys.executable}" "{CHILD}" "$@"\n'
    f'exec "{sys.executable}" "$@"\n'
)
_CHEAP.chmod(0o755)

NETWORK = ("model.name=vgg7_cifar100", "model.options.widths=((6,),(8,))")  # compiled in seconds

SETTINGS = (
    "train.epochs=0",
    "train.steps=20",
    "train.batch_size=16",
    "train.eval_batch_size=16",
    "train.eval_every=10",
    "train.checkpoint_every=5",
    "train.log_every=1",
    "optimizer.learning_rate=0.001",
    "optimizer.warmup_epochs=0",
    "optimizer.schedule=constant",
)


def arguments(workdir, *own):
    """Arguments of the training command; `own` settings come last and win."""
    settings = [f"--config.{item}" for item in (*NETWORK, *SETTINGS, *own)]
    return ["--config", str(ROOT / "configs" / "digits.py"), "--workdir", str(workdir), *settings]


def start(count, devices, words, whole=False):
    """Starts `count` processes with `devices` virtual devices each; text on stdout.

    `whole`: with TensorFlow, and the digits as TFDS serves them.
    """
    return subprocess.Popen(
        ["launch/local.sh", str(count), *words],
        cwd=ROOT,
        env=environment(devices) | {"PYTHON": sys.executable if whole else str(_CHEAP)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def environment(devices=1):
    """Variables for a child, so that it has so many virtual CPU devices."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    own = {"HOME": _HOME.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | own | {"XLA_FLAGS": flags}


def run(count, devices, words):
    """Runs them to their end; the text. Fails if one of them fails."""
    running = start(count, devices, words)
    text, _ = running.communicate(timeout=600)
    assert running.returncode == 0, text
    return text


def killed_when(come, words, log, delay=0.0):
    """Starts a cheap child, and kills it `delay` seconds after `come()` is true.

    `words` are as after `python`; its text goes to the file `log`.
    """
    with log.open("w") as file:
        child = subprocess.Popen(
            [sys.executable, CHILD, *words], stdout=file, stderr=file, env=environment()
        )
    deadline = time.monotonic() + 300
    while not come():
        assert child.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL


def pid_of(process_id, workdir):
    """The system's number of process `process_id` of the run in `workdir`."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_text().split("\0")
        except OSError:
            continue
        mine = "dfs_jax.main" in words and str(workdir) in words
        if mine and words[words.index("--process-id") + 1] == str(process_id):
            return int(entry.name)
    raise AssertionError(f"there is no process {process_id}")


def wait_for_step(workdir, step, seconds=300):
    """Returns when metrics.jsonl has reached `step`."""
    deadline = time.monotonic() + seconds
    while reached(workdir) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached in {seconds} s"
        time.sleep(0.02)


def reached(workdir):
    """The last step in metrics.jsonl, 0 if there is none."""
    return max((record["step"] for record in metrics.read_metrics(workdir)), default=0)


def series(workdir, pattern):
    """{(step, name): value} of the metrics whose names match."""
    return {
        (record["step"], name): value
        for record in metrics.read_metrics(workdir)
        for name, value in record.items()
        if re.fullmatch(pattern, name)
    }
