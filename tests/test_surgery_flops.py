"""The saving of surgery in compiled FLOPs, so that it can never be lost silently."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from shapes import image
from summed_loss import summed_loss

from dfs_jax.models import create_model
from dfs_jax.models.cost import minimal_training_multiply_adds, training_flops
from dfs_jax.ops import compiler
from dfs_jax.surgery import Surgery

BATCH = 8


def _compiled_flops(function, *arguments) -> float:
    """FLOPs of `function` as XLA counts them in the compiled program.

    They are settled before machine code is generated, for which no time is taken here.
    """
    quick = {"xla_backend_optimization_level": 0}
    return compiler.flops(jax.jit(function).lower(*arguments).compile(quick))


def _vgg7(**kwargs):
    return create_model("vgg7_cifar100", num_classes=100, surgery=Surgery(**kwargs))


def _step_flops(network, side: int = 32, batch: int = BATCH) -> float:
    """Compiled FLOPs of value and gradient of the exits' summed cross-entropy."""
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)

    def loss(params, batch_stats, images, labels):
        return summed_loss(params, batch_stats, network, images, labels)

    step = jax.value_and_grad(loss, has_aux=True)
    statistics = variables.get("batch_stats", {})
    return _compiled_flops(step, variables["params"], statistics, images, labels)


@functools.cache
def _joint_flops() -> float:
    return _step_flops(_vgg7(partition=False))


@pytest.mark.parametrize(
    ("beta", "limit"), [(0.5, 0.84), pytest.param(0.25, 0.77, marks=pytest.mark.slow)]
)
def test_surgery_saves_compiled_flops(beta, limit):
    """Measured: 0.837 and 0.755 of joint training."""
    ratio = _step_flops(_vgg7(beta=beta)) / _joint_flops()
    assert ratio <= limit
    # What no implementation can beat; the two count padding and small operations differently.
    least = minimal_training_multiply_adds(_vgg7(beta=beta), image(32, 32, 3))
    joint = minimal_training_multiply_adds(_vgg7(partition=False), image(32, 32, 3))
    assert ratio == pytest.approx(least / joint, abs=0.01)


def test_joint_training_has_no_overhead():
    """The compiled step does no more than forward, kernel and input gradients once each."""
    images = jax.ShapeDtypeStruct((BATCH, 32, 32, 3), jnp.float32)
    least = training_flops(_vgg7(partition=False), images)
    assert _joint_flops() <= 1.01 * least


def test_the_definition_as_written_saves_nothing():
    """[f+, stop_gradient(f-)] before plain convolutions: the trap that surgery.conv avoids."""

    def chain(x, kernels, cut):
        for kernel in kernels:
            if cut:
                x = jnp.concatenate([x[..., :cut], lax.stop_gradient(x[..., cut:])], axis=-1)
            dimensions = ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
        return jnp.sum(jnp.sin(x))

    x = jax.ShapeDtypeStruct((4, 16, 16, 32), jnp.float32)
    kernels = [jax.ShapeDtypeStruct((3, 3, 32, 32), jnp.float32)] * 3
    naive, plain = (
        _compiled_flops(jax.grad(functools.partial(chain, cut=cut), argnums=(0, 1)), x, kernels)
        for cut in (16, 0)
    )
    assert naive / plain >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "batch", "betas"),
    [
        ("msdnet_cifar100", 32, 8, (0.1, 0.9)),
        ("msdnet_imagenet", 224, 2, (0.5,)),
        ("resnet18_cifar100", 32, 8, (0.1, 0.9)),
        ("vgg7_cifar100", 32, 8, (0.1, 0.3, 0.5, 0.7, 0.9)),
        ("vgg16_imagenet", 64, 2, (0.5,)),
        ("vit_tiny_patch16", 224, 2, (0.1, 0.9)),
    ],
)
def test_saving_of_every_network_is_what_its_definition_allows(name, side, batch, betas):
    """Run with -s, this prints the table: network, beta, compiled ratio, smallest ratio."""

    def network(**surgery):
        return create_model(
            name, num_classes=100, surgery=Surgery(**surgery), dropout_rate=0.0, adapters=False
        )

    shape = image(side, side, 3)
    joint = network(partition=False)
    joint_flops = _step_flops(joint, side, batch)
    joint_least = minimal_training_multiply_adds(joint, shape)
    for beta in betas:
        ratio = _step_flops(network(beta=beta), side, batch) / joint_flops
        least = minimal_training_multiply_adds(network(beta=beta), shape) / joint_least
        print(f"\n{name:20} {beta} {ratio:.4f} {least:.4f}")
        assert ratio == pytest.approx(least, abs=0.01), beta
