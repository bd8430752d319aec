"""What a finished run is measured on once more, while its checkpoint is there."""

import logging
from collections.abc import Mapping
from typing import Any

import ml_collections
from etils import epath

from dfs_jax.evaluation.trained import budgeted_rows
from dfs_jax.models.cost import training_flops
from dfs_jax.sweeps import records
from dfs_jax.sweeps.records import Record
from dfs_jax.training.checkpoint import newest_step
from dfs_jax.training.run import prepare

log = logging.getLogger(__name__)


def measured(
    config: ml_collections.ConfigDict, place: epath.Path, step: int, before: Record | None
) -> Mapping[str, Any]:
    """FLOPs of a training step and the budgeted evaluation: fields of a `Record`.

    What the record `before` has of the same step is not measured again. A run that cannot be
    measured is told and has none of the two: its scores stand, and a grid goes on.
    """
    if before is not None and before.step == step and before.step_flops is not None:
        return {"step_flops": before.step_flops, "budgeted": before.budgeted}
    if newest_step(place / "checkpoints") is None:
        return {"budgeted": records.budgeted_file(place)}
    try:
        run = prepare(config, str(place))
        flops = training_flops(run.network, run.data.spec.batch(config.train.batch_size))
        rows = budgeted_rows(run, str(place))
    except Exception as error:  # as in `runs.py`: no measurement is worth the night's others
        log.warning("%s: no budgeted evaluation: %s: %s", place.name, type(error).__name__, error)
        return {"budgeted": records.budgeted_file(place)}
    return {"step_flops": flops, "budgeted": None if rows is None else records.budgets(rows)}
