"""The evaluation command on a tiny run: what it measures, writes, prints and refuses."""

import csv
import json
import logging
import os
import shutil

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import few_digits  # noqa: F401

from dfs_jax import evaluate, main
from dfs_jax.distributed import placement
from dfs_jax.early_exit import budget, export
from dfs_jax.early_exit.budget import Thresholds
from dfs_jax.early_exit.bundle import EarlyExit
from dfs_jax.evaluation.answers import answer_split, answerer
from dfs_jax.training.run import prepare
from dfs_jax.training.state import restore

ALWAYS_WRITTEN = {
    "anytime.csv",
    "anytime.png",
    "calibration.csv",
    "evaluation.json",
    "reliability.png",
}
UNVALIDATED = ("data.validation_size=0", "train.steps=1", "train.profile_steps=(2,2)")
WITH_VALIDATION = ALWAYS_WRITTEN | {"budgeted.csv", "budgeted.png", "budgets.json"}


def _train(directory, *own):
    assert main.main(tiny_run.arguments(directory, *own)) == 0
    return directory


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A trained run with a validation split; not to be changed."""
    return _train(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def unvalidated(tmp_path_factory):
    """A trained run without one."""
    return _train(tmp_path_factory.mktemp("run"), *UNVALIDATED)


def _rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def _command(workdir, out, *arguments):
    return evaluate.main(["--workdir", str(workdir), "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def evaluated(workdir, tmp_path_factory):
    """The results of the command without a target."""
    out = tmp_path_factory.mktemp("results") / "new"
    assert _command(workdir, out) == 0
    return out


def _answers(workdir, *own, split="validation", score="max_softmax"):
    run = prepare(tiny_run.config(*own))
    _, state = restore(run, str(workdir))
    answer = answerer(run.network, score, placement.replicated(run.mesh))
    by_batch = placement.batch(run.mesh)
    return run, state, answer_split(answer, state.variables, getattr(run.data, split), by_batch)


def test_answers_are_those_of_every_image_once_in_order_on_any_number_of_devices(workdir):
    run, state, found = _answers(workdir, split="test")
    labels = tiny_run.digits()[1][tiny_run.TRAIN + tiny_run.HELD_OUT :][: tiny_run.TEST]
    np.testing.assert_array_equal(found.labels, labels)
    images = np.concatenate([b["image"] for b in run.data.test.batches()])[: tiny_run.TEST]
    logits = jax.jit(run.network.apply)(state.variables, images).logits
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-5)

    _, _, on_eight = _answers(workdir, "mesh.data=8", split="test")
    np.testing.assert_array_equal(on_eight.labels, labels)
    np.testing.assert_allclose(on_eight.logits, found.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(on_eight.counts.top1, found.counts.top1)


@pytest.mark.parametrize("score", ["max_softmax", "patience"])
def test_answers_agree_with_their_logits_and_counts(workdir, score):
    _, _, found = _answers(workdir, split="test", score=score)
    order = np.argsort(-found.logits, axis=-1, kind="stable")
    np.testing.assert_array_equal(found.classes, order[..., :5])
    np.testing.assert_array_equal(found.correct.sum(1), found.counts.top1)
    np.testing.assert_array_equal(found.correct5.sum(1), found.counts.top5)
    assert int(found.counts.count) == tiny_run.TEST
    if score == "max_softmax":
        powers = np.exp(found.logits.astype(np.float64))
        expected = powers.max(-1) / powers.sum(-1)
        np.testing.assert_allclose(found.confidences, expected, rtol=1e-5)
    else:
        agree = order[1:, :, 0] == order[:-1, :, 0]
        np.testing.assert_array_equal(found.confidences[0], 0)
        np.testing.assert_array_equal(found.confidences[1], agree[0])


def test_a_workdir_that_can_only_be_read_is_evaluated(
    unvalidated, tmp_path, monkeypatch, caplog, capsys
):
    monkeypatch.setattr(os, "access", lambda place, mode: not mode & os.W_OK)
    before = {path: path.stat().st_mtime_ns for path in unvalidated.rglob("*")}
    assert _command(unvalidated, tmp_path / "out") == 0
    assert {path: path.stat().st_mtime_ns for path in unvalidated.rglob("*")} == before
    assert "profile_steps" not in caplog.text  # what training will not do is no matter here
    assert main.main(tiny_run.arguments(unvalidated, *UNVALIDATED)) == 2
    assert f"cannot write to {unvalidated}: no permission" in capsys.readouterr().err


def test_everything_is_written(evaluated):
    assert {path.name for path in evaluated.iterdir()} == WITH_VALIDATION
    for path in evaluated.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_accuracies_are_those_of_training(workdir, evaluated):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    final = {k: v for line in lines for k, v in line.items() if k.startswith("test/")}
    *exits, ensemble = _rows(evaluated / "anytime.csv")
    for i, row in enumerate(exits, 1):
        assert row["exit"] == str(i)
        for column, metric in (("top1", "top1"), ("top5", "top5")):
            assert float(row[column]) == final[f"test/exit{i}/{metric}"]
        assert float(row["nll"]) == pytest.approx(final[f"test/exit{i}/loss"], rel=1e-6)
    assert float(ensemble["top1"]) == final["test/ensemble/top1"]
    document = json.loads((evaluated / "evaluation.json").read_text())
    assert (document["split"], document["examples"], document["step"]) == ("test", 53, 12)
    assert [row["cost"] for row in document["anytime"]] == [float(r["cost"]) for r in exits] + [
        float(ensemble["cost"])
    ]


def test_thresholds_come_from_validation_and_are_applied_to_test(workdir, evaluated):
    _, _, validation = _answers(workdir)
    _, _, test = _answers(workdir, split="test")
    size, num_exits = len(validation.labels), len(validation.logits)
    costs = [float(row["cost"]) for row in _rows(evaluated / "anytime.csv")[:-1]]
    values = budget.fit(validation.confidences, budget.quotas(size, num_exits))
    expected = budget.outcome(test.confidences, values, costs, test.correct, test.correct5)
    rows = _rows(evaluated / "budgeted.csv")
    assert len(rows) == 40
    columns = range(1, num_exits + 1)
    found = np.array([[float(row[f"threshold{i}"]) for i in columns] for row in rows])
    np.testing.assert_array_equal(found, values)
    leaving = np.array([[int(row[f"leave{i}"]) for i in columns] for row in rows])
    np.testing.assert_array_equal(leaving, expected.leaving)
    for column, series in (("cost", expected.cost), ("top1", expected.top1)):
        np.testing.assert_allclose([float(row[column]) for row in rows], series, rtol=1e-12)
    assert leaving.sum() == 40 * tiny_run.TEST


def test_saved_family_serves_any_budget(evaluated):
    saved = json.loads((evaluated / "budgets.json").read_text())
    family = [Thresholds.from_json(entry) for entry in saved]
    costs = [float(row["cost"]) for row in _rows(evaluated / "anytime.csv")]
    assert budget.within(family, costs[0]).expected_cost == costs[0]
    assert budget.within(family, costs[-1]).values == family[-1].values


def test_temperatures_are_fitted_on_validation(evaluated, unvalidated, tmp_path):
    for row in _rows(evaluated / "calibration.csv"):
        assert 0.05 <= float(row["temperature"]) <= 20
        assert 0 <= float(row["ece_calibrated"]) <= 1
    assert _command(unvalidated, tmp_path) == 0
    for row in _rows(tmp_path / "calibration.csv"):
        assert row["temperature"] == row["ece_calibrated"] == ""
        assert 0 <= float(row["ece"]) <= 1


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (["--budget", "1e9"], "a cost of at most 1e+09 per image"),
        (["--accuracy", "0.01", "--score", "entropy"], "an accuracy of at least 0.01"),
        (["--risk", "0.3", "--confidence", "0.9"], "at most 0.3 below the full network's, with"),
    ],
)
def test_thresholds_for_a_target(workdir, tmp_path, capsys, target, words):
    assert _command(workdir, tmp_path, *target) == 0
    thresholds = Thresholds.from_json(json.loads((tmp_path / "thresholds.json").read_text()))
    assert words in thresholds.fitted_for
    assert thresholds.confidence == (target[3] if "--score" in target else "max_softmax")
    printed = capsys.readouterr().out
    assert f"thresholds for {thresholds.fitted_for}" in printed
    document = json.loads((tmp_path / "evaluation.json").read_text())
    assert document["chosen"]["thresholds"] == thresholds.to_json()
    assert sum(document["chosen"]["leaving"]) == tiny_run.TEST


def _json(path):
    return json.loads(path.read_text())


def test_a_directory_holds_the_files_of_one_evaluation(workdir, tmp_path, capsys):
    """What a later one does not write anew is removed, and that is told."""
    assert _command(workdir, tmp_path, "--step", "10", "--budget", "1e9") == 0
    first = _json(tmp_path / "thresholds.json")
    assert first["step"] == 10
    assert first["weights"] == _json(tmp_path / "evaluation.json")["weights"]
    assert "removed" not in capsys.readouterr().out
    (tmp_path / "mine.json").write_text("{}")
    assert _command(workdir, tmp_path) == 0
    told = capsys.readouterr().out
    assert "removed, since an earlier evaluation wrote them: thresholds.json" in told
    assert {p.name for p in tmp_path.iterdir()} == WITH_VALIDATION | {"mine.json"}
    document = _json(tmp_path / "evaluation.json")
    assert (document["step"], document["chosen"], document["warning"]) == (12, None, "")
    stamps = {(t["step"], t["weights"], t["warning"]) for t in _json(tmp_path / "budgets.json")}
    assert stamps == {(12, document["weights"], "")}
    assert document["weights"] != first["weights"]


def test_a_bundle_gets_the_thresholds_of_its_own_checkpoint(workdir, tmp_path, capsys):
    run, bundle = tmp_path / "run", tmp_path / "b"
    shutil.copytree(workdir, run)
    exported = ["--workdir", str(run), "--out", str(bundle), "--batch-size", "1"]
    assert evaluate.main(["--workdir", str(run), "--step", "10", "--budget", "1e9"]) == 0
    chosen = _json(run / "thresholds.json")
    capsys.readouterr()
    assert export.main(exported) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {run / 'thresholds.json'} belongs to step 10, but step 12 is exported; give "
        "--step 10, or fit thresholds to step 12: python -m dfs_jax.evaluate --workdir "
        f"{run} --step 12 and a target (there: a cost of at most 1e+09 per image)"
    )
    assert not bundle.exists()
    # Another run that came to the same number of steps.
    foreign = {**chosen, "weights": "0123456789abcdef"}
    (run / "thresholds.json").write_text(json.dumps(foreign))
    assert export.main([*exported, "--step", "10"]) == 2
    assert "belongs to other weights of step 10; fit anew: python" in capsys.readouterr().err
    (run / "thresholds.json").write_text(json.dumps(chosen))
    assert export.main([*exported, "--step", "10"]) == 0
    manifest = EarlyExit.load(bundle).manifest
    assert manifest["thresholds"] == chosen
    assert {t["weights"] for t in manifest["family"]} == {chosen["weights"]}
    assert manifest["weights"] == chosen["weights"]


def test_thresholds_on_images_that_were_trained_on_carry_a_warning(
    unvalidated, tmp_path, capsys, caplog
):
    """In every output: a run without a validation split was where this one started."""
    run, out = tmp_path / "run", tmp_path / "out"
    _train(run, "train.steps=1", f"train.init_from={unvalidated}")
    capsys.readouterr()
    assert evaluate.main(["--workdir", str(run), "--risk", "0.3", "--confidence", "0.9"]) == 0
    warning = _json(run / "evaluation.json")["warning"]
    assert warning.startswith("thresholds and temperatures may promise too much: they rest on ")
    assert f"weights of {unvalidated}, which held out other images" in warning
    assert f"warning: {warning}" in capsys.readouterr().out
    assert _json(run / "thresholds.json")["warning"] == warning
    assert {t["warning"] for t in _json(run / "budgets.json")} == {warning}
    for name in ("budgeted.csv", "calibration.csv"):
        assert {row["warning"] for row in _rows(run / name)} == {warning}
    exported = ["--workdir", str(run), "--out", str(out), "--batch-size", "1"]
    assert export.main(exported) == 0
    assert f"warning: {warning}" in capsys.readouterr().out
    with caplog.at_level(logging.WARNING):
        loaded = EarlyExit.load(out)
    assert f"{out}: {warning}" in caplog.text
    assert {t.warning for t in (loaded.thresholds, *loaded.family)} == {warning}


def test_without_validation_the_rest_is_done_and_the_lack_is_told(unvalidated, tmp_path, capsys):
    assert _command(unvalidated, tmp_path, "--published", "cifar100_resnet18") == 0
    assert {path.name for path in tmp_path.iterdir()} == ALWAYS_WRITTEN
    printed = capsys.readouterr().out
    assert "no validation split (data.validation_size is 0)" in printed
    assert json.loads((tmp_path / "evaluation.json").read_text())["budgeted"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "-1"], "--budget is a positive cost per image, got -1"),
        (["--budget", "nan"], "--budget is a positive cost per image, got nan"),
        (["--budget", "100"], "--budget: 100 is less than the first exit costs"),
        (["--accuracy", "80"], "--accuracy is a share between 0 and 1, got 80"),
        (["--risk", "0.1"], "--risk E and --confidence D go together"),
        (["--confidence", "0.9"], "--risk E and --confidence D go together"),
        (["--risk", "0.1", "--confidence", "95"], "--confidence must lie between 0 and 1, got 95"),
        (["--risk", "0.01", "--confidence", "0.99"], "--risk: 37 validation images cannot show"),
        (["--budget", "1e6", "--accuracy", "0.5"], "--budget and --accuracy are two targets"),
        (["--published", "cifar"], "--published: unknown published results 'cifar'; known: cif"),
        (["--step", "7"], "has no checkpoint of step 7"),
    ],
)
def test_refusals(workdir, tmp_path, capsys, arguments, message):
    """One sentence, status 2, and no file written."""
    assert _command(workdir, tmp_path, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.strip().splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_refusals_of_directories(workdir, unvalidated, tmp_path, capsys):
    assert _command(unvalidated, tmp_path, "--budget", "1e9") == 2
    assert "--budget: thresholds are fitted on a validation split" in capsys.readouterr().err
    assert _command(unvalidated, tmp_path, "--split", "validation") == 2
    assert "--split: this run has no validation split" in capsys.readouterr().err
    file = tmp_path / "file"
    file.write_text("mine")
    assert _command(workdir, file) == 2
    assert f"--out: cannot write to {file}" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert evaluate.main(["--workdir", str(tmp_path / "nothing")]) == 2
    assert "holds no run" in capsys.readouterr().err
