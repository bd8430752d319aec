"""Vision transformers against numpy, which exit trains which channels, refused images."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.models.vit import Block, Exit, PatchEmbed, ViT
from dfs_jax.surgery import Partitioned, Surgery

WIDTH, HEADS, TOKENS = 8, 2, 5


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def scrambled(variables, seed: int = 7):
    """The variables with ordinary numbers, so that no bias is 0 and no scale is 1."""
    leaves, tree = jax.tree.flatten(variables)
    return jax.tree.unflatten(
        tree, [0.5 * random(seed + k, *leaf.shape) for k, leaf in enumerate(leaves)]
    )


def small(surgery: Surgery, **options) -> ViT:
    chosen = {"width": WIDTH, "heads": HEADS, "depth": 4, "patch_size": 4, "first_exit": 1}
    return ViT(num_classes=3, surgery=surgery, dtype=jnp.float64, **{**chosen, **options})


def layer_norm(p, x):
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * p["scale"] + p["bias"]


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def block_in_numpy(p, x):
    """x (T, C)."""
    y, size = linear(p["attn"]["qkv"], layer_norm(p["norm1"], x)), WIDTH // HEADS
    mixed = []
    for head in range(HEADS):
        start = head * size
        q, k, v = (y[:, part * WIDTH + start :][:, :size] for part in range(3))
        scores = np.exp(q @ k.T / math.sqrt(size))
        mixed.append(scores / scores.sum(1, keepdims=True) @ v)
    x = x + linear(p["attn"]["proj"], np.concatenate(mixed, axis=1))
    y = linear(p["mlp"]["fc1"], layer_norm(p["norm2"], x))
    y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
    return x + linear(p["mlp"]["fc2"], y)


def test_block():
    block, x = Block(HEADS, dtype=jnp.float64), random(0, 3, TOKENS, WIDTH)
    variables = scrambled(jax.eval_shape(block.init, jax.random.key(0), x))
    found = jax.jit(block.apply)(variables, x)
    for example, value in zip(x, found, strict=True):
        np.testing.assert_allclose(value, block_in_numpy(variables["params"], example), rtol=1e-11)


def test_block_on_partitioned():
    """The residual stream too gives dead channels no gradient; values stay."""
    block, x = Block(HEADS, dtype=jnp.float64), random(0, 2, TOKENS, WIDTH)
    variables = scrambled(jax.eval_shape(block.init, jax.random.key(0), x))

    @jax.jit
    def gradient(x):
        def value(x, live):
            return jnp.sum(jnp.sin(block.apply(variables, Partitioned(x, live))))

        whole = ((0, WIDTH),)
        return jax.grad(value)(x, ((2, 5),)), jax.grad(value)(x, whole)

    part, full = gradient(x)
    np.testing.assert_allclose(part[..., 2:5], full[..., 2:5], rtol=1e-11)
    np.testing.assert_array_equal(part[..., [0, 1, 5, 6, 7]], 0)


def test_patches():
    """Patches row by row behind the class token; every patch in row-major order."""
    embed, images = PatchEmbed(WIDTH, 4, dtype=jnp.float64), random(0, 2, 8, 12, 3)
    variables = scrambled(jax.eval_shape(embed.init, jax.random.key(0), images))
    p = variables["params"]
    found = np.asarray(embed.apply(variables, images))
    assert found.shape == (2, 1 + 2 * 3, WIDTH)
    np.testing.assert_allclose(
        found[:, 0], np.broadcast_to(p["cls_token"][:, 0] + p["pos_embed"][:, 0], (2, WIDTH))
    )
    for k in range(6):
        row, column = divmod(k, 3)
        patch = images[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        value = patch.reshape(2, -1) @ p["proj"]["kernel"].reshape(-1, WIDTH) + p["proj"]["bias"]
        np.testing.assert_allclose(found[:, 1 + k], value + p["pos_embed"][:, 1 + k], rtol=1e-11)


def test_exit_reads_the_class_token():
    head = Exit(3, dropout_rate=0.0, dtype=jnp.float64)
    x = random(0, 2, TOKENS, WIDTH)
    variables = scrambled(
        jax.eval_shape(lambda key: head.init(key, x, train=False), jax.random.key(0))
    )
    logits, feature = head.apply(variables, x, train=False)
    p = variables["params"]
    np.testing.assert_allclose(feature, layer_norm(p["norm"], x[:, 0]), rtol=1e-11)
    np.testing.assert_allclose(logits, linear(p["head"], feature), rtol=1e-11)


def test_whole_network_is_its_blocks_in_order():
    model, images = small(Surgery()), random(0, 1, 8, 8, 3)
    variables = scrambled(jax.eval_shape(model.init, jax.random.key(0), images))
    p = variables["params"]
    out = jax.jit(model.apply)(variables, images)
    embed = PatchEmbed(WIDTH, 4, dtype=jnp.float64)
    x = np.asarray(embed.apply({"params": p["patch_embed"]}, images))[0]
    assert len(out.logits) == 3
    for k in range(4):
        x = block_in_numpy(p[f"blocks_{k}"], x)
        if k >= 1:
            exit_ = p[f"exits_{k - 1}"]
            wanted = linear(exit_["head"], layer_norm(exit_["norm"], x[0]))
            np.testing.assert_allclose(out.logits[k - 1][0], wanted, rtol=1e-9)


@pytest.mark.parametrize("exit_gradient", ["own", "all"])
def test_each_exit_trains_its_own_channels(exit_gradient):
    """By the bias that is added last to the tokens of each segment."""
    surgery, images = Surgery(beta=0.4, exit_gradient=exit_gradient), random(0, 2, 8, 8, 3)
    cut = round(0.4 * WIDTH)
    model, weights = small(surgery), random(1, 2, 3)
    variables = scrambled(jax.eval_shape(model.init, jax.random.key(0), images))

    def losses(params):
        out = model.apply({"params": params}, images, train=True)
        return jnp.stack([jnp.sum(weights * logits) for logits in out.logits])

    tree = jax.jit(jax.jacrev(losses))(variables["params"])
    for i in range(3):
        by_exit = np.asarray(tree[f"blocks_{1 + i}"]["mlp"]["fc2"]["bias"])
        np.testing.assert_array_equal(by_exit[:i], 0)
        if i == 2:
            assert np.all(by_exit[i])
            continue
        assert np.all(by_exit[i][cut:])
        np.testing.assert_array_equal(by_exit[i][:cut] != 0, exit_gradient == "all")
        np.testing.assert_array_equal(by_exit[i + 1 :, cut:], 0)
        assert np.all(by_exit[i + 1 :, :cut])


def test_first_exit():
    assert small(Surgery(), first_exit=0).num_exits == 4
    assert small(Surgery(), first_exit=3).num_exits == 1
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=r"first_exit must lie in 0\.\.3"):
            small(Surgery(), first_exit=wrong)
    with pytest.raises(ValueError, match="patch_size"):
        small(Surgery(), patch_size=0)


def test_refused_images():
    model, key = small(Surgery()), jax.random.key(0)
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float64)
    variables = jax.eval_shape(model.init, key, images)
    with pytest.raises(ValueError, match="multiples of the patch size 4, got 8x10"):
        jax.eval_shape(model.init, key, jax.ShapeDtypeStruct((1, 8, 10, 3), jnp.float64))
    larger = jax.ShapeDtypeStruct((1, 12, 8, 3), jnp.float64)
    with pytest.raises(ValueError, match="initialised for images of 4 patches"):
        jax.eval_shape(model.apply, variables, larger)


def test_initialisation():
    model = small(Surgery(), width=64, depth=2)
    params = jax.jit(model.init)(jax.random.key(0), random(0, 1, 16, 16, 3))["params"]
    kernel, position = (
        params["blocks_1"]["mlp"]["fc1"]["kernel"],
        params["patch_embed"]["pos_embed"],
    )
    for leaf in (kernel, position):
        assert np.std(leaf) == pytest.approx(0.02, rel=0.1)
    assert 0 < np.abs(params["patch_embed"]["cls_token"]).max() < 1e-5
    assert np.all(params["blocks_0"]["attn"]["qkv"]["bias"] == 0)
    assert np.all(params["exits_0"]["head"]["bias"] == 0)
    assert np.all(params["exits_0"]["norm"]["scale"] == 1)
