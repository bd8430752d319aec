"""The method words of a configuration file made into runs on random images, to be compared."""

from collections.abc import Sequence

import ml_collections

from dfs_jax import config as configuration
from dfs_jax.config import ConfigError
from dfs_jax.profiling.random_images import random_run
from dfs_jax.profiling.step_cost import BASELINE
from dfs_jax.training.run import Run


def random_runs(
    configs: dict[str, ml_collections.ConfigDict],
    batch_sizes: Sequence[int],
    num_classes: int | None = None,
) -> dict[int, dict[str, Run]]:
    """A run for each of `configs` at each batch size; raises ConfigError as `random_run` does."""
    runs: dict[int, dict[str, Run]] = {}
    for size in dict.fromkeys(batch_sizes):
        if size < 1:
            raise ConfigError(f"--batch_sizes must be at least 1, got {size}")
        runs[size] = {}
        for word, config in configs.items():
            own = config.copy_and_resolve_references()
            own.train.batch_size = size
            runs[size][word] = random_run(own, num_classes)
    return runs


def method_configs(
    spec: str, words: Sequence[str], overrides: Sequence[str]
) -> dict[str, ml_collections.ConfigDict]:
    """The configuration of `spec` (FILE[:network]) with each of the method `words`, joint first.

    Raises ConfigError for a word that is no method of that file.
    """
    file, _, preset = spec.partition(":")
    configs = {}
    for word in dict.fromkeys((BASELINE, *words)):
        preset_words = ",".join(filter(None, (preset, word)))
        try:
            configs[word] = configuration.load(f"{file}:{preset_words}", overrides)
        except ConfigError as error:
            raise ConfigError(f"--methods {word}: {error}") from error
        # A network word goes together with a method word; a second method word is refused.
        try:
            configuration.load(f"{file}:{word},{BASELINE}")
        except ConfigError:
            continue
        raise ConfigError(f"--methods: {word!r} is a network word of {file}, not a method word")
    return configs
