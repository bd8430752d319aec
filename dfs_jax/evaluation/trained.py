"""Evaluation of a trained workdir: what `python -m dfs_jax.evaluate` does with its flags."""

import argparse
import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from dfs_jax.config import ConfigError
from dfs_jax.distributed import placement
from dfs_jax.early_exit import budget, risk
from dfs_jax.early_exit.budget import Thresholds
from dfs_jax.evaluation import conflict, published, report
from dfs_jax.evaluation.answers import Answers, answer_split, answerer
from dfs_jax.evaluation.results import measure
from dfs_jax.models.cost import exit_costs
from dfs_jax.training import progress
from dfs_jax.training import workdir as workdirs
from dfs_jax.training.counts import summarise
from dfs_jax.training.run import prepare
from dfs_jax.training.state import restore


def evaluate_workdir(arguments: argparse.Namespace) -> None:

    _check(arguments)
    overlay = None
    if arguments.published:
        with _refusals("--published"):
            overlay = published.results(arguments.published)
    histories = _conflict(arguments)
    run = prepare(workdirs.saved_config(arguments.workdir))
    held_out = run.data.validation
    source = run.data.test if arguments.split == "test" else held_out
    if source is None:
        raise ConfigError("--split: this run has no validation split")
    if held_out is None and _target(arguments):
        raise ConfigError(
            f"--{_target(arguments)}: thresholds are fitted on a validation split, and this run "
            "has none; train with data.validation_size above 0"
        )
    costs = exit_costs(run.network, run.data.spec.image_shape).cumulative
    if arguments.budget is not None and arguments.budget < costs[0]:
        raise ConfigError(
            f"--budget: {arguments.budget:.6g} is less than the first exit costs, {costs[0]:.6g}"
        )
    step, state = restore(run, arguments.workdir, arguments.step)
    out = report.directory(arguments.out or arguments.workdir)

    answer = answerer(run.network, arguments.score, placement.replicated(run.mesh))
    by_batch = placement.batch(run.mesh)
    validation = chosen = None
    if held_out is not None:
        validation = answer_split(answer, state.variables, held_out, by_batch)
        chosen = _thresholds(arguments, validation, costs)
    shown = validation
    if source is not held_out:
        shown = answer_split(answer, state.variables, source, by_batch)
    results = measure(shown, validation, costs, arguments.score, chosen)

    scores = summarise(shown.counts, arguments.split)
    print(f"{arguments.split} split, {len(shown.labels)} images, checkpoint of step {step}")
    print(progress.final_table(run, scores, arguments.split))
    print(report.tables(results), flush=True)
    about = {
        "network": run.config.model.name,
        "data": run.data.spec.name,
        "split": arguments.split,
        "examples": len(shown.labels),
        "step": step,
        "score": arguments.score,
    }
    if jax.process_index() == 0:
        written = report.write(out, about, results, overlay)
        if histories:
            written += conflict.write(out, histories)
        print(f"\nwritten to {out}: {', '.join(written)}")


def _thresholds(arguments, validation: Answers, costs: Sequence[float]) -> Thresholds | None:
    """The thresholds that meet the target, if there is one; raises ConfigError if none do."""
    target, correct = _target(arguments), validation.correct
    with _refusals(f"--{target}"):
        if target == "risk":
            return risk.thresholds(
                arguments.score,
                validation.confidences,
                correct,
                costs,
                num_classes=validation.logits.shape[-1],
                risk=arguments.risk,
                probability=arguments.confidence,
            )
        if target is None:
            return None
        family = budget.family(arguments.score, validation.confidences, correct, costs)
        if target == "budget":
            return budget.within(family, arguments.budget)
        return budget.reaching(family, arguments.accuracy)


def _conflict(arguments: argparse.Namespace) -> dict[str, Any]:
    """Histories by name of this run and those beside it; {} if this one measured none.

    Raises ConfigError if one of the others did not.
    """
    workdirs.saved_config(arguments.workdir)  # refuses what is no workdir
    found = {}
    for place in (arguments.workdir, *arguments.beside):
        history = conflict.of_workdir(place)
        if history is None and arguments.beside:
            raise ConfigError(
                f"--beside: {place} has no measurements of conflict in its metrics; train with "
                "train.conflict_every above 0"
            )
        if history is not None:
            name = place.rstrip("/").rpartition("/")[2]
            found[place if name in found else name] = history
    return found


@contextlib.contextmanager
def _refusals(flag: str) -> Iterator[None]:
    """Turns the ValueErrors of the libraries into ConfigErrors about `flag`."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from error


def _target(arguments: argparse.Namespace) -> str | None:
    given = [t for t in ("budget", "accuracy", "risk") if getattr(arguments, t) is not None]
    if len(given) > 1:
        raise ConfigError(f"--{given[0]} and --{given[1]} are two targets; give one")
    return given[0] if given else None


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
