"""The record of a run's data in its workdir, `data.json`, and the data compared with it.

Written when the workdir is made, and again when training images have come or gone; read by all
that go on with a run or read one. What it holds is in `data/record.py`.
"""

import hashlib
import json
import logging

import ml_collections
from etils import epath

from dfs_jax import data
from dfs_jax.config import ConfigError
from dfs_jax.data import record
from dfs_jax.data.pipeline import Data, DataError
from dfs_jax.data.record import OF_BEFORE, Record
from dfs_jax.distributed import processes
from dfs_jax.training.checkpoint import newest_step
from dfs_jax.writing.files import absolute, json_text, write_whole

log = logging.getLogger(__name__)

NAME = "data.json"


def create(config: ml_collections.ConfigDict, workdir: str | None) -> Data:
    """The configured data, which are those that the run in `workdir` has noted, if it has.

    Training images that have come or gone are told. Raises ConfigError where classes, validation
    or test split are others, so that a number would be untrue, and what `data.create` raises.
    """
    known = None if workdir is None else _noted(workdir)
    try:
        found = data.create(config, known)
    except DataError as error:
        place = config.data.dir
        if known is None or not place or epath.Path(absolute(place)).exists():
            raise
        raise DataError(
            f"{error}; if the data have moved, tell where they are with --data_dir DIR "
            "(to train: --config.data.dir=DIR)"
        ) from error
    if found.record is not None:
        _check(config, known, found.record)
    return found


def save(directory: epath.Path, noted: Record | None) -> None:
    """Keep the record of the data of the run in `directory`, if they have one. Raises OSError."""
    if noted is not None:
        write_whole(directory / NAME, json_text(noted.to_json(), indent=2))


def _noted(workdir: str) -> Record | None:
    """What the run in `workdir` has noted; None if nothing is trained yet, and nothing to compare.

    Raises ConfigError for a record that cannot be read.
    """
    directory = epath.Path(workdir)
    if newest_step(directory / "checkpoints") is None:
        return None
    saved, settings = directory / NAME, directory / "config.json"
    try:
        if saved.exists():
            return Record.from_json(json.loads(saved.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{saved} is no record of a run's data ({error!r}); restore it, or remove it and "
            "nothing is compared"
        ) from error
    log.warning(
        "%s has no record of its data (%s): whether they have changed cannot be told", workdir, NAME
    )
    # Before there were records, configurations did not have this field.
    if settings.exists() and "channels" not in json.loads(settings.read_text()).get("data", {}):
        return OF_BEFORE
    return None


def _check(config: ml_collections.ConfigDict, known: Record | None, now: Record) -> None:
    place = config.data.dir or config.data.name
    if not processes.same_everywhere(hashlib.sha256(json_text(now.to_json()).encode()).digest()):
        raise ConfigError(
            f"the processes do not see the same files in {place}; give every host the same data"
        )
    if known is None or known is OF_BEFORE:
        return
    record.refuse(record.of_measured(known, now), place)
    if changed := record.of_training(known, now):
        log.warning("the data in %s have changed: %s", place, "; ".join(changed))
