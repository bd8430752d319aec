"""The method words of presets: what a word such as "dfs" or "pcgrad" sets, in every file alike.

Each stands for a row of the published tables (arXiv 2407.13986), on
whatever recipe the configuration file has. A file takes `METHODS` as it is, or adds to a word what
its own networks need.
"""

from collections.abc import Callable
from typing import Any

import ml_collections

from dfs_jax.config import set_gradients

Preset = Callable[[ml_collections.ConfigDict], None]


def surgery(exit_gradient: str) -> Preset:
    """Deep Feature Surgery whose exits train the channels `exit_gradient`."""

    def apply(c: ml_collections.ConfigDict) -> None:
        set_gradients(c, "joint")
        c.surgery.partition = True
        c.surgery.referencing = True
        c.surgery.exit_gradient = exit_gradient

    return apply


def method(name: str, **options: Any) -> Preset:
    """Gradient method `name` on the whole features, without surgery."""

    def apply(c: ml_collections.ConfigDict) -> None:
        set_gradients(c, name, **options)
        c.surgery.partition = False

    return apply


METHODS: dict[str, Preset] = {
    "dfs": surgery("own"),  # the paper's definition
    "dfs_all": surgery("all"),  # what the official MSDNet code ran, and its published rows report
    "joint": method("joint"),  # MSDNet, DSN
    "ge": method("equilibrium"),
    "pcgrad": method("pcgrad"),
    "cagrad": method("cagrad"),
    "nash_mtl": method("nash_mtl"),
    "meta_gf": method("meta_gf"),
    "bdl1": method("bdl", variant="overlap", final_loss=False),
    "bdl2": method("bdl", variant="overlap", final_loss=True),
    "wpn": method("l2w_den"),
}
