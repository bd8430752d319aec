"""Where a run's weights come from, and whether they may have seen what the run holds out.

What is fitted on held-out images (thresholds, temperatures) is honest only if no weights were
trained on them: neither by the run itself nor by those that it started from.
"""

import json
from collections.abc import Iterator

import ml_collections
from etils import epath

from dfs_jax.config import ConfigError
from dfs_jax.data.record import Record
from dfs_jax.training import workdir as workdirs
from dfs_jax.training.data_record import NAME
from dfs_jax.writing.files import json_text, write_whole

_ORIGIN = "origin.json"  # in a workdir whose weights were made elsewhere
_UNKNOWN = "so it is not known whether they were trained on the images that are held out here"


def record_origin(workdir: epath.PathLike, weights: str) -> None:
    """Note in `workdir` that its first weights come from the file `weights`. Raises OSError."""
    write_whole(epath.Path(workdir) / _ORIGIN, json_text({"weights": weights}))


def warning(config: ml_collections.ConfigDict, workdir: str) -> str:
    """A sentence if the weights of `workdir`, a run of `config`, may know its validation images.

    "" if they do not. Looks at every run that this one descends from.
    """
    reason = _doubt(config, workdir)
    return reason and f"thresholds and temperatures may promise too much: {reason}"


def _doubt(config: ml_collections.ConfigDict, workdir: str) -> str:
    for ancestor, its_config in _ancestors(config, workdir):
        if its_config is None:
            return f"they rest on weights of {ancestor}, which cannot be read, {_UNKNOWN}"
        data = its_config.data
        if ancestor != workdir and _holds_out_others(ancestor, data, workdir, config.data):
            return (
                f"they rest on weights of {ancestor}, which held out other images "
                f"(data.validation_size={data.validation_size}) and may have trained on "
                "those that are held out here"
            )
        if (file := _origin(ancestor)) is not None:
            return f"they rest on weights of {file}, which were trained elsewhere, {_UNKNOWN}"
    return ""


def _ancestors(
    config: ml_collections.ConfigDict, workdir: str
) -> Iterator[tuple[str, ml_collections.ConfigDict | None]]:
    """The run, the one that it started from, and so on; None for one that cannot be read."""
    seen = set()
    while workdir not in seen:
        seen.add(workdir)
        yield workdir, config
        if config is None or not config.train.init_from:
            return
        workdir = config.train.init_from
        try:
            config = workdirs.load(workdir)
        except ConfigError:
            config = None


def _holds_out_others(
    theirs: str, other: ml_collections.ConfigDict, ours: str, own: ml_collections.ConfigDict
) -> bool:
    """Whether run `theirs` of data `other` may train on what run `ours` of data `own` validates."""
    if own.name != other.name or own.validation_size == -1:  # -1: a split that none trains on
        return False
    if names := _held_out(ours, "validation"):
        return not names <= _held_out(theirs, "validation", "test")
    # Of one set of data, a small hold-out is part of a larger one.
    return other.validation_size < own.validation_size


def _held_out(workdir: str, *splits: str) -> set[str]:
    """The files of the training folder that `workdir` noted as held out for `splits`."""
    try:
        noted = Record.from_json(json.loads((epath.Path(workdir) / NAME).read_text()))
        return {name for split in splits for name in noted.held_out.get(split, ())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _origin(workdir: str) -> str | None:
    """The file that the first weights of `workdir` were read from, or None."""
    noted = epath.Path(workdir) / _ORIGIN
    try:
        return str(json.loads(noted.read_text())["weights"])
    except OSError:
        # Training never saves step 0; earlier versions noted nothing.
        imported = (epath.Path(workdir) / "checkpoints" / "0").exists()
        return "an unknown file" if imported else None
    except (ValueError, KeyError, TypeError):
        return f"an unknown file ({noted} is damaged)"
