"""ResNets: which exit trains which channels, blocks on partitioned features, initialisation.

Values and gradients of the whole network are held to recorded ones in tests/golden.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.models.resnet import Block, ResNet
from dfs_jax.surgery import Partitioned, Surgery

WIDTH = 6


def small(surgery: Surgery, *, bottleneck: bool, depths=(1, 1, 1)) -> ResNet:
    return ResNet(num_classes=5, surgery=surgery, depths=depths, width=WIDTH, bottleneck=bottleneck)


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def filled(shapes):
    """Variables with numbers from numpy: compiling `init` takes longer than these tests."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        fan_in = max(1, math.prod(leaf.shape[:-1]))
        return (rng.standard_normal(leaf.shape) / math.sqrt(fan_in)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def quickly(function):
    """`jax.jit` that compiles fast: every function here runs once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def last_bias_gradients(surgery: Surgery, bottleneck: bool) -> list[np.ndarray]:
    """Per segment (exits, C): gradient of each exit's logits by the last batch norm's bias."""
    model, images = small(surgery, bottleneck=bottleneck), random(0, 4, 8, 8, 3)
    weights = random(1, 4, 5)

    @quickly
    def gradients(variables):
        def losses(params):
            out, _ = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return jnp.stack([jnp.sum(weights * logits) for logits in out.logits])

        tree = jax.jacrev(losses)(variables["params"])
        last = "bn3" if bottleneck else "bn2"
        return [tree[f"layers_{i}_0"][last]["bias"] for i in range(model.num_exits)]

    variables = filled(jax.eval_shape(model.init, jax.random.key(0), images))
    return [np.asarray(g) for g in gradients(variables)]


@pytest.mark.parametrize("bottleneck", [False, True])
def test_each_exit_trains_its_own_channels(bottleneck):
    beta = 0.25
    for i, by_exit in enumerate(last_bias_gradients(Surgery(beta=beta), bottleneck)):
        channels = WIDTH * 2**i * (4 if bottleneck else 1)
        cut = round(beta * channels)
        assert by_exit.shape == (3, channels)
        np.testing.assert_array_equal(by_exit[:i], 0)
        if i == 2:
            assert np.any(by_exit[i][:cut])
            assert np.any(by_exit[i][cut:])
            continue
        np.testing.assert_array_equal(by_exit[i][:cut], 0)
        assert np.any(by_exit[i][cut:])
        np.testing.assert_array_equal(by_exit[i + 1 :, cut:], 0)
        assert np.all(np.any(by_exit[i + 1 :, :cut], axis=1))


def test_exits_that_train_all_channels():
    for i, by_exit in enumerate(last_bias_gradients(Surgery(exit_gradient="all"), False)[:2]):
        cut = WIDTH * 2**i // 2
        assert np.any(by_exit[i][:cut])
        assert np.any(by_exit[i][cut:])
        np.testing.assert_array_equal(by_exit[i + 1 :, cut:], 0)


def test_joint_training_reaches_every_channel():
    for i, by_exit in enumerate(last_bias_gradients(Surgery(partition=False), False)):
        cut = WIDTH * 2**i // 2
        assert np.all(np.any(by_exit[i:, :cut], axis=1))
        assert np.all(np.any(by_exit[i:, cut:], axis=1))


@pytest.mark.parametrize(("channels", "strides"), [(8, 1), (8, 2), (6, 1)])
def test_block_on_partitioned(channels, strides):
    """With and without a convolution in the shortcut: gradients are those of the definition."""
    block = Block(8, strides=strides, bottleneck=False, dtype=jnp.float32)
    x, live = random(0, 2, 6, 6, channels), ((1, 4),)

    variables = filled(
        jax.eval_shape(lambda key: block.init(key, x, train=False), jax.random.key(0))
    )

    @quickly
    def gradients(x):
        def value(params, x, partition):
            seen = Partitioned(x, live)
            seen = seen if partition else seen.stopped()
            return jnp.sum(jnp.sin(block.apply({**variables, "params": params}, seen, train=False)))

        both = jax.grad(value, argnums=(0, 1))
        return both(variables["params"], x, True), both(variables["params"], x, False)

    found, wanted = gradients(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)
    np.testing.assert_array_equal(found[1][..., 4:], 0)
    assert np.any(found[1][..., 1:4])


@pytest.mark.parametrize("shape", [(9, 9), (8, 13), (20, 31)])
def test_odd_sizes(shape):
    """The attention map is enlarged to the size of its input, whatever it is."""
    model = small(Surgery(), bottleneck=False, depths=(2, 1, 1, 1))
    images = jax.ShapeDtypeStruct((2, *shape, 3), jnp.float32)
    out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert [logits.shape for logits in out.logits] == [(2, 5)] * 4
    assert [feature.shape for feature in out.features] == [(2, 8 * WIDTH)] * 4
    assert "downsample_conv" not in variables["params"]["layers_0_1"]
    assert "downsample_conv" in variables["params"]["layers_1_0"]


def test_initialisation():
    model = ResNet(num_classes=50, surgery=Surgery(), depths=(1, 1, 1), width=32)

    @quickly
    def draw(key, images):
        params = model.init(key, images)["params"]
        depthwise = params["exits_1"]["attention"]["sep"]["depthwise1"]["kernel"]
        conv = params["layers_2_0"]["conv2"]["kernel"]
        return conv, depthwise, params["exits_0"]["fc"], params["bn1"]

    kernel, depthwise, dense, norm = draw(jax.random.key(0), random(0, 1, 4, 4, 3))
    assert np.std(kernel) == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.02)
    # A depthwise kernel too counts all its output channels.
    assert depthwise.shape == (3, 3, 1, 64)
    assert np.std(depthwise) == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.1)
    for leaf in dense.values():
        assert 0.9 < np.abs(leaf).max() * math.sqrt(128) <= 1
    assert np.all(norm["scale"] == 1)
    assert np.all(norm["bias"] == 0)
