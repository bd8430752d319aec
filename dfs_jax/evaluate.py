"""Evaluation of every exit: exact counts over a whole split, and the command for a trained run.

    python -m dfs_jax.evaluate --workdir DIR [--step latest|best|N] [--out DIR]
        [--score max_softmax|margin|entropy|patience] [--published NAME]
        [--budget COST | --accuracy A | --risk E --confidence D] [--beside DIR …]

Every example counts exactly once, on any number of devices and hosts: the last batch is padded
and masked, and counts are integers added on the host. The command measures, on the test split,

    anytime       accuracy of each exit and of their ensemble, against cost
    budgeted      early exit by threshold at 40 budgets, fitted on the validation split
    calibration   whether confidences are probabilities, before and after a temperature

shows what training has measured,

    conflict      angles between the exits' gradients, beside those of other runs (--beside DIR …)

and writes anytime.csv, budgeted.csv, calibration.csv, conflict.csv, evaluation.json, plots of the
four, and budgets.json: thresholds for any cost or accuracy (`early_exit.budget.family`). With a
target it also writes the thresholds that meet it to thresholds.json: a mean cost per image
(--budget 100e6 multiply-adds), a validation accuracy in [0, 1], or an accuracy at most E below the
full network's with probability D. Without a validation split there are no thresholds and no
temperatures; with `--split validation` they are shown on the very images they were fitted to.
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax import command, metrics
from dfs_jax.config import ConfigError
from dfs_jax.data.pipeline import EvalSource
from dfs_jax.early_exit import budget, calibration, confidence, risk
from dfs_jax.early_exit.budget import Thresholds
from dfs_jax.models import MultiExit

Variables = Any  # {"params": …, "batch_stats": …}


def counter(
    network: MultiExit, everywhere: jax.sharding.NamedSharding
) -> Callable[..., metrics.ExitCounts]:
    """The compiled function (variables, batch) -> counts of one masked batch."""

    def count(variables, batch):
        outputs = network.apply(variables, batch["image"], train=False)
        return metrics.count_batch(outputs.logits, batch["label"], batch["mask"])

    return jax.jit(count, out_shardings=everywhere)


def evaluate(
    count: Callable[..., metrics.ExitCounts],
    variables: Variables,
    source: EvalSource,
    sharding: jax.sharding.NamedSharding,
) -> metrics.ExitCounts:
    """Counts over every example of `source`, once each, as host integers and floats."""
    return metrics.total(_one_behind(count, variables, source, sharding))


class Answers(NamedTuple):
    """What every exit says about every example of a split: N exits, B examples, on the host."""

    counts: metrics.ExitCounts
    labels: np.ndarray  # (B,) int32
    logits: np.ndarray  # (N, B, K)
    confidences: np.ndarray  # (N, B) of the score that was asked for
    classes: np.ndarray  # (N, B, min(5, K)) int32, the largest logits' first

    @property
    def correct(self) -> np.ndarray:
        """Whether each exit's answer is right, (N, B)."""
        return self.classes[..., 0] == self.labels

    @property
    def correct5(self) -> np.ndarray | None:
        """Whether the label is among the first five, (N, B); None for five classes or fewer."""
        if self.logits.shape[-1] <= 5:
            return None
        return np.any(self.classes == self.labels[:, None], axis=-1)


def answerer(
    network: MultiExit, score: str, everywhere: jax.sharding.NamedSharding
) -> Callable[..., Any]:
    """The compiled function (variables, batch) -> counts and all answers of one masked batch."""

    def answer(variables, batch):
        logits = network.apply(variables, batch["image"], train=False).logits
        counts = metrics.count_batch(logits, batch["label"], batch["mask"])
        stacked = jnp.stack(logits)
        classes = jax.lax.top_k(stacked, min(5, stacked.shape[-1]))[1]
        confidences = [
            confidence.score(score, z, previous_predictions=classes[:i, :, 0])
            for i, z in enumerate(logits)
        ]
        examples = (batch["label"], stacked, jnp.stack(confidences), classes)
        return counts, batch["mask"], examples

    return jax.jit(answer, out_shardings=everywhere)


def answers(
    answer: Callable[..., Any],
    variables: Variables,
    source: EvalSource,
    sharding: jax.sharding.NamedSharding,
) -> Answers:
    """The answers to every example of `source`, in its order.

    All stay in memory: 1 GB for 50,000 images, 1,000 classes and 5 exits.
    """
    counts, kept = [], []
    for batch_counts, mask, (labels, *by_exit) in _one_behind(answer, variables, source, sharding):
        counts.append(batch_counts)
        mask = jax.device_get(mask).astype(bool)
        kept.append([jax.device_get(labels)[mask], *(jax.device_get(x)[:, mask] for x in by_exit)])
    labels, *by_exit = zip(*kept, strict=True)
    return Answers(
        metrics.total(counts), np.concatenate(labels), *(np.concatenate(x, 1) for x in by_exit)
    )


def _one_behind(compiled, variables, source, sharding) -> Iterator[Any]:
    """Results of all batches, each handed out when its successor runs.

    So fetching a result never stalls the device, and at most two batches are in flight.
    """
    waiting = None
    for batch in source.batches(sharding):
        running = compiled(variables, batch)
        if waiting is not None:
            yield waiting
        waiting = running
    yield waiting


# The command.


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the evaluation command with arguments `argv`."""
    parser = command.parser(__doc__)
    command.add_workdir(parser)
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--step", default="latest", metavar="latest|best|N", help="checkpoint")
    parser.add_argument("--out", metavar="DIR", help="where results go; default: the workdir")
    parser.add_argument(
        "--score", default="max_softmax", choices=confidence.names(), help="what thresholds compare"
    )
    parser.add_argument("--published", metavar="NAME", help="published results to plot as well")
    parser.add_argument(
        "--beside", nargs="+", default=(), metavar="DIR", help="workdirs to compare conflict with"
    )
    target = parser.add_argument_group("thresholds for a target")
    target.add_argument("--budget", type=float, metavar="COST", help="multiply-adds per image")
    target.add_argument("--accuracy", type=float, metavar="A", help="on validation, in [0, 1]")
    target.add_argument("--risk", type=float, metavar="E", help="loss of accuracy, in (0, 1)")
    target.add_argument("--confidence", type=float, metavar="D", help="probability of that")
    return command.run(parser, argv, lambda arguments, _: _evaluate_workdir(arguments))


def _evaluate_workdir(arguments: argparse.Namespace) -> None:
    from dfs_jax import (
        conflict_report,
        evaluation_report,
        experiment,
        flops,
        published,
        report,
        sharding,
        train,
    )

    _check(arguments)
    overlay = None
    if arguments.published:
        with _refusals("--published"):
            overlay = published.results(arguments.published)
    conflict = _conflict(arguments)
    run = experiment.prepare(command.saved_config(arguments.workdir))
    held_out = run.data.validation
    source = run.data.test if arguments.split == "test" else held_out
    if source is None:
        raise ConfigError("--split: this run has no validation split")
    if held_out is None and _target(arguments):
        raise ConfigError(
            f"--{_target(arguments)}: thresholds are fitted on a validation split, and this run "
            "has none; train with data.validation_size above 0"
        )
    costs = flops.exit_costs(run.network, run.data.spec.image_shape).cumulative
    if arguments.budget is not None and arguments.budget < costs[0]:
        raise ConfigError(
            f"--budget: {arguments.budget:.6g} is less than the first exit costs, {costs[0]:.6g}"
        )
    step, state = train.restore(run, arguments.workdir, arguments.step)
    out = evaluation_report.directory(arguments.out or arguments.workdir)

    answer = answerer(run.network, arguments.score, sharding.replicated(run.mesh))
    by_batch = sharding.batch(run.mesh)
    validation = chosen = None
    if held_out is not None:
        validation = answers(answer, state.variables, held_out, by_batch)
        chosen = _thresholds(arguments, validation, costs)
    shown = validation
    if source is not held_out:
        shown = answers(answer, state.variables, source, by_batch)
    results = measure(shown, validation, costs, arguments.score, chosen)

    scores = metrics.summarise(shown.counts, arguments.split)
    print(f"{arguments.split} split, {len(shown.labels)} images, checkpoint of step {step}")
    print(report.final_table(run, scores, arguments.split))
    print(evaluation_report.tables(results), flush=True)
    about = {
        "network": run.config.model.name,
        "data": run.data.spec.name,
        "split": arguments.split,
        "examples": len(shown.labels),
        "step": step,
        "score": arguments.score,
    }
    if jax.process_index() == 0:
        written = evaluation_report.write(out, about, results, overlay)
        if conflict:
            written += conflict_report.write(out, conflict)
        print(f"\nwritten to {out}: {', '.join(written)}")


class Calibration(NamedTuple):
    """How far confidences are probabilities when the logits are divided by temperatures."""

    temperatures: tuple[float, ...]  # (N,)
    reliability: tuple[calibration.Reliability, ...]  # (N,)
    nll: tuple[float, ...]  # (N,) mean cross-entropy in nats


class EarlyExit(NamedTuple):
    """What needed a validation split: temperatures and thresholds. P budgets."""

    examples: int  # of the validation split
    calibrated: Calibration  # with the temperatures fitted there
    values: np.ndarray  # (P, N) thresholds of the budgeted evaluation
    fitted: budget.Outcome  # of these thresholds, where they were fitted
    outcome: budget.Outcome  # of these thresholds, on the split that is shown
    family: tuple[Thresholds, ...]
    chosen: Thresholds | None  # those of the target, if there is one
    chosen_outcome: budget.Outcome | None  # P = 1


class Results(NamedTuple):
    """What the command measures. N exits."""

    counts: metrics.ExitCounts
    costs: tuple[float, ...]  # (N,) multiply-adds per image, cumulative
    trained: Calibration  # as trained: every temperature is 1
    early: EarlyExit | None  # None without a validation split


def measure(
    shown: Answers,
    validation: Answers | None,
    costs: Sequence[float],
    score: str,
    chosen: Thresholds | None = None,
) -> Results:
    """Calibration and early exit of the answers `shown`, with what `validation` has to fit."""
    costs = tuple(costs)
    trained = _calibration(shown, (1.0,) * len(costs))
    if validation is None:
        return Results(shown.counts, costs, trained, None)
    temperatures = tuple(
        calibration.fit_temperature(z, validation.labels) for z in validation.logits
    )
    values = budget.fit(validation.confidences, budget.quotas(len(validation.labels), len(costs)))

    def outcome(of: Answers, values: np.ndarray) -> budget.Outcome:
        return budget.outcome(of.confidences, values, costs, of.correct, of.correct5)

    early = EarlyExit(
        examples=len(validation.labels),
        calibrated=_calibration(shown, temperatures),
        values=values,
        fitted=outcome(validation, values),
        outcome=outcome(shown, values),
        family=budget.family(score, validation.confidences, validation.correct, costs),
        chosen=chosen,
        chosen_outcome=None if chosen is None else outcome(shown, np.array([chosen.values])),
    )
    return Results(shown.counts, costs, trained, early)


def _calibration(shown: Answers, temperatures: tuple[float, ...]) -> Calibration:
    reliability, nll = [], []
    for z, correct, temperature in zip(shown.logits, shown.correct, temperatures, strict=True):
        sure = calibration.max_softmax(z, temperature)
        reliability.append(calibration.reliability(sure, correct))
        nll.append(calibration.negative_log_likelihood(z, shown.labels, temperature))
    return Calibration(temperatures, tuple(reliability), tuple(nll))


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
    from dfs_jax import conflict_report

    command.saved_config(arguments.workdir)  # refuses what is no workdir
    found = {}
    for place in (arguments.workdir, *arguments.beside):
        history = conflict_report.of_workdir(place)
        if history is None and arguments.beside:
            raise ConfigError(
                f"--beside: {place} has no measurements of conflict in its metrics; train with "
                "train.conflict_every above 0"
            )
        if history is not None:
            name = place.rstrip("/").rpartition("/")[2]
            found[place if name in found else name] = history
    return found


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


@contextlib.contextmanager
def _refusals(flag: str) -> Iterator[None]:
    """Turns the ValueErrors of the libraries into ConfigErrors about `flag`."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
