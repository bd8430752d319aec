"""The workdir of a run: one experiment each, told apart by the saved configuration."""

import os
from pathlib import Path

import jax
import ml_collections
from etils import epath

from dfs_jax import config as configuration
from dfs_jax import data
from dfs_jax.config import ConfigError
from dfs_jax.config.command import configure_jax
from dfs_jax.data.record import Record
from dfs_jax.training import data_record
from dfs_jax.training.checkpoint import newest_step
from dfs_jax.writing.files import absolute, write_whole

# What may change between two runs in one workdir; a change elsewhere is another experiment.
FREE = {
    "data.dir",
    "data.on_error",
    "mesh",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.compilation_cache",
    "train.conflict_every",
    "train.eval_batch_size",
    "train.eval_every",
    "train.log_every",
    "train.peak_flops",
    "train.profile_steps",
}


def load(workdir: str) -> ml_collections.ConfigDict | None:
    """The configuration saved in `workdir`, or None if there is none.

    Raises ConfigError if it cannot be read, or is gone from beside checkpoints.
    """
    saved, checkpoints = epath.Path(workdir) / "config.json", epath.Path(workdir) / "checkpoints"
    try:
        text = saved.read_text() if saved.exists() else None
    except OSError as error:
        raise ConfigError(f"--workdir: cannot read {workdir}: {error.strerror}") from error
    if text is None:
        if (step := newest_step(checkpoints)) is None:
            return None
        raise ConfigError(
            f"--workdir: {workdir} has a checkpoint of step {step} and no config.json that tells "
            "what it is of; put the file back, or choose another workdir"
        )
    try:
        return configuration.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--workdir: {saved} is not a saved configuration: {error}") from error


def saved_config(workdir: str, data_dir: str | None = None) -> ml_collections.ConfigDict:
    """The configuration that a run saved in `workdir`, for commands that read a trained run.

    `data_dir` is where its data are, None where they were. Raises ConfigError if there is none.
    """
    config = load(workdir)
    if config is None:
        raise ConfigError(f"--workdir: {workdir} holds no run (there is no config.json)")
    configure_jax(config)
    if data_dir:
        config.data.dir = absolute(data_dir)
    return config


def check(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Refuse, changing nothing, a workdir that is another experiment's. Raises ConfigError."""
    before = load(workdir)
    if before is None:
        return
    free = set(FREE)
    # Only cosine schedules, and phases, depend on the run's length.
    if config.optimizer.schedule != "cosine" and not config.train.phases:
        free |= {"train.epochs", "train.steps"}
    lines = configuration.differences(before, config, ignored=free)
    if lines:
        raise ConfigError(
            f"--workdir: {workdir} holds another experiment; {'; '.join(lines)}. "
            "Choose another workdir, or the saved values"
        )


def check_writable(workdir: str) -> None:
    """Raise ConfigError unless a run can be written to `workdir`, which need not be there yet."""
    if not workdir:
        raise ConfigError("--workdir: give the folder of the run, got ''")
    if "://" in workdir:  # only writing tells
        return
    path = Path(workdir).absolute()
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise ConfigError(f"--workdir: cannot write to {workdir}: {nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"--workdir: cannot write to {workdir}: no permission for {nearest}")


def check_source(config: ml_collections.ConfigDict) -> None:
    """Raise ConfigError if `train.init_from` is set and is no workdir with a checkpoint."""
    source = config.train.init_from
    if source and newest_step(epath.Path(source) / "checkpoints") is None:
        raise ConfigError(f"train.init_from: {source} is no workdir with a checkpoint")


def create(
    config: ml_collections.ConfigDict, workdir: str, noted: Record | None = None
) -> epath.Path:
    """Make the workdir if need be and save the configuration there; raises ConfigError.

    `noted` is the record of the data that the run has read. Their place is saved in full.
    """
    directory = epath.Path(workdir)
    config = config.copy_and_resolve_references()
    if place := data.place(config):
        config.data.dir = absolute(place)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            data_record.save(directory, noted)  # first: a saved configuration has its record
            write_whole(directory / "config.json", configuration.to_json(config))
    except OSError as error:
        raise ConfigError(f"--workdir: cannot write to {workdir}: {error.strerror}") from error
    return directory
