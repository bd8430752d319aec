"""Evaluation of a trained workdir: what `python -m dfs_jax.evaluate` does with its flags."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from dfs_jax.config import ConfigError, refusals
from dfs_jax.distributed import placement
from dfs_jax.early_exit import budget, risk
from dfs_jax.early_exit.budget import Thresholds
from dfs_jax.evaluation import budgeted, conflict, published, report
from dfs_jax.evaluation.answers import SplitAnswers, answer_split, answerer
from dfs_jax.models.cost import exit_costs
from dfs_jax.training import lineage, progress
from dfs_jax.training import workdir as workdirs
from dfs_jax.training.counts import summarise
from dfs_jax.training.digest import fingerprint
from dfs_jax.training.run import Run, prepare
from dfs_jax.training.state import TrainState, restore

_SCORE = "max_softmax"  # what thresholds compare, where nobody says


def evaluate_workdir(arguments: argparse.Namespace) -> None:
    """Measure, print and write what `arguments` ask for. Raises ConfigError, nothing written."""
    _check(arguments)
    overlay = None
    if arguments.published:
        with refusals("--published"):
            overlay = published.results(arguments.published)
    config = workdirs.saved_config(arguments.workdir, arguments.data_dir)
    histories = _conflict(arguments)
    run = prepare(config, arguments.workdir)
    costs = exit_costs(run.network, run.data.spec.batch(1)).cumulative
    _check_run(arguments, run, costs)
    step, state = restore(run, arguments.workdir, arguments.step)
    out = report.directory(arguments.out or arguments.workdir)
    fitted = _fitted(run, arguments.workdir, step, state)

    answer = answerer(run.network, arguments.score, placement.replicated(run.mesh))
    by_batch = placement.batch(run.mesh)
    validation = chosen = None
    if run.data.validation is not None:
        validation = answer_split(answer, state.variables, run.data.validation, by_batch)
        chosen = _thresholds(arguments, validation, costs)
        chosen = chosen and dataclasses.replace(chosen, **fitted)
    shown = validation
    if arguments.split == "test":
        shown = answer_split(answer, state.variables, run.data.test, by_batch)
    results = report.measure(shown, validation, costs, arguments.score, fitted, chosen)

    scores = summarise(shown.counts, arguments.split)
    print(f"{arguments.split} split, {len(shown.labels)} images, checkpoint of step {step}")
    print(progress.final_table(run, scores, arguments.split))
    print(report.tables(results), flush=True)
    about = {
        "network": run.config.model.name,
        "data": run.data.spec.name,
        "split": arguments.split,
        "examples": len(shown.labels),
        "score": arguments.score,
        **fitted,
    }
    if jax.process_index() == 0:
        written, removed = report.write(out, about, results, overlay, histories)
        print(f"\nwritten to {out}: {', '.join(written)}")
        if removed:
            print(f"removed, since an earlier evaluation wrote them: {', '.join(removed)}")


def budgeted_rows(run: Run, workdir: str) -> list[dict[str, Any]] | None:
    """The lines of budgeted.csv: the newest checkpoint's early exit on the test split.

    None without a validation split. Raises ConfigError if there is no checkpoint.
    """
    if run.data.validation is None:
        return None
    step, state = restore(run, workdir)
    answer = answerer(run.network, _SCORE, placement.replicated(run.mesh))
    test, validation = (
        answer_split(answer, state.variables, split, placement.batch(run.mesh))
        for split in (run.data.test, run.data.validation)
    )
    costs = exit_costs(run.network, run.data.spec.batch(1)).cumulative
    fitted = _fitted(run, workdir, step, state)
    return budgeted.rows(budgeted.measure(test, validation, costs, _SCORE, fitted))


def _fitted(run: Run, workdir: str, step: int, state: TrainState) -> dict[str, Any]:
    """What thresholds say about the checkpoint that they are fitted to."""
    warning = "" if run.data.validation is None else lineage.warning(run.config, workdir)
    return {"step": step, "weights": fingerprint(state.variables), "warning": warning}


def _thresholds(arguments, validation: SplitAnswers, costs: Sequence[float]) -> Thresholds | None:
    """The thresholds that meet the target, if there is one; raises ConfigError if none do."""
    target = _target(arguments)
    if target is None:
        return None
    given = arguments.score, validation.confidences, validation.correct, costs
    with refusals(f"--{target}"):
        if target == "risk":
            return risk.thresholds(
                *given,
                num_classes=validation.logits.shape[-1],
                risk=arguments.risk,
                probability=arguments.confidence,
            )
        family = budget.family(*given)
        if target == "budget":
            return budget.within(family, arguments.budget)
        return budget.reaching(family, arguments.accuracy)


def _conflict(arguments: argparse.Namespace) -> dict[str, Any]:
    """Histories by name of this run and those beside it; {} if this one measured none.

    Raises ConfigError if one of the others did not.
    """
    found = {}
    for place in (arguments.workdir, *arguments.beside):
        history = conflict.of_workdir(place)
        if history is not None:
            name = place.rstrip("/").rpartition("/")[2]
            found[place if name in found else name] = history
        elif arguments.beside:
            raise ConfigError(
                f"--beside: {place} has no measurements of conflict in its metrics; train with "
                "train.conflict_every above 0"
            )
    return found


def _target(arguments: argparse.Namespace) -> str | None:
    given = [t for t in ("budget", "accuracy", "risk") if getattr(arguments, t) is not None]
    if len(given) > 1:
        raise ConfigError(f"--{given[0]} and --{given[1]} are two targets; give one")
    return given[0] if given else None


def _check_run(arguments: argparse.Namespace, run: Run, costs: Sequence[float]) -> None:
    """Refuse what this run cannot give."""
    if run.data.validation is None:
        if arguments.split == "validation":
            raise ConfigError("--split: this run has no validation split")
        if target := _target(arguments):
            raise ConfigError(
                f"--{target}: thresholds are fitted on a validation split, and this run has none; "
                "train with data.validation_size above 0"
            )
    if arguments.budget is not None and arguments.budget < costs[0]:
        raise ConfigError(
            f"--budget: {arguments.budget:.6g} is less than the first exit costs, {costs[0]:.6g}"
        )


def _check(arguments: argparse.Namespace) -> None:
    """Refuse targets that cannot be meant, before anything is read."""
    _target(arguments)
    if (arguments.risk is None) != (arguments.confidence is None):
        raise ConfigError("--risk E and --confidence D go together: a loss and its probability")
    if arguments.budget is not None and not 0 < arguments.budget < math.inf:
        raise ConfigError(f"--budget is a positive cost per image, got {arguments.budget:g}")
    if arguments.accuracy is not None and not 0 <= arguments.accuracy <= 1:
        raise ConfigError(f"--accuracy is a share between 0 and 1, got {arguments.accuracy:g}")
    for flag in ("risk", "confidence"):
        value = getattr(arguments, flag)
        if value is not None and not 0 < value < 1:
            raise ConfigError(f"--{flag} must lie between 0 and 1, got {value:g}")
