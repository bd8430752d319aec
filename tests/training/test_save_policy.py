"""When a run saves, and what becomes of it when a save fails or it is told to end."""

import contextlib
import errno
import logging
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from etils.epath import abstract_path
from tiny_run import few_digits  # noqa: F401

from dfs_jax import config as configuration
from dfs_jax import main
from dfs_jax.training import loop, metrics, progress, save_policy
from dfs_jax.training.checkpoint import Checkpointer, CheckpointError
from dfs_jax.training.run import prepare
from dfs_jax.training.save_policy import Preempted, Saves, SavingError
from dfs_jax.training.state import restore


class Saver:
    """Stands for a Checkpointer whose saves fail as often as it is told."""

    def __init__(self, failures=0):
        self.failures, self.saved = failures, []

    def save(self, step, state, meta, scores):
        self.saved.append(step)

    def wait(self):
        if self.failures and self.saved:
            self.failures -= 1
            step = self.saved.pop()
            raise CheckpointError(f"the checkpoint of step {step} could not be written: full")

    def latest_step(self):
        return self.saved[-1] if self.saved else None


def saves(saver, every=10, **fields):
    c = configuration.default()
    for name, value in fields.items():
        c.train[name] = value
    return Saves(c, saver, every)


class TestWhen:
    """Which steps are saved."""

    def test_by_steps(self):
        due = saves(Saver(), every=3).due
        assert [step for step in range(1, 10) if due(step)] == [3, 6, 9]

    @pytest.mark.parametrize(
        ("every", "log_every", "want"),
        [
            (1000, 4, [12, 24, 36]),  # at the steps that are logged; 30 seconds are 12 steps
            (10, 1, [10, 20, 30]),  # a save by steps starts the minutes anew
        ],
    )
    def test_by_minutes(self, every, log_every, want, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(save_policy.time, "monotonic", lambda: now[0])
        s = saves(Saver(), every=every, checkpoint_minutes=0.5, log_every=log_every)
        found = []
        for step in range(1, 40):
            now[0] += 2.5
            if s.due(step):
                found.append(step)
                s.save(step, None, {})
        assert found == want

    def test_not_by_minutes_unless_asked_for(self, monkeypatch):
        s = saves(Saver(), every=1000, log_every=1)
        monkeypatch.setattr(save_policy.time, "monotonic", lambda: 1e9)
        assert not any(s.due(step) for step in range(1, 100))


class TestFailures:
    """A save that fails, seen by the loop."""

    def test_the_failure_is_told_once_and_the_next_save_is_made(self, caplog):
        saver = Saver(failures=1)
        s = saves(saver)
        for step in (10, 20, 30):
            s.save(step, None, {})
        assert saver.saved == [20, 30]
        (record,) = caplog.records
        assert record.getMessage() == (
            "the checkpoint of step 10 could not be written: full; training goes on, and the "
            "newest checkpoint is that of step None"
        )

    def test_the_last_save_is_tried_again(self, monkeypatch, caplog):
        pauses = []
        monkeypatch.setattr(save_policy.time, "sleep", pauses.append)
        saver = Saver(failures=3)
        saves(saver).finish(20, None, {})
        assert saver.saved == [20]
        assert pauses == [10.0, 10.0, 10.0]
        assert "tried again" in caplog.text

    def test_and_given_up_with_one_sentence(self, monkeypatch):
        monkeypatch.setattr(save_policy.time, "sleep", lambda _: None)
        saver = Saver(failures=99)
        saver.saved = [10]
        message = "step 20 could not be written: full; the newest checkpoint is that of step"
        s = saves(saver)
        saver.saved = []
        with pytest.raises(SavingError, match=message):
            s.finish(20, None, {})


class TestCheckpointerOnAFullDisk:
    """The failure as Orbax meets it: in the background, in one of its threads."""

    @pytest.fixture
    def full(self, monkeypatch):
        """Has the disk refuse the file `meta/…` of each step in the set that it returns."""
        steps = set()
        original = abstract_path.Path.write_text

        def write_text(self, *arguments, **options):
            if any(f"/{step}.orbax-checkpoint-tmp/meta" in str(self) for step in steps):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(self, *arguments, **options)

        monkeypatch.setattr(abstract_path.Path, "write_text", write_text)
        return steps

    def test_nothing_of_it_stays_and_the_checkpoints_before_it_do(self, full, tmp_path):
        state = {"x": jnp.arange(5.0)}
        with Checkpointer(tmp_path / "c", best_metric="m") as saver:
            saver.save(1, state, {}, {"m": 0.5})
            saver.wait()
            full.add(2)
            saver.save(2, state, {}, {"m": 0.9})
            with pytest.raises(CheckpointError, match="step 2 could not be written.*No space left"):  # noqa: RUF043
                saver.wait()
            assert saver.all_steps() == [1]
            assert saver.best_step() == 1
            full.clear()
            # The same step can be saved after all, and is the best one then.
            assert saver.save(2, {"x": state["x"] + 1}, {}, {"m": 0.9})
            saver.wait()
            assert saver.best_step() == 2
            np.testing.assert_array_equal(saver.restore(state).state["x"], np.arange(1.0, 6.0))
        assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.is_dir()) == ["1", "2"]

    def test_old_checkpoints_are_dropped_only_for_a_new_one(self, full, tmp_path):
        state = {"x": jnp.arange(5.0)}
        with Checkpointer(tmp_path / "c", best_metric=None) as saver:
            for step in (1, 2):
                saver.save(step, state, {}, {})
                saver.wait()
            full.add(3)
            saver.save(3, state, {}, {})
            with pytest.raises(CheckpointError):
                saver.wait()
            assert saver.all_steps() == [1, 2]
            saver.save(4, state, {}, {})
            saver.wait()
            assert saver.all_steps() == [2, 4]
        with Checkpointer(tmp_path / "c", best_metric=None, read_only=True) as saver:
            assert saver.all_steps() == [2, 4]

    def test_close_tells_of_a_failure_that_nobody_has_waited_for(self, full, tmp_path, caplog):
        full.add(1)
        with Checkpointer(tmp_path / "c", best_metric=None) as saver:
            saver.save(1, {"x": jnp.zeros(3)}, {}, {})
        assert "step 1 could not be written" in caplog.text


def test_metadata_is_read_by_another_checkpointer(tmp_path):
    state = {"x": jnp.zeros((2, 3), jnp.bfloat16), "n": jnp.int32(4)}
    with Checkpointer(tmp_path / "c", best_metric=None) as saver:
        saver.save(1, state, {}, {})
    with Checkpointer(tmp_path / "c", best_metric=None, read_only=True) as saver:
        found = saver.metadata(1)
    assert found["x"].shape == (2, 3)
    assert found["x"].dtype == jnp.bfloat16
    assert found["n"].shape == ()


def test_metrics_wait_in_memory_while_the_disk_is_full(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    with caplog.at_level(logging.INFO), metrics.MetricWriter(tmp_path, tensorboard=False) as w:
        w.write(1, {"a": 1.0})
        file.rename(tmp_path / "aside")
        file.symlink_to("/dev/full")
        w.write(2, {"a": 2.0})
        w.write(3, {"a": 3.0})
        file.unlink()
        (tmp_path / "aside").rename(file)
        assert len(metrics.read_metrics(tmp_path)) == 1
        w.write(4, {"a": 4.0})
        assert metrics.read_metrics(tmp_path) == [{"step": s, "a": float(s)} for s in (1, 2, 3, 4)]
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 2
    assert "cannot be written (No space left on device)" in told[0]
    assert "can be written again" in told[1]


def test_metrics_that_never_reach_the_disk_are_counted_at_the_end(tmp_path, caplog):
    with metrics.MetricWriter(tmp_path, tensorboard=False) as w:
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        w.write(1, {"a": 1.0})
        w.write(2, {"a": 1.0})
    assert "The last 2 records are missing" in caplog.text


def scores_of(workdir):
    """[(step, the scores of its evaluation)], in the order of the file, and the best step."""
    lines = [
        (line["step"], {k: v for k, v in line.items() if k.startswith("eval/")})
        for line in metrics.read_metrics(workdir)
    ]
    with Checkpointer(
        workdir / "checkpoints", best_metric="eval/mean/top1", read_only=True
    ) as saver:
        return [line for line in lines if line[1]], saver.best_step()


class TestSigterm:
    """A run that is told to end, in this process."""

    @pytest.mark.parametrize("moment", [5, 8])  # 8: a step that is to be evaluated
    def test_it_saves_ends_with_a_sentence_and_goes_on_to_the_same_bits(
        self, moment, tmp_path, monkeypatch
    ):
        config = tiny_run.config()
        loop.train_and_evaluate(config, str(tmp_path / "whole"))
        original = progress.Reporter.step_done

        def told(self, step, *rest):
            if step == moment:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, step, *rest)

        before = signal.getsignal(signal.SIGTERM)
        broken = tmp_path / "broken"
        with monkeypatch.context() as patch:
            patch.setattr(progress.Reporter, "step_done", told)
            with pytest.raises(
                Preempted, match=f"told to end: step {moment} is saved; the same command"
            ):
                loop.train_and_evaluate(config, str(broken))
        assert signal.getsignal(signal.SIGTERM) is before
        assert (broken / "checkpoints" / str(moment)).is_dir()
        assert max(r["step"] for r in metrics.read_metrics(broken)) <= moment
        loop.train_and_evaluate(config, str(broken))
        run = prepare(config)
        a, b = (
            jax.device_get(restore(run, str(tmp_path / name))[1]) for name in ("whole", "broken")
        )
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert x.tobytes() == y.tobytes()
        assert scores_of(tmp_path / "broken") == scores_of(tmp_path / "whole")


@contextlib.contextmanager
def told(number, at):
    """This process gets the signal while the report of step `at` is made."""
    original = progress.Reporter.step_done

    def step_done(self, step, *rest):
        if step == at:
            os.kill(os.getpid(), number)
        return original(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.Reporter, "step_done", step_done)
        yield


class TestCtrlC:
    """The command whose user ends it, in this process."""

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
    def test_it_saves_as_for_sigterm(self, number, tmp_path, capsys):
        before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)]
        with told(number, 5):
            assert main.main(tiny_run.arguments(tmp_path)) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == "error: told to end: step 5 is saved; the same command goes on from it"
        assert (tmp_path / "checkpoints" / "5" / "meta").is_dir()
        after = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)]
        assert after == before

    def test_after_the_last_step_it_saves_and_leaves_the_test_split(self, tmp_path, capsys):
        # The output is gone as well, as it is when the terminal was closed.
        reader, writer = os.pipe()
        os.close(reader)
        gone = open(writer, "w")  # noqa: SIM115
        with pytest.MonkeyPatch.context() as patch, told(signal.SIGHUP, 12):
            patch.setattr(sys, "stdout", gone)
            patch.setattr(sys, "stderr", gone)
            assert main.main(tiny_run.arguments(tmp_path)) == 1
        assert (tmp_path / "checkpoints" / "12").is_dir()
        assert not metrics.has(tmp_path, 12, "test/exit1/top1")
        assert main.main(tiny_run.arguments(tmp_path)) == 0
        assert metrics.has(tmp_path, 12, "test/exit1/top1")
        gone.close()

    def test_before_the_first_step_it_claims_to_have_saved_nothing(self, tmp_path, monkeypatch):
        # Several processes agree on such a step when they are told while they compile.
        monkeypatch.setattr(Saves, "preempted", lambda self, step: True)
        with pytest.raises(Preempted, match=r"^told to end: nothing was lost; the same command"):
            loop.train_and_evaluate(tiny_run.config(), str(tmp_path))
        assert list((tmp_path / "checkpoints").iterdir()) == []

    def test_ignored_signals_end_nothing(self, tmp_path, capsys):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with told(signal.SIGHUP, 5):
                assert main.main(tiny_run.arguments(tmp_path)) == 0
        finally:
            signal.signal(signal.SIGHUP, before)
