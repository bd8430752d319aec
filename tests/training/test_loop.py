"""The training loop: what it writes, going on after an interruption, devices, non-finite losses."""

import contextlib
import dataclasses
import json
import logging
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiny_run import few_digits  # noqa: F401

from dfs_jax import config as configuration
from dfs_jax import data
from dfs_jax.config import ConfigError
from dfs_jax.data.pipeline import DataError
from dfs_jax.distributed import placement
from dfs_jax.training import loop, metrics, progress
from dfs_jax.training import step as step_module
from dfs_jax.training.checkpoint import Checkpointer
from dfs_jax.training.counts import batch_counter, count_split, summarise
from dfs_jax.training.progress import TrainingError
from dfs_jax.training.run import prepare
from dfs_jax.training.state import initial_state, restore
from dfs_jax.training.step import make_train_step


class Interruption(KeyboardInterrupt):
    """Stands for whatever ends a process; nothing may catch it."""


@contextlib.contextmanager
def interrupted(owner, name, step):
    """The process ends where the method `owner.name` is called for `step`."""
    original = getattr(owner, name)

    def ending(self, at, *arguments, **options):
        if at == step:
            raise Interruption
        return original(self, at, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, ending)
        with pytest.raises(Interruption):
            yield


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run."""

    config: object
    workdir: object
    final: dict


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The tiny run, uninterrupted; not to be changed."""
    workdir, config = tmp_path_factory.mktemp("trained"), tiny_run.config()
    return Trained(config, workdir, loop.train_and_evaluate(config, str(workdir)))


def final_state(config, workdir):
    step, state = restore(prepare(config), str(workdir))
    assert step == config.train.steps
    return jax.device_get(state)


def steps_of(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())


def assert_bit_identical(found, want):
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


def by_step_and_name(workdir):
    """{(step, name): value} of metrics.jsonl; a pair that occurs twice is a failure."""
    found = {}
    for record in metrics.read_metrics(workdir):
        step = record.pop("step")
        for name, value in record.items():
            assert (step, name) not in found
            found[step, name] = value
    return found


class TestWorkdir:
    """What a finished run leaves behind."""

    def test_config_is_the_resolved_one(self, trained):
        saved = configuration.from_json((trained.workdir / "config.json").read_text())
        assert saved == trained.config

    def test_metrics_have_the_promised_names_and_steps(self, trained):
        found = by_step_and_name(trained.workdir)
        exits = ("exit1", "exit2")

        def scores(split):
            names = {f"{split}/{e}/{m}" for e in exits for m in ("top1", "top5", "loss")}
            return names | {f"{split}/ensemble/top1", f"{split}/mean/top1"}

        training = {"train/loss", "train/gradient_norm", "train/learning_rate", *tiny_run.SPEED}
        training |= {f"train/{e}/{m}" for e in exits for m in ("loss", "top1")}
        steps = {name: {s for s, n in found if n == name} for _, name in found}
        assert steps == (
            {name: {2, 4, 6, 8, 10, 12} for name in training}
            | {name: {4, 8, 12} for name in scores("eval")}
            | {name: {12} for name in scores("test") | {f"test/{e}/cost" for e in exits}}
        )

    def test_accuracies_are_exact_fractions(self, trained):
        sizes = {"train": 16, "eval": tiny_run.HELD_OUT, "test": tiny_run.TEST}
        for (_, name), value in by_step_and_name(trained.workdir).items():
            split, _, what = name.partition("/")
            if what.startswith("exit") and "top" in what:
                assert 0 <= value <= 1
                assert value * sizes[split] == pytest.approx(round(value * sizes[split]))

    def test_training_metrics_are_consistent(self, trained):
        found = by_step_and_name(trained.workdir)
        schedule = prepare(trained.config).schedule
        for step in range(2, 13, 2):
            losses = [found[step, f"train/exit{i}/loss"] for i in (1, 2)]
            assert found[step, "train/loss"] == pytest.approx(sum(losses))
            rate = found[step, "train/learning_rate"]
            assert rate == pytest.approx(float(schedule(step - 1)))

    def test_final_metrics_are_those_of_the_test_split(self, trained):
        found = by_step_and_name(trained.workdir)
        assert trained.final == {n: v for (_, n), v in found.items() if n.startswith("test/")}
        run = prepare(trained.config)
        count = batch_counter(run.network, placement.replicated(run.mesh))
        state = final_state(trained.config, trained.workdir)
        counts = count_split(count, state.variables, run.data.test, placement.batch(run.mesh))
        costs = {name: v for name, v in trained.final.items() if name.endswith("/cost")}
        assert summarise(counts, "test") | costs == trained.final

    def test_waiting_for_data_is_a_share_of_the_time(self, trained):
        found = by_step_and_name(trained.workdir)
        shares = [value for (_, name), value in found.items() if name == "train/data_wait"]
        assert len(shares) == 6
        assert all(0 < share < 1 for share in shares)

    def test_events_and_parameters_are_there(self, trained):
        assert list(trained.workdir.glob("events.out.tfevents.*"))
        assert "heads_0/kernel" in (trained.workdir / "parameters.txt").read_text()

    def test_checkpoints_have_state_and_meta(self, trained):
        steps = steps_of(trained.workdir)
        assert steps[-2:] == [10, 12]
        for step in steps:
            folder = trained.workdir / "checkpoints" / str(step)
            assert {"state", "meta"} <= {p.name for p in folder.iterdir() if p.is_dir()}
        state = final_state(trained.config, trained.workdir)
        assert state.step == 12

    def test_best_checkpoint_has_the_highest_validation_score(self, trained):
        found = by_step_and_name(trained.workdir)
        scores = {s: v for (s, n), v in found.items() if n == "eval/mean/top1"}
        with Checkpointer(
            trained.workdir / "checkpoints", best_metric="eval/mean/top1", read_only=True
        ) as saver:
            best = saver.best_step()
        assert scores[best] == max(scores.values())
        assert set(steps_of(trained.workdir)) == {best, 10, 12}


class TestSelection:
    """Which checkpoint is the best one."""

    @pytest.fixture
    def scored(self, monkeypatch):
        """Gives evaluations the scores of a list, in turn."""

        def give(values):
            rest = iter(values)

            def summary(counts, prefix):
                found = summarise(counts, prefix)
                if prefix == "eval":
                    found["eval/mean/top1"] = next(rest)
                return found

            monkeypatch.setattr(loop, "summarise", summary)

        return give

    def test_the_best_one_is_kept_beside_the_newest_two(self, scored, tmp_path):
        scored([0.9, 0.2, 0.3])
        config = tiny_run.config()
        loop.train_and_evaluate(config, str(tmp_path))
        assert steps_of(tmp_path) == [4, 10, 12]
        run = prepare(config)
        assert restore(run, str(tmp_path), "best")[0] == 4
        assert restore(run, str(tmp_path))[0] == 12
        with pytest.raises(ConfigError, match="no checkpoint of step 8; it has 4, 10, 12"):
            restore(run, str(tmp_path), "8")

    def test_the_test_split_selects_nothing(self, scored, tmp_path, caplog):
        scored([0.9, 0.2, 0.3])
        config = tiny_run.config("data.validation_size=0")
        with caplog.at_level(logging.WARNING):
            loop.train_and_evaluate(config, str(tmp_path))
        assert "no validation split: eval/… is the test split" in caplog.text
        assert steps_of(tmp_path) == [10, 12]
        counted = by_step_and_name(tmp_path)[4, "eval/exit1/top1"] * tiny_run.TEST
        assert counted == pytest.approx(round(counted))
        with pytest.raises(ConfigError, match="scored on a validation split"):
            restore(prepare(config), str(tmp_path), "best")


class TestResume:
    """The same command again, after an end at any moment."""

    @pytest.mark.parametrize(
        ("owner", "name", "step", "saved"),
        [
            (progress.Reporter, "step_done", 1, None),  # before any checkpoint
            (progress.Reporter, "step_done", 7, 6),
            (progress.Reporter, "evaluated", 8, 6),
            (Checkpointer, "save", 8, 6),  # evaluated and written, not saved
            (Checkpointer, "save", 12, 10),
        ],
    )
    def test_ends_with_the_bits_of_an_uninterrupted_run(
        self, trained, tmp_path, owner, name, step, saved
    ):
        with interrupted(owner, name, step):
            loop.train_and_evaluate(trained.config, str(tmp_path))
        assert (steps_of(tmp_path) or [None])[-1] == saved
        by_step_and_name(tmp_path)
        final = loop.train_and_evaluate(trained.config, str(tmp_path))
        assert final == trained.final
        assert_bit_identical(
            final_state(trained.config, tmp_path), final_state(trained.config, trained.workdir)
        )
        found, want = by_step_and_name(tmp_path), by_step_and_name(trained.workdir)
        assert found.keys() == want.keys()
        assert {k: v for k, v in found.items() if k[1] not in tiny_run.SPEED} == {
            k: v for k, v in want.items() if k[1] not in tiny_run.SPEED
        }

    def test_an_end_before_the_test_split_was_read(self, trained, tmp_path, monkeypatch):
        def ending(*_):
            raise Interruption

        with monkeypatch.context() as patch:
            patch.setattr(loop, "_test", ending)
            with pytest.raises(Interruption):
                loop.train_and_evaluate(trained.config, str(tmp_path))
        assert loop.train_and_evaluate(trained.config, str(tmp_path)) == trained.final
        assert by_step_and_name(tmp_path).keys() == by_step_and_name(trained.workdir).keys()

    def test_a_finished_run_trains_nothing_and_prints_its_table(self, trained, monkeypatch, capsys):
        def refuse(*_):
            raise AssertionError("a finished run is trained")

        before = (trained.workdir / "metrics.jsonl").read_bytes()
        monkeypatch.setattr(step_module, "make_train_step", lambda run: refuse)
        assert loop.train_and_evaluate(trained.config, str(trained.workdir)) == trained.final
        assert "test accuracy" in capsys.readouterr().out
        assert (trained.workdir / "metrics.jsonl").read_bytes() == before
        assert steps_of(trained.workdir)[-2:] == [10, 12]

    def test_a_finished_run_whose_end_is_damaged_is_finished_again(self, trained, tmp_path):
        shutil.copytree(trained.workdir, tmp_path / "run")
        for file in (tmp_path / "run/checkpoints/12").rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
        assert loop.train_and_evaluate(trained.config, str(tmp_path / "run")) == trained.final
        want = final_state(trained.config, trained.workdir)
        assert_bit_identical(final_state(trained.config, tmp_path / "run"), want)


def ten_steps(*own, network):
    config = tiny_run.config(
        "train.steps=10", "optimizer.learning_rate=0.001", *own, network=network
    )
    run = prepare(config)
    state, step = initial_state(run), make_train_step(run)
    batches = run.data.train.batches(0, placement.batch(run.mesh))
    for _ in range(10):
        state, measured = step(state, next(batches))
    return jax.device_get((state, measured))


def assert_devices_agree(*own, network=(), tolerance):
    (one, last), (many, last_of_many) = (
        ten_steps(f"mesh.data={n}", *own, network=network) for n in (1, 8)
    )
    fresh = jax.device_get(initial_state(prepare(tiny_run.config(*own, network=network))))
    for part in ("params", "batch_stats"):
        a, b, start = (jax.tree.leaves(getattr(state, part)) for state in (one, many, fresh))
        assert max(np.abs(x - y).max() for x, y in zip(a, b, strict=True)) <= tolerance
        # Every array has moved by far more than that.
        assert min(np.abs(x - y).max() for x, y in zip(a, start, strict=True)) > 1e-5
    np.testing.assert_array_equal(last.correct, last_of_many.correct)
    np.testing.assert_allclose(last.losses, last_of_many.losses, atol=1e-5)


@pytest.mark.slow
def test_eight_devices_train_as_one_does():
    # Surgery and dropout are on; statistics are those of the whole batch. In float32 one of the
    # ReLUs may have an input so close to 0 that rounding decides.
    with jax.enable_x64(True):
        assert_devices_agree(
            "train.precision=float64",
            network=(
                "model.name=msdnet_digits",
                "model.options.steps=(1,1)",
                "model.options.initial=4",
                "model.options.growth=4",
            ),
            tolerance=1e-14,
        )


@pytest.fixture
def served(monkeypatch):
    """Has `change(data)` make the digits of the runs that follow."""

    def serve(change):
        load = lambda config: change(tiny_run.load(config))  # noqa: E731
        monkeypatch.setitem(data._LOADERS, "digits", load)

    return serve


class TestNonFinite:
    """A run ends before anything that is not finite is saved."""

    @pytest.fixture
    def images_at(self, served):
        """Multiplies the training images of one step."""

        def multiply(step, factor):
            def change(found):
                batches = found.train.batches

                def multiplied(start, sharding=None):
                    for at, batch in enumerate(batches(start, sharding), start + 1):
                        image = batch["image"]
                        if at == step:
                            with jax.transfer_guard("allow"):
                                image = jax.device_put(image * factor, image.sharding)
                        yield {**batch, "image": image}

                found.train.batches = multiplied
                return found

            served(change)

        return multiply

    def assert_all_saved_are_finite(self, config, workdir, newest):
        run = prepare(config)
        assert steps_of(workdir)[-1] == newest
        for step in steps_of(workdir):
            state = restore(run, str(workdir), str(step))[1]
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))

    def test_nan_names_step_and_exits(self, trained, images_at, tmp_path):
        images_at(6, jnp.nan)
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(TrainingError, match="step 6: the loss of exit 1, 2 is not finite"):
            loop.train_and_evaluate(trained.config, str(tmp_path))
        assert signal.getsignal(signal.SIGTERM) is handler
        self.assert_all_saved_are_finite(trained.config, tmp_path, newest=4)
        assert max(step for step, _ in by_step_and_name(tmp_path)) < 6
        # With the cause mended the run goes on, to the bits of one without it.
        images_at(6, 1.0)
        assert loop.train_and_evaluate(trained.config, str(tmp_path)) == trained.final

    def test_a_statistic_that_overflows_behind_a_finite_loss(self, trained, images_at, tmp_path):
        images_at(6, 1e25)
        with pytest.raises(TrainingError, match=r"step 6: .* statistic is not"):
            loop.train_and_evaluate(trained.config, str(tmp_path))
        self.assert_all_saved_are_finite(trained.config, tmp_path, newest=4)

    def test_a_learning_rate_that_is_too_large(self, tmp_path):
        config = tiny_run.config("optimizer.learning_rate=1e25", "train.checkpoint_every=1")
        with pytest.raises(TrainingError, match=r"step \d+: .* not finite"):
            loop.train_and_evaluate(config, str(tmp_path))
        if steps_of(tmp_path):
            self.assert_all_saved_are_finite(config, tmp_path, steps_of(tmp_path)[-1])


def test_meta_holds_the_step(trained):
    metas = list((trained.workdir / "checkpoints" / "12" / "meta").rglob("metadata"))
    assert json.loads(metas[0].read_text())["step"] == 12


class TestDamagedData:
    """A file that cannot be read costs the run nothing."""

    @pytest.fixture
    def damaged(self, served):
        """Has a split raise when the batch of an update, or of an evaluation, is asked for."""

        def damage(split, number):
            def change(found):
                source = getattr(found, split)
                batches, calls = source.batches, iter(range(1, 99))

                def broken(start, *rest):
                    call = next(calls)
                    for at, batch in enumerate(batches(start, *rest), 1):
                        if number == (start + at if split == "train" else call):
                            raise DataError("cat/7.jpg is damaged; mend it")
                        yield batch

                source.batches = broken
                return found

            served(change)

        return damage

    @pytest.mark.parametrize(
        ("split", "number", "kept"),
        [("train", 8, 7), ("validation", 2, 8), ("validation", 3, 12)],  # evaluations of 8 and 12
    )
    def test_its_state_is_saved_first(
        self, trained, damaged, served, split, number, kept, tmp_path
    ):
        damaged(split, number)
        sentence = f"cat/7.jpg is damaged; mend it; step {kept} is saved; the same command"
        with pytest.raises(TrainingError, match=sentence):
            loop.train_and_evaluate(trained.config, str(tmp_path))
        assert steps_of(tmp_path)[-1] == kept
        served(lambda found: found)
        # The advice to skip damaged records may be taken.
        config = tiny_run.config("data.on_error=skip")
        assert loop.train_and_evaluate(config, str(tmp_path)) == trained.final
        assert by_step_and_name(tmp_path).keys() == by_step_and_name(trained.workdir).keys()
        assert_bit_identical(
            final_state(trained.config, tmp_path), final_state(trained.config, trained.workdir)
        )

    def test_at_the_first_step_there_is_nothing_to_save(self, trained, damaged, tmp_path):
        damaged("train", 1)
        with pytest.raises(TrainingError, match="mend it; nothing was lost"):
            loop.train_and_evaluate(trained.config, str(tmp_path))
        assert steps_of(tmp_path) == []
