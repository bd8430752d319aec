"""Phases of a run: what each trains, how fast, with which optimizer state, and going on."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import few_digits  # noqa: F401

from dfs_jax import config as configuration
from dfs_jax import models
from dfs_jax.config import ConfigError
from dfs_jax.distributed import placement
from dfs_jax.surgery import Surgery
from dfs_jax.training import loop, phases
from dfs_jax.training.checkpoint import Checkpointer
from dfs_jax.training.run import prepare
from dfs_jax.training.state import initial_state, restore
from dfs_jax.training.step import make_train_step

LAST_FIRST = "({'share': 0.5, 'trains': 'last'}, {'share': 0.5})"
BACKBONE_FIRST = "({'share': 0.5, 'trains': 'last'}, {'share': 0.5, 'trains': 'exits'})"


def config(*own):
    return tiny_run.config("surgery.partition=False", "optimizer.schedule=cosine", *own)


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


def weights(state):
    return flat({"params": state.params, "batch_stats": state.batch_stats})


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)


def moved(before, after):
    return {name for name in before if not np.array_equal(before[name], after[name])}


def taken(plain, state, first, count):
    """`state` after `count` steps of a run without phases, on the batches from step `first` on."""
    step = make_train_step(plain)
    batches = plain.data.train.batches(first, placement.batch(plain.mesh))
    for _ in range(count):
        state, _ = step(state, next(batches))
    return state


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Workdir of a run of twelve steps in two phases, of which it keeps step 6."""
    workdir = str(tmp_path_factory.mktemp("phases") / "run")
    c = config(f"train.phases={LAST_FIRST}", "train.checkpoint_every=6")
    loop.train_and_evaluate(c, workdir)
    return c, workdir


def test_a_phase_is_a_run_of_its_own(mixed):
    c, workdir = mixed
    half = "train.steps=6", "train.log_every=3"
    alone = prepare(config(*half, "objective.exit_weights=(0.0,1.0)", "train.freeze=('^heads_0',)"))
    first = taken(alone, initial_state(alone), 0, 6)
    assert_same(weights(restore(prepare(c), workdir, "6")[1]), weights(first))

    together = prepare(config(*half))
    fresh = jax.jit(together.optimizer.init)(first.params)  # without the first phase's momentum
    second = taken(together, first.replace(opt_state=fresh), 6, 6)
    assert_same(weights(restore(prepare(c), workdir)[1]), weights(second))


def test_the_schedule_begins_anew(mixed):
    lines = map(json.loads, Path(mixed[1], "metrics.jsonl").read_text().splitlines())
    found = [(line["step"], line.get("train/learning_rate")) for line in lines]
    rates = {step: rate for step, rate in found if rate is not None}
    cosine = {s: 0.05 * 0.5 * (1 + np.cos(np.pi * ((s - 1) % 6) / 6)) for s in rates}
    assert rates == pytest.approx(cosine)
    assert len(rates) == 6


@pytest.mark.parametrize("at", [6, 8])
def test_a_run_goes_on_at_the_border_of_phases_and_within_one(mixed, at, tmp_path, monkeypatch):
    c, workdir = mixed
    c = c.copy_and_resolve_references()
    c.train.checkpoint_every = 2
    save = Checkpointer.save

    def ending(self, step, *rest):
        save(self, step, *rest)
        if step == at:
            self.wait()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", ending)
        with pytest.raises(KeyboardInterrupt):
            loop.train_and_evaluate(c, str(tmp_path))
    loop.train_and_evaluate(c, str(tmp_path))
    got, wanted = (restore(prepare(c), place)[1] for place in (str(tmp_path), workdir))
    assert_same(flat(got), flat(wanted))


def test_a_damaged_checkpoint_is_replaced_by_one_of_an_earlier_phase(mixed, tmp_path):
    c, workdir = mixed
    shutil.copytree(workdir, tmp_path / "run")
    for file in (tmp_path / "run/checkpoints/12").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    loop.train_and_evaluate(c, str(tmp_path / "run"))
    got, wanted = (restore(prepare(c), str(place))[1] for place in (tmp_path / "run", workdir))
    assert_same(flat(got), flat(wanted))


def test_exits_learn_on_a_backbone_that_stays(tmp_path):
    c = config(f"train.phases={BACKBONE_FIRST}", "train.checkpoint_every=6")
    loop.train_and_evaluate(c, str(tmp_path))
    run = prepare(c)
    before, middle, end = (
        weights(state)
        for state in (
            initial_state(run),
            restore(run, str(tmp_path), "6")[1],
            restore(run, str(tmp_path))[1],
        )
    )
    exit_1 = {name for name in before if name.startswith("params/heads_0/")}
    assert moved(before, middle) == before.keys() - exit_1
    assert moved(middle, end) == exit_1


def test_what_goes_on_is_one_run(tmp_path):
    c = config("train.phases=({'share': 0.25}, {'share': 0.75, 'goes_on': True})")
    plain = config()
    for name, chosen in (("phases", c), ("plain", plain)):
        loop.train_and_evaluate(chosen, str(tmp_path / name))
    got = restore(prepare(c), str(tmp_path / "phases"))[1]
    wanted = restore(prepare(plain), str(tmp_path / "plain"))[1]
    assert_same(weights(got), weights(wanted))


def test_rates_multiply_updates():
    slow = prepare(config("train.phases=({'share': 1, 'rates': (('^heads_0', 0.25),)},)"))
    plain = prepare(config())
    start = weights(initial_state(plain))
    fast, slow = (weights(taken(run, initial_state(run), 0, 1)) for run in (plain, slow.taking(0)))
    for name, before in start.items():
        factor = 0.25 if name.startswith("params/heads_0") else 1.0
        np.testing.assert_allclose(
            slow[name] - before, factor * (fast[name] - before), rtol=1e-3, atol=1e-7, err_msg=name
        )


def test_surgery_objective_and_optimizer_of_a_phase():
    run = prepare(
        tiny_run.config(
            "train.phases=({'share': 0.5}, {'share': 0.25, 'surgery': {'partition': False}, "
            "'goes_on': True}, {'share': 0.25, 'objective': {'label_smoothing': 0.1}, "
            "'optimizer': {'learning_rate': 0.01, 'schedule': 'constant'}})"
        )
    )
    first, second, third = run.phases
    assert [phase.first_step for phase in run.phases] == [0, 6, 9]
    assert [phase.network.surgery.partition for phase in run.phases] == [True, False, True]
    assert first.schedule(8) == second.schedule(8)
    assert third.schedule(9) == third.schedule(11) == pytest.approx(0.01)
    assert [phase.objective.label_smoothing for phase in run.phases] == [0, 0, 0.1]
    assert [run.taking(step) for step in (0, 5, 6, 8, 9, 11)] == [
        first, first, second, second, third, third,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ("({'share': 0.5},)", "the shares of all phases add up to 0.5, not to 1"),
        ("({'trains': 'last'},)", "phase 1: share is missing"),
        ("({'share': 2},)", r"phase 1: share must lie in \(0, 1\], got 2"),
        ("({'share': 1, 'train': 'last'},)", "phase 1: train: .* did you mean 'trains'"),
        ("({'share': 1, 'trains': 'first'},)", "phase 1: trains must be one of all, last, exits"),
        ("({'share': 1, 'freeze': '^heads'},)", "phase 1: freeze must be a tuple of texts"),
        ("({'share': 1, 'freeze': ('^nose',)},)", "phase 1.*'\\^nose' is in the path of no"),
        ("({'share': 1, 'rates': (('heads', -1),)},)", "phase 1: rates must be pairs"),
        ("({'share': 1, 'surgery': {'bet': 1}},)", "phase 1: surgery.bet: .*'beta'"),
        ("({'share': 1, 'surgery': {'beta': 2.0}},)", r"phase 1: .*beta"),
        ("({'share': 1, 'optimizer': {'learning_rate': -1.0}},)", "phase 1: .*0 or more"),
        ("({'share': 1, 'goes_on': True},)", "phase 1: goes_on is for later phases"),
        ("({'share': 0.5}, {'share': 0.5, 'optimizer': {'momentum': 0.0}})", "phase 2: its optimi"),
        ("({'share': 0.99}, {'share': 0.01})", "phase 2: a share of 0.01 of 12 steps is no step"),
        ("({'share': 1, 'surgery': {'referencing': False, 'partition': True}},)", "answer other"),
        ("(1,)", "must be a tuple of dictionaries"),
    ],
)
def test_a_phase_that_cannot_be_is_refused(entries, told):
    with pytest.raises(ConfigError, match=told) as refused:
        prepare(config(f"train.phases={entries}"))
    assert "train.phases" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_method_with_phases_of_its_own_has_no_others():
    with pytest.raises(ConfigError, match="meta_gf has phases of its own"):
        prepare(config("gradients.name=meta_gf", "train.phases=({'share': 1},)"))


def test_phases_are_kept_in_the_saved_configuration():
    c = config("train.phases=({'share': 1, 'rates': (('^heads_0', 0.5),), 'freeze': ('heads',)},)")
    again = configuration.from_json(configuration.to_json(c))
    assert again.train.phases == c.train.phases
    assert not configuration.differences(c, again)


@pytest.mark.parametrize(
    ("name", "side", "options"),
    [
        ("msdnet_digits", 8, {}),
        ("resnet18_cifar100", 8, {"width": 4}),
        ("vit_tiny_patch16", 32, {}),
        ("vgg7_cifar100", 8, {"widths": ((4,), (4,))}),
    ],
)
def test_what_only_early_exits_have_is_found_in_any_network(name, side, options):
    network = models.create_model(name, num_classes=3, surgery=Surgery(partition=False), **options)
    images = jax.ShapeDtypeStruct((2, side, side, 3), np.float32)
    params = jax.eval_shape(lambda x: network.init(jax.random.key(0), x), images)["params"]
    backbone = phases.kept(phases.Phase(share=1.0, trains="exits"), network, images)
    others = phases.kept(phases.Phase(share=1.0, trains="last"), network, images)
    stays, waits = (phases.freeze.chosen(patterns, params) for patterns in (backbone, others))
    assert all(a != b for a, b in zip(*map(jax.tree.leaves, (stays, waits)), strict=True))
    last = network.num_exits - 1
    for module, chosen in waits.items():
        own = module.startswith(("exits_", "heads_")) and not module.endswith(f"_{last}")
        assert all(leaf == own for leaf in jax.tree.leaves(chosen)), module


@pytest.mark.parametrize("word", ["mixed", "disjoint"])
def test_the_words_are_known_everywhere(word, request):
    for name in ("digits", "double_digits", "cifar100", "fashion_mnist", "imagenet"):
        c = configuration.load(f"{request.config.rootpath}/configs/{name}.py:{word}")
        trained = ["last", {"mixed": "all", "disjoint": "exits"}[word]]
        assert [phase.trains for phase in phases.from_config(c)] == trained
        assert not c.surgery.partition
