"""CIFAR-10 with the networks and recipes of `configs/cifar100.py`, and its presets.

    python -m dfs_jax.main --config configs/cifar10.py --workdir runs/cifar10
    python -m dfs_jax.main --config configs/cifar10.py:resnet18,joint --workdir runs/resnet18

The recipes were published for CIFAR-100 (arXiv 2407.13986); only the data differ.
"""

from pathlib import Path

from dfs_jax import config as base


def get_config(preset: str | None = None):
    """The configuration for `preset`, for instance "resnet18,joint" or "dfs_all"."""
    c = base.load(f"{Path(__file__).with_name('cifar100.py')}:{preset or ''}")
    c.data.name = "cifar10"
    return c
