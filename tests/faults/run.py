"""Breaks a short run in every way of the fault table, many times, and checks what was lost.

    python -m tests.faults.run [--trials 20] [--only NAME …] [--seed 0]

A trial starts the training command, breaks it at a random moment, starts it again, and compares
the end with that of a run that nothing happened to: the state bit for bit, and every loss and
accuracy in metrics.jsonl. What may be lost are the steps since the newest complete checkpoint,
which is at most two intervals old: a save is complete when the next one begins.
Prints a table; the exit status is 1 if anything else was lost or a number was wrong. The lines on
a full disk need the right to mount a small file system, and are left out without it.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults import damage

STEPS, SAVE_EVERY, EVAL_EVERY = 24, 4, 6
_DISK_BYTES = 4 << 20


class Wrong(AssertionError):
    """More was lost than allowed, or a number was wrong."""


# A child process: the training command, in which something happens.


def settings() -> list[str]:
    """The run: two exits, dropout, a second of training."""
    return [
        "model.name=vgg7_cifar100",
        "model.options.widths=((4,),(4,))",
        "model.options.dropout_rate=0.5",
        "train.epochs=0",
        f"train.steps={STEPS}",
        "train.batch_size=16",
        "train.eval_batch_size=53",
        f"train.eval_every={EVAL_EVERY}",
        f"train.checkpoint_every={SAVE_EVERY}",
        "train.log_every=1",
        "optimizer.learning_rate=0.05",
    ]


def train(
    workdir: Path, log: Path, cache: Path, happening: Callable[[], None] = lambda: None
) -> int:
    """Exit status of the training command in a forked process; negative: the signal."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            status = _command(workdir, cache, happening)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


def _command(workdir: Path, cache: Path, happening: Callable[[], None]) -> int:
    from dfs_jax import data, main
    from dfs_jax.training import save_policy
    from tests import tiny_run

    logging.getLogger().handlers.clear()  # the command sets up its own
    data._LOADERS["digits"] = tiny_run.load  # without TFDS, which would take seconds
    save_policy._PAUSE = 0.05
    happening()
    words = ["--config", tiny_run.DIGITS, "--workdir", str(workdir)]
    words += [f"--config.{s}" for s in [*settings(), f"train.compilation_cache={cache}"]]
    status = main.main(words)
    if status == 0:
        (workdir / "final").write_text(_fingerprint(workdir))
    return status


def _fingerprint(workdir: Path) -> str:
    import jax

    from dfs_jax.training import workdir as workdirs
    from dfs_jax.training.run import prepare
    from dfs_jax.training.state import restore

    run = prepare(workdirs.saved_config(str(workdir)))
    step, state = restore(run, str(workdir))
    total = hashlib.sha256(str(step).encode())
    for leaf in jax.tree.leaves(jax.device_get(state)):
        total.update(leaf.tobytes())
    return total.hexdigest()


def _signal_later(number: int, seconds: float) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


def _on_call(owner: object, name: str, step_of: Callable, step: int, then: Callable) -> None:
    """Calls `then` when `owner.name` is called at `step` (or the first time after it)."""
    original, done = getattr(owner, name), []

    def hooked(*arguments, **options):
        if not done and step_of(*arguments, **options) >= step:
            done.append(True)
            then()
        return original(*arguments, **options)

    setattr(owner, name, hooked)


# What a trial can do. Each returns what happens in the child, given where the run stands.


def kill_in_step(random: random.Random, start: int) -> Callable[[], None]:
    step, delay = start + random.randint(1, 7), random.uniform(0, 0.02)

    def happening():
        from dfs_jax.training.progress import Reporter

        then = lambda: _signal_later(signal.SIGKILL, delay)  # noqa: E731
        _on_call(Reporter, "step_done", lambda _, step, *rest: step, step, then)

    return happening


def kill_in_save(random: random.Random, start: int) -> Callable[[], None]:
    step, delay = start + random.randint(1, 7), random.uniform(0, 0.3)

    def happening():
        from dfs_jax.training.checkpoint import Checkpointer

        then = lambda: _signal_later(signal.SIGKILL, delay)  # noqa: E731
        _on_call(Checkpointer, "save", lambda _, step, *rest: step, step, then)

    return happening


def kill_in_evaluation(random: random.Random, start: int) -> Callable[[], None]:
    which, delay = random.randint(0, 1), random.uniform(0, 0.05)

    def happening():
        from dfs_jax.training import loop

        calls = iter(range(99))
        then = lambda: _signal_later(signal.SIGKILL, delay)  # noqa: E731
        _on_call(loop, "count_split", lambda *_: next(calls), which, then)

    return happening


def terminate(
    random: random.Random, start: int, number: int = signal.SIGTERM
) -> Callable[[], None]:
    step, delay = start + random.randint(1, 7), random.uniform(0, 0.02)

    def happening():
        from dfs_jax.training.progress import Reporter

        then = lambda: _signal_later(number, delay)  # noqa: E731
        _on_call(Reporter, "step_done", lambda _, step, *rest: step, step, then)

    return happening


def press_ctrl_c(random: random.Random, start: int) -> Callable[[], None]:
    return terminate(random, start, signal.SIGINT)


def close_terminal(random: random.Random, start: int) -> Callable[[], None]:
    return terminate(random, start, signal.SIGHUP)


_STATUS = dict.fromkeys((terminate, press_ctrl_c, close_terminal), 1)  # else killed


# Trials.


class Trials:
    """Runs trials in `folder` against the end of an undisturbed run there."""

    def __init__(self, folder: Path, seed: int):
        self._folder, self._cache = folder, folder / "cache"
        self._printed = folder / "printed.log"  # never on the disk that fills up
        self.random = random.Random(seed)
        self._whole = folder / "whole"
        self._start(self._whole)
        if self._train() != 0:
            raise Wrong(f"the undisturbed run failed:\n{self._log()}")
        self._want = (self._whole / "final").read_text(), _numbers(self._whole)
        self._broken = folder / "broken"  # a run that ended between two saves

    def _start(self, workdir: Path) -> None:
        self.workdir = workdir
        if workdir.is_dir():
            shutil.rmtree(workdir)
        workdir.mkdir()

    def _train(self, happening: Callable[[], None] = lambda: None) -> int:
        return train(self.workdir, self._printed, self._cache, happening)

    def _log(self) -> str:
        return self._printed.read_text()

    def _resumed_from(self) -> int:
        line = [x for x in self._log().splitlines() if x.startswith("going on from")]
        return int(line[0].split()[-1]) if line else 0

    def _check_end(self) -> None:
        if (self.workdir / "final").read_text() != self._want[0]:
            raise Wrong("the final state differs")
        if _numbers(self.workdir) != self._want[1]:
            raise Wrong("metrics.jsonl differs")

    def ended_by(self, *faults: Callable, trials: int) -> Iterator[int]:
        """Steps lost in each of `trials` ends of runs; each run is ended again and again.

        Several `faults` take turns.
        """
        done = 0
        while done < trials:
            self._start(self._folder / "ended")
            expected = None
            while True:
                under_way = done + (expected is not None)
                fault = faults[under_way % len(faults)]
                newest = _newest(self.workdir)
                happening = fault(self.random, newest) if under_way < trials else lambda: None
                code = self._train(happening)
                if expected is not None:
                    reached, kept = expected
                    resumed = self._resumed_from()
                    if resumed != kept or reached - resumed > 2 * SAVE_EVERY:
                        raise Wrong(f"reached {reached}, kept {kept}, went on from {resumed}")
                    done += 1
                    yield reached - resumed
                if code == 0:
                    break
                status = _STATUS.get(fault, -signal.SIGKILL)
                if code != status:
                    raise Wrong(f"exit status {code} instead of {status}:\n{self._log()}")
                if status == 1 and "error: told to end: step" not in self._log():
                    raise Wrong(f"no sentence:\n{self._log()}")
                expected = _reached(self.workdir), _newest(self.workdir)
            self._check_end()

    def damaged_by(self, fault: Callable, trials: int) -> Iterator[int]:
        """Steps lost in each of `trials` runs whose newest checkpoint is damaged."""
        if not self._broken.exists():
            self._start(self._broken)

            def happening():
                from dfs_jax.training.progress import Reporter

                then = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
                _on_call(Reporter, "step_done", lambda _, step, *rest: step, 15, then)

            self._train(happening)
        for _ in range(trials):
            self._start(self._folder / fault.__name__)
            shutil.copytree(self._broken, self.workdir, dirs_exist_ok=True)
            reached, newest = _reached(self.workdir), _newest(self.workdir)
            what = fault(self.random, self.workdir / "checkpoints" / str(newest))
            if self._train() != 0:
                raise Wrong(f"{what}: the run failed:\n{self._log()}")
            resumed = self._resumed_from()
            # Damage to a file that nothing depends on loses nothing.
            if resumed not in (newest, newest - SAVE_EVERY):
                raise Wrong(f"{what}: went on from step {resumed}")
            self._check_end()
            yield reached - resumed

    def on_a_full_disk(self, disk: Path, trials: int) -> Iterator[int]:
        """Steps lost when the disk fills during a save, and is freed later or at the end."""
        for trial in range(trials):
            self._start(disk / "run")
            first = SAVE_EVERY * self.random.randint(2, 4)
            room = self.random.randint(0, 30_000)
            freed = first + SAVE_EVERY * self.random.randint(1, 2) if trial % 2 else STEPS + 1
            ballast = disk / "ballast"

            def happening(first=first, room=room, freed=freed, ballast=ballast):
                from dfs_jax.training.checkpoint import Checkpointer

                step_of = lambda _, step, *rest: step  # noqa: E731
                _on_call(Checkpointer, "save", step_of, first, lambda: _fill(ballast, room))
                _on_call(Checkpointer, "save", step_of, freed, ballast.unlink)

            code = self._train(happening)
            log = self._log()
            if "could not be written" not in log or "Traceback" in log:
                raise Wrong(f"no sentence, or a traceback:\n{log}")
            if freed > STEPS:  # never: the run ends, and says so
                if code != 1 or "from which the same command goes on" not in log:
                    raise Wrong(f"exit status {code}:\n{log}")
                reached, newest = STEPS, _newest(self.workdir)
                if newest not in (first - SAVE_EVERY, first):
                    raise Wrong(f"the newest checkpoint is that of {newest}, full since {first}")
                ballast.unlink()
                code = self._train()
                lost = reached - self._resumed_from()
                if self._resumed_from() != newest:
                    raise Wrong(f"went on from step {self._resumed_from()}, not {newest}")
            else:
                lost = 0
            if code != 0:
                raise Wrong(f"exit status {code}:\n{self._log()}")
            self._check_end()
            yield lost


def _numbers(workdir: Path) -> dict[tuple[int, str], float]:
    from dfs_jax.training import metrics

    found: dict[tuple[int, str], float] = {}
    for record in metrics.read_metrics(workdir):
        for name, value in record.items():
            key = (record["step"], name)
            if name != "step" and key in found:
                raise Wrong(f"{key} occurs twice in metrics.jsonl")
            if any(word in name for word in ("loss", "top", "norm", "learning_rate")):
                found[key] = value
    return found


def _reached(workdir: Path) -> int:
    from dfs_jax.training import metrics

    return max((record["step"] for record in metrics.read_metrics(workdir)), default=0)


def _newest(workdir: Path) -> int:
    from dfs_jax.training import checkpoint

    return checkpoint.newest_step(workdir / "checkpoints") or 0


def _fill(ballast: Path, room: int) -> None:
    """Leaves `room` bytes of the disk free."""
    free = shutil.disk_usage(ballast.parent).free
    with contextlib.suppress(OSError), ballast.open("wb") as file:
        file.write(bytes(max(free - room, 0)))


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of a few megabytes; None without the right to mount one."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)


def lines(trials: Trials, disk: Path | None, count: int) -> dict[str, Callable[[], Iterator[int]]]:
    """The table's lines: name -> the trials."""
    ends = {
        "kill -9 during a step": kill_in_step,
        "kill -9 during a save": kill_in_save,
        "kill -9 during an evaluation": kill_in_evaluation,
        "SIGTERM": terminate,
        "Ctrl-C": press_ctrl_c,
        "a closed terminal (SIGHUP)": close_terminal,
    }
    table = {
        name: functools.partial(trials.ended_by, fault, trials=count)
        for name, fault in ends.items()
    }
    table |= {
        "all of these in turn": lambda: trials.ended_by(*ends.values(), trials=6 * count),
        "newest checkpoint truncated": lambda: trials.damaged_by(damage.truncated, count),
        "newest checkpoint bit-flipped": lambda: trials.damaged_by(damage.bit_flipped, count),
        "newest checkpoint emptied": lambda: trials.damaged_by(damage.emptied, count),
        "newest checkpoint deleted": lambda: trials.damaged_by(damage.deleted, count),
    }
    if disk is not None:
        table["disk full during a save"] = lambda: trials.on_a_full_disk(disk, count)
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20, help="of every line")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="lines whose name has a word")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    os.environ.update(
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="",  # one device
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        TF_CPP_MIN_LOG_LEVEL="3",
    )
    # Everything heavy is imported once, before the children are forked; none of it computes.
    import clu.metric_writers
    import clu.parameter_overview  # noqa: F401

    import dfs_jax.training.loop  # noqa: F401
    from tests import tiny_run  # noqa: F401

    failed = False
    with tempfile.TemporaryDirectory(prefix="faults-") as name, small_disk(Path(name)) as disk:
        trials = Trials(Path(name), arguments.seed)
        print(f"{STEPS} steps, a save every {SAVE_EVERY}, an evaluation every {EVAL_EVERY}\n")
        print("| fault | trials | steps lost: trials | wrong | seconds |\n|---|---|---|---|---|")
        for line, tried in lines(trials, disk, arguments.trials).items():
            if arguments.only and not any(word in line for word in arguments.only):
                continue
            began, lost, wrong = time.monotonic(), collections.Counter(), []
            try:
                for steps in tried():
                    lost[steps] += 1
            except Wrong as error:
                wrong.append(str(error))
            failed |= bool(wrong)
            counts = ", ".join(f"{steps}: {n}" for steps, n in sorted(lost.items()))
            seconds = time.monotonic() - began
            print(
                f"| {line} | {lost.total()} | {counts} | {len(wrong)} | {seconds:.0f} |", flush=True
            )
            for reason in wrong:
                print(reason, file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
