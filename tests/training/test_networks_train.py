"""Every network learns: its loss on enlarged digits falls below half within a few steps."""

import dataclasses

import numpy as np
import pytest
import tiny_run
from tiny_run import few_digits  # noqa: F401

from dfs_jax import config, models
from dfs_jax.models import registry
from dfs_jax.training.run import prepare

# Side of the images, steps, learning rate, and options that make them small.
_MSDNET = {"steps": (1, 1), "initial": 8, "growth": 8}
NETWORKS = {
    "msdnet_digits": (8, 40, 0.02, _MSDNET),
    "msdnet_imagenet": (136, 40, 0.02, _MSDNET),
    "resnet18_cifar100": (16, 60, 0.1, {"width": 8}),
    "resnet50_cifar100": (16, 60, 0.05, {"width": 8}),
    "vgg7_cifar100": (16, 80, 0.1, {"widths": ((16, 16), (16, 16), (32,))}),
    "vit_tiny_patch16": (32, 60, 1e-3, {"depth": 2, "first_exit": 1}),
}
# The same code with other numbers.
ALIKE = {
    "msdnet_cifar100": "msdnet_digits",
    "resnet34_cifar100": "resnet18_cifar100",
    "resnet101_cifar100": "resnet50_cifar100",
    "vgg16_imagenet": "vgg7_cifar100",
    "vit_small_patch16": "vit_tiny_patch16",
    "vit_base_patch16": "vit_tiny_patch16",
}


def test_no_network_is_left_out():
    assert NETWORKS.keys() | ALIKE.keys() == set(models.names())
    assert NETWORKS.keys() >= set(ALIKE.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_network_learns_the_digits(name, monkeypatch):
    if name.startswith("resnet"):
        published = registry._NETWORKS[name]
        fewer = dataclasses.replace(published, fixed={**published.fixed, "depths": (2, 1, 1, 1)})
        monkeypatch.setitem(registry._NETWORKS, name, fewer)
    side, steps, rate, options = NETWORKS[name]
    c = config.default()
    config.set_network(c, name, **options)
    config.set_gradients(c, "joint")
    c.data.image_size = side
    c.train.steps = steps
    c.train.batch_size = 16
    c.mesh.data = 1
    c.optimizer.schedule = "constant"
    c.optimizer.learning_rate = rate
    if name.startswith("vit"):
        c.optimizer.name = "adamw"
    losses = tiny_run.losses_of(prepare(c)).sum(axis=1)
    assert np.mean(losses[-5:]) < losses[0] / 2, losses
