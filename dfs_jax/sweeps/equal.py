"""Whether two configurations train the same thing, whatever else they say.

A field that the rest of the configuration makes idle does not count (beta without surgery), nor
does one that a run may change on its way (`training/workdir.py`). Where the data are does: two
folders are two data sets.
"""

from collections.abc import Callable, Mapping
from typing import Any

from dfs_jax.config.loader import flatten
from dfs_jax.training.workdir import FREE


def _off(value: Any) -> bool:
    return not value


# (field, for which of its values, these fields do nothing). What a field does is said in
# `config/fields.py` and in the dataclasses that it names.
_IDLE: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    (
        "surgery.partition",
        _off,
        ("surgery.referencing", "surgery.exit_gradient", "surgery.beta", "surgery.first_exit"),
    ),
    ("objective.logit_weight", _off, ("objective.temperature", "objective.scale_by_temperature")),
    ("objective.feature_weight", _off, ("objective.feature_reduction",)),
    ("optimizer.schedule", "multistep".__ne__, ("optimizer.milestones", "optimizer.decay_rate")),
    ("optimizer.warmup_epochs", _off, ("optimizer.warmup",)),
    ("data.randaugment_layers", _off, ("data.randaugment_magnitude",)),
)


def what_trains(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `config`, sections as in config.json, that decide what its run learns.

    Two runs learn the same if these are equal. With phases any field may count in one of them.
    """
    fields = flatten(config)
    idle = {"train.best_metric", *FREE} - {"data.dir"}  # the metric chooses among checkpoints
    for field, does_nothing, others in () if fields.get("train.phases") else _IDLE:
        if field in fields and does_nothing(fields[field]):
            idle |= {*others}
    if fields.get("model.options.split_init"):  # the official draw of weights depends on beta
        idle.discard("surgery.beta")
    return {
        path: value
        for path, value in fields.items()
        if path not in idle and path.split(".")[0] not in idle
    }


def differing(configs: Mapping[Any, Mapping[str, Any]]) -> dict[str, dict[Any, Any]]:
    """Fields, of those that train, in which `configs` differ: by field the value of each."""
    fields = {key: what_trains(config) for key, config in configs.items()}
    paths = dict.fromkeys(path for found in fields.values() for path in found)
    result = {path: {key: fields[key].get(path) for key in fields} for path in paths}
    return {path: v for path, v in result.items() if len({*map(repr, v.values())}) > 1}
