"""What the evaluation command shows and writes, put together from the rooms beside this one.

Costs are multiply-adds per image by the published convention (`models/cost.py`), accuracies shares
in [0, 1].
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from dfs_jax.config import ConfigError
from dfs_jax.early_exit.budget import Thresholds
from dfs_jax.evaluation import anytime, budgeted, calibration, conflict, plots
from dfs_jax.evaluation.answers import SplitAnswers
from dfs_jax.evaluation.budgeted import Budgeted
from dfs_jax.evaluation.calibration import Calibration
from dfs_jax.evaluation.conflict import History
from dfs_jax.evaluation.published import Published
from dfs_jax.training.counts import ExitCounts
from dfs_jax.writing.files import json_text, write_whole
from dfs_jax.writing.tables import csv_table

_NO_VALIDATION = (
    "no validation split (data.validation_size is 0), so no thresholds and no temperatures can be "
    "fitted: early exit by threshold is left out, and budgeted.csv is not written"
)
_DOUBTFUL = "fitted on images that the weights may have been trained on"  # in pictures

# All that an evaluation may leave. The document comes last: where it is, the others are whole.
_DOCUMENT = "evaluation.json"
_FILES = ("anytime.csv", "anytime.png", "budgeted.csv", "budgeted.png", "budgets.json")
_FILES += ("calibration.csv", "reliability.png", "thresholds.json", "conflict.csv", "conflict.png")


class Results(NamedTuple):
    """What the command measures. N exits."""

    counts: ExitCounts
    costs: tuple[float, ...]  # (N,) multiply-adds per image, cumulative
    trained: Calibration  # as trained: every temperature is 1
    calibrated: Calibration | None  # with the fitted temperatures; None without a validation split
    budgeted: Budgeted | None  # likewise


def measure(
    shown: SplitAnswers,
    validation: SplitAnswers | None,
    costs: Sequence[float],
    score: str,
    fitted: Mapping[str, Any],
    chosen: Thresholds | None = None,
) -> Results:
    """Calibration and early exit of the answers `shown`, with what `validation` has to fit.

    See `budgeted.measure` for the arguments.
    """

    def calibrated(temperatures: Sequence[float]) -> Calibration:
        return calibration.measure(shown.logits, shown.labels, shown.correct, temperatures)

    trained = calibrated((1.0,) * len(costs))
    if validation is None:
        return Results(shown.counts, tuple(costs), trained, None, None)
    temperatures = [calibration.fit_temperature(z, validation.labels) for z in validation.logits]
    early = budgeted.measure(shown, validation, costs, score, fitted, chosen)
    return Results(shown.counts, tuple(costs), trained, calibrated(temperatures), early)


def tables(results: Results) -> str:
    """Calibration and early exit, for people."""
    parts = [calibration.table(_calibration_rows(results))]
    if (early := results.budgeted) is None:
        parts.append(_NO_VALIDATION)
    else:
        parts.append(budgeted.table(early))
        if early.chosen is not None:
            parts.append(budgeted.chosen_lines(early.chosen, early.chosen_outcome))
        if early.warning:
            parts.append(f"warning: {early.warning}")
    return "\n" + "\n\n".join(parts)


def directory(path: str) -> epath.Path:
    """`path`, made if need be. Raises ConfigError if that cannot be."""
    try:
        made = epath.Path(path)
        made.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: cannot write to {path}: {error.strerror}") from error
    return made


def write(
    out: epath.Path,
    about: Mapping[str, Any],
    results: Results,
    overlay: Published | None,
    histories: Mapping[str, History],
) -> tuple[list[str], list[str]]:
    """Makes `out` hold the files of this evaluation and of no other; names written and removed.

    `about` says what was evaluated: network, data, split, examples, score, step and weights.
    """
    files = _files(about, results, overlay)
    if histories:
        files |= conflict.files(histories)
    removed = [name for name in _FILES if name not in files and (out / name).exists()]
    for name in (*removed, _DOCUMENT):
        (out / name).unlink(missing_ok=True)
    files[_DOCUMENT] = json_text(_document(about, results), indent=2)
    for name, content in files.items():
        write_whole(out / name, content)
    return list(files), removed


def _files(
    about: Mapping[str, Any], results: Results, overlay: Published | None
) -> dict[str, str | bytes]:
    """The tables and pictures of an evaluation by their names."""
    counts, costs, trained, calibrated, early = results
    top1 = anytime.accuracies(counts)
    title = f"{about['network']} on {about['data']}, {about['split']} split"
    fitted = f"{title}\n{_DOUBTFUL}" if early and early.warning else title
    files: dict[str, str | bytes] = {
        "anytime.csv": csv_table(anytime.rows(counts, costs)),
        "calibration.csv": csv_table(_calibration_rows(results)),
        "anytime.png": plots.anytime(title, costs, top1, anytime.ensemble(counts), overlay),
        "reliability.png": plots.reliability(fitted, trained, calibrated),
    }
    if early:
        outcome = early.outcome
        files["budgeted.csv"] = csv_table(budgeted.rows(early))
        files["budgeted.png"] = plots.budgeted(
            fitted, costs, top1, outcome.cost, outcome.top1, budgeted.shares(outcome), overlay
        )
        files["budgets.json"] = json_text([t.to_json() for t in early.family], indent=2)
        if early.chosen:
            files["thresholds.json"] = json_text(early.chosen.to_json(), indent=2)
    return files


def _calibration_rows(results: Results) -> list[dict[str, Any]]:
    top1 = anytime.accuracies(results.counts)
    rows = calibration.rows(top1, results.trained, results.calibrated)
    if (early := results.budgeted) and early.warning:
        rows = [row | {"warning": early.warning} for row in rows]
    return rows


def _document(about: Mapping[str, Any], results: Results) -> dict[str, Any]:
    """The content of evaluation.json: what the other files hold, and the reliability by bin."""
    document = {
        **about,
        "cost_convention": "published",
        "anytime": anytime.rows(results.counts, results.costs),
        "calibration": _calibration_rows(results),
        "reliability": [
            {k: v for k, v in bins._asdict().items() if k != "error"}
            for bins in results.trained.reliability
        ],
        "budgeted": None,
        "chosen": None,
    }
    if early := results.budgeted:
        rows = budgeted.rows(early)
        document["budgeted"] = {"validation_examples": early.examples, "rows": rows}
        if early.chosen:
            outcome = early.chosen_outcome
            document["chosen"] = {
                "thresholds": early.chosen.to_json(),
                "cost": outcome.cost[0],
                "top1": outcome.top1[0],
                "leaving": outcome.leaving[0],
            }
    return document
