"""Every network learns: its loss on enlarged digits falls below half within a few steps."""

import numpy as np
import pytest
import tiny_run

from dfs_jax import config, models
from dfs_jax.training.run import prepare

# Side of the images, steps, learning rate, and options that make them small.
_WIDTHS = ((16, 16), (16, 16), (32,) * 3, (32,) * 3, (32,) * 3)
_VIT = {"depth": 4, "first_exit": 2}
NETWORKS = {
    "msdnet_cifar100": (32, 40, 0.02, {"steps": (2, 1, 1), "initial": 8, "growth": 8}),
    "msdnet_digits": (8, 40, 0.02, {}),
    "msdnet_imagenet": (136, 50, 0.02, {"steps": (2, 1, 1), "initial": 8, "growth": 8}),
    "resnet18_cifar100": (16, 80, 0.1, {"width": 16}),
    "resnet34_cifar100": (16, 80, 0.1, {"width": 8}),
    "resnet50_cifar100": (16, 100, 0.05, {"width": 8}),
    "resnet101_cifar100": (16, 100, 0.02, {"width": 8}),
    "vgg7_cifar100": (16, 60, 0.1, {"widths": _WIDTHS[:3]}),
    "vgg16_imagenet": (32, 90, 0.05, {"widths": _WIDTHS}),
    "vit_tiny_patch16": (32, 80, 1e-3, _VIT),
    "vit_small_patch16": (32, 40, 3e-4, _VIT),
    "vit_base_patch16": (32, 40, 3e-4, _VIT),
}


def test_no_network_is_left_out():
    assert set(NETWORKS) == set(models.names())


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_network_learns_the_digits(name, tmp_path):
    side, steps, rate, options = NETWORKS[name]
    c = config.default()
    config.set_network(c, name, **options)
    config.set_gradients(c, "joint")
    c.data.dir = str(tmp_path)
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
