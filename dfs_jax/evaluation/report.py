"""What the evaluation command shows and writes: tables, CSV and JSON files, plots.

The numbers come from `evaluate.measure`. Costs are multiply-adds per image by the published
convention (see `flops`), accuracies shares in [0, 1].
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dfs_jax.config import ConfigError
from dfs_jax.config.tables import format_table
from dfs_jax.early_exit import budget
from dfs_jax.evaluation.published import Results as Published
from dfs_jax.evaluation.results import EarlyExit, Results

_SHOWN = 5  # of the 40 budgets, every fifth is printed; the file holds all

_NO_VALIDATION = (
    "no validation split (data.validation_size is 0), so no thresholds and no temperatures can be "
    "fitted: early exit by threshold is left out, and budgeted.csv is not written"
)


def tables(results: Results) -> str:
    """Calibration and early exit, for people."""
    parts = [_calibration_table(results)]
    if results.early is None:
        parts.append(_NO_VALIDATION)
    else:
        parts.append(_budgeted_table(results.early))
        if results.early.chosen is not None:
            parts.append(_chosen_lines(results.early))
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
    out: epath.Path, about: Mapping[str, Any], results: Results, overlay: Published | None
) -> tuple[str, ...]:
    """Writes every file into `out` and returns their names.

    `about` says what was evaluated: network, data, split, examples, step and score.
    """
    from dfs_jax.evaluation import plots

    early, top1 = results.early, _top1(results)
    title = f"{about['network']} on {about['data']}, {about['split']} split"
    calibrated = early.calibrated if early else None
    files: dict[str, str | bytes] = {
        "anytime.csv": _csv(anytime_rows(results)),
        "calibration.csv": _csv(calibration_rows(results)),
        "evaluation.json": _json(_document(about, results)),
        "anytime.png": plots.anytime(title, results.costs, top1, _ensemble(results), overlay),
        "reliability.png": plots.reliability(
            title,
            results.trained.reliability,
            calibrated and calibrated.reliability,
            calibrated and calibrated.temperatures,
        ),
    }
    if early:
        outcome = early.outcome
        shares = outcome.leaving / outcome.leaving.sum(axis=1, keepdims=True)
        files["budgeted.csv"] = _csv(budgeted_rows(early))
        files["budgeted.png"] = plots.budgeted(
            title, results.costs, top1, outcome.cost, outcome.top1, shares, overlay
        )
        files["budgets.json"] = _json([t.to_json() for t in early.family])
        if early.chosen:
            files["thresholds.json"] = _json(early.chosen.to_json())
    for name, content in files.items():
        content = content.encode() if isinstance(content, str) else content
        (out / name).write_bytes(content)
    return tuple(files)


# Rows of the CSV files, as mappings from column to value.


def anytime_rows(results: Results) -> list[dict[str, Any]]:
    """One row per exit and one for the ensemble; top5 is None for five classes or fewer."""
    counts, size = results.counts, int(results.counts.count)
    rows = [
        {
            "exit": str(i + 1),
            "cost": cost,
            "top1": int(counts.top1[i]) / size,
            "top5": None if counts.top5 is None else int(counts.top5[i]) / size,
            "nll": float(counts.loss[i]) / size,
        }
        for i, cost in enumerate(results.costs)
    ]
    ensemble = {"exit": "ensemble", "cost": results.costs[-1], "top1": _ensemble(results)}
    return [*rows, {**dict.fromkeys(rows[0]), **ensemble}]


def budgeted_rows(early: EarlyExit) -> list[dict[str, Any]]:
    """One row per budget: costs and accuracies, thresholds, and images that leave at each exit."""
    rows = []
    for p, ratio in enumerate(budget.PROTOCOL):
        outcome, fitted = early.outcome, early.fitted
        row = {
            "ratio": ratio,
            "cost": outcome.cost[p],
            "top1": outcome.top1[p],
            "top5": None if outcome.top5 is None else outcome.top5[p],
            "validation_cost": fitted.cost[p],
            "validation_top1": fitted.top1[p],
        }
        row |= {f"leave{i}": int(n) for i, n in enumerate(outcome.leaving[p], 1)}
        row |= {f"threshold{i}": t for i, t in enumerate(early.values[p], 1)}
        rows.append(row)
    return rows


def calibration_rows(results: Results) -> list[dict[str, Any]]:
    """One row per exit; the columns after the temperature are None without a validation split."""
    rows = []
    for i, top1 in enumerate(_top1(results)):
        trained = results.trained
        row: dict[str, Any] = {
            "exit": i + 1,
            "top1": top1,
            "confidence": _mean_confidence(trained.reliability[i]),
            "ece": trained.reliability[i].error,
            "nll": trained.nll[i],
        }
        row |= dict.fromkeys(("temperature", "ece_calibrated", "nll_calibrated"))
        if results.early:
            after = results.early.calibrated
            row["temperature"] = after.temperatures[i]
            row["ece_calibrated"] = after.reliability[i].error
            row["nll_calibrated"] = after.nll[i]
        rows.append(row)
    return rows


def _document(about: Mapping[str, Any], results: Results) -> dict[str, Any]:
    """The content of evaluation.json: what the other files hold, and the reliability by bin."""
    document = {
        **about,
        "cost_convention": "published",
        "anytime": anytime_rows(results),
        "calibration": calibration_rows(results),
        "reliability": [
            {k: v.tolist() for k, v in r._asdict().items() if k != "error"}
            for r in results.trained.reliability
        ],
        "budgeted": None,
        "chosen": None,
    }
    if early := results.early:
        document["budgeted"] = {
            "validation_examples": early.examples,
            "rows": budgeted_rows(early),
        }
        if early.chosen:
            outcome = early.chosen_outcome
            document["chosen"] = {
                "thresholds": early.chosen.to_json(),
                "cost": float(outcome.cost[0]),
                "top1": float(outcome.top1[0]),
                "leaving": outcome.leaving[0].tolist(),
            }
    return document


# Tables for people.


def _calibration_table(results: Results) -> str:
    headers = ("exit", "confidence", "calibration error")
    keys = ("confidence", "ece")
    if results.early:
        headers += ("temperature", "error with it")
        keys += ("temperature", "ece_calibrated")
    rows = [
        (str(row["exit"]), *(f"{row[key]:.4f}" for key in keys))
        for row in calibration_rows(results)
    ]
    return format_table(rows, headers)


def _budgeted_table(early: EarlyExit) -> str:
    outcome = early.outcome
    rows = []
    for p in range(_SHOWN - 1, len(outcome.cost), _SHOWN):
        rows.append(
            (f"{outcome.cost[p] / 1e6:.3f}", f"{outcome.top1[p]:.2%}", _leaving(outcome, p))
        )
    headers = ("mean cost (M)", "accuracy", "leaving at each exit")
    return format_table(rows, headers)


def _chosen_lines(early: EarlyExit) -> str:
    chosen, outcome = early.chosen, early.chosen_outcome
    values = " ".join(_threshold(v) for v in chosen.values)
    return (
        f"thresholds for {chosen.fitted_for}: {values}\n"
        f"validation: {chosen.expected_accuracy:.2%} for {chosen.expected_cost / 1e6:.3f} M; here: "
        f"{outcome.top1[0]:.2%} for {outcome.cost[0] / 1e6:.3f} M, leaving "
        f"{_leaving(outcome, 0)}"
    )


def _leaving(outcome: budget.Outcome, p: int) -> str:
    shares = outcome.leaving[p] / outcome.leaving[p].sum()
    return " ".join(f"{share:4.0%}" for share in shares)


def _threshold(value: float) -> str:
    return {budget.NEVER: "never", budget.ALWAYS: "rest"}.get(value, f"{value:.5g}")


# Numbers and files.


def _top1(results: Results) -> list[float]:
    return [int(n) / int(results.counts.count) for n in results.counts.top1]


def _ensemble(results: Results) -> float:
    return int(results.counts.ensemble) / int(results.counts.count)


def _mean_confidence(reliability: Any) -> float:
    return float(np.nansum(reliability.confidence * reliability.count) / reliability.count.sum())


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _json(content: Any) -> str:
    return json.dumps(_plain(content), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """With numpy's numbers as Python's, and None for NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
