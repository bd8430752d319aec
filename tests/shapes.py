"""Inputs of networks as shapes, for what traces a network without running it."""

from dfs_jax.models import inputs


def image(height, width, channels):
    """One image, as a batch of one."""
    return inputs.abstract(inputs.images((height, width, channels)), 1)
