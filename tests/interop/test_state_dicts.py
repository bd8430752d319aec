"""State dicts against variables: names, layout, round trips, refusals, backbones."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_networks import NETWORKS, state_dict_names

from dfs_jax.interop.torch import (
    InteropError,
    from_backbone,
    from_state_dict,
    made_for,
    to_state_dict,
)
from dfs_jax.models import create_model, names, traced
from dfs_jax.surgery import Surgery


def _random(entries, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape, dtype) if kind == "float32" else np.int64(0)
        for name, shape, kind in entries
    }


def _recorded():
    for key in state_dict_names():
        model, *ratio = key.split("__r")
        yield pytest.param(key, model, float(ratio[0]) if ratio else 0.5, id=key)


@pytest.mark.parametrize(("key", "model", "beta"), _recorded())
def test_official_state_dicts_make_the_round_trip(key, model, beta):
    ours, adapters = NETWORKS[model]
    classes = 1000 if "imagenet" in model else 100
    network = create_model(ours, num_classes=classes, surgery=Surgery(beta), adapters=adapters)
    arrays = _random(state_dict_names()[key])
    back = to_state_dict(network, from_state_dict(network, arrays))
    assert back.keys() == arrays.keys()
    for name, value in arrays.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def _network(name, **options):
    return create_model(name, num_classes=7, surgery=Surgery(), **options)


@functools.cache
def _small(name, adapters=False):
    """The network `name`, small where it can be, and its variables filled with random values."""
    options = {"depth": 3, "first_exit": 1} if name.startswith("vit") else {}
    options = {"width": 8} if name.startswith("resnet") else options
    network = _network(name, adapters=adapters, **options)
    side = 48 if name.startswith("vit") else network.smallest_image
    images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    shapes = traced.variables(network, images)
    rng = np.random.default_rng(0)
    return network, jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), shapes)


@pytest.mark.parametrize("name", names())
def test_variables_of_every_network_make_the_round_trip(name):
    network, variables = _small(name, adapters=True)
    entries = to_state_dict(network, variables)
    counters = [n for n in entries if n.endswith("num_batches_tracked")]
    assert len(entries) - len(counters) >= len(jax.tree.leaves(variables))  # no name twice
    jax.tree.map(np.testing.assert_array_equal, from_state_dict(network, entries), variables)


def test_names_of_deeper_resnets_are_torchvisions():
    network, variables = _small("resnet50_cifar100")
    entries = to_state_dict(network, variables)
    assert entries["layer3.5.conv3.weight"].shape == (128, 32, 1, 1)
    assert entries["layer1.0.downsample.0.weight"].shape == (32, 8, 1, 1)
    assert entries["layer4.2.bn3.running_var"].shape == (256,)


def test_names_of_vision_transformers_are_timms():
    network, variables = _small("vit_tiny_patch16")
    entries = to_state_dict(network, variables)
    assert entries["cls_token"].shape == (1, 1, 192)
    assert entries["pos_embed"].shape == (1, 10, 192)
    assert entries["patch_embed.proj.weight"].shape == (192, 3, 16, 16)
    assert entries["blocks.2.attn.qkv.weight"].shape == (576, 192)
    assert entries["exits.0.head.weight"].shape == entries["head.weight"].shape == (7, 192)
    assert {"blocks.0.norm1.weight", "blocks.1.mlp.fc2.bias", "exits.0.norm.bias"} <= set(entries)
    assert {"norm.weight", "blocks.2.attn.proj.bias"} <= set(entries)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.bfloat16])
def test_types_are_kept(dtype):
    network, variables = _small("vgg7_cifar100")
    variables = jax.tree.map(lambda x: x.astype(dtype), variables)
    entries = to_state_dict(network, variables)
    counters = {n for n in entries if n.endswith("num_batches_tracked")}
    assert all(entries[n].dtype == np.int64 and entries[n].shape == () for n in counters)
    assert all(v.dtype == dtype for n, v in entries.items() if n not in counters)
    back = from_state_dict(network, entries)
    assert {x.dtype for x in jax.tree.leaves(back)} == {np.dtype(dtype)}


def test_a_vgg_layer_is_cut_where_surgery_cuts():
    network = create_model("vgg7_cifar100", num_classes=7, surgery=Surgery(0.3))
    arrays = _random(state_dict_names()["vgg7_64_cifar100_nodistill__r0.3"])
    for name in list(arrays):
        if name.startswith("classifers"):
            arrays[name] = arrays[name][:7]
    kernel = from_state_dict(network, arrays)["params"]["convs_1"]["kernel"]
    assert kernel.shape == (3, 3, 64, 64)
    shared = arrays["feature_extractors.1.conv_p.weight"]
    np.testing.assert_array_equal(kernel[:, :, :19], shared.transpose(2, 3, 1, 0))


def test_beta_1_leaves_the_other_kernel_empty():
    network = create_model("vgg7_cifar100", num_classes=7, surgery=Surgery(1.0))
    _, variables = _small("vgg7_cifar100")
    entries = to_state_dict(network, variables)
    assert entries["classifers.0.fc_s.weight"].shape == (7, 0)
    jax.tree.map(np.testing.assert_array_equal, from_state_dict(network, entries), variables)


def test_gradients_alone_can_be_mapped():
    network, variables = _small("resnet18_cifar100")
    gradients = to_state_dict(network, {"params": variables["params"]})
    everything = to_state_dict(network, variables)
    assert set(gradients) == {n for n in everything if n.split(".")[-1] in ("weight", "bias")}


def test_everything_that_does_not_fit_is_named():
    network, variables = _small("msdnet_digits")
    entries = to_state_dict(network, variables)
    del entries["classifier.0.linear.1.bias"]
    del entries["blocks.0.0.layers.0.net.0.weight"]
    entries["classifier.1.linear.1.weight"] = np.zeros((9, 32), np.float32)
    entries["module.extra"] = np.zeros(3)
    with pytest.raises(InteropError) as error:
        from_state_dict(network, entries)
    message = str(error.value)
    assert message.startswith("4 entries do not fit MSDNet with 7 classes")
    assert "classifier.0.linear.1.bias: missing, shape (7,)" in message
    assert "blocks.0.0.layers.0.net.0.weight: missing, shape (16, 3, 3, 3)" in message
    assert "classifier.1.linear.1.weight: shape (9, 32), expected (7, 32)" in message
    assert "module.extra: unknown" in message
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("prefix", ["model.", "net._orig_mod."])
def test_names_with_something_before_them_are_taken(prefix, caplog):
    network, variables = _small("vgg7_cifar100")
    entries = to_state_dict(network, variables)
    arrays = {f"{prefix}{name}": value for name, value in entries.items()}
    with caplog.at_level(logging.INFO):
        found = from_state_dict(network, arrays | {"criterion.weight": np.ones(7)})
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    assert f"entries under {prefix!r} are taken; left out: criterion.weight" in caplog.text
    assert made_for(network, arrays).num_classes == 7


def test_of_many_entries_that_do_not_fit_some_are_named():
    """The counts, the prefix and the nearest names, in ten lines."""
    network, variables = _small("resnet18_cifar100")
    entries = to_state_dict(network, variables)
    arrays = {f"encoder.net_{name}": value for name, value in entries.items()}
    with pytest.raises(InteropError) as error:
        from_state_dict(network, arrays)
    lines = str(error.value).splitlines()
    assert len(lines) <= 10
    assert re.match(r"\d+ entries do not fit ResNet with 7 classes", lines[0])
    assert "are missing" in lines[0]
    assert "are unknown; all names there begin with 'encoder.'" in lines[0]
    assert lines[1] == "  fc4.weight: missing, shape (7, 64); nearest there: encoder.net_fc4.weight"
    assert re.match(r"  and \d+ more$", lines[-1])


def test_another_beta_is_a_shape_that_does_not_fit():
    network, variables = _small("vgg7_cifar100")
    other = create_model("vgg7_cifar100", num_classes=7, surgery=Surgery(0.25))
    with pytest.raises(InteropError, match=re.escape("conv_p.weight: shape (64, 32, 3, 3), exp")):
        from_state_dict(other, to_state_dict(network, variables))


def test_a_tree_of_another_network_is_refused():
    _, variables = _small("msdnet_digits")
    with pytest.raises(InteropError, match="VGG has no parameter"):
        to_state_dict(_network("vgg7_cifar100"), variables)


def _timm_backbone(network, variables, classes):
    entries = to_state_dict(network, variables)
    backbone = {n: v for n, v in entries.items() if not n.startswith("exits.")}
    width = backbone["norm.weight"].size
    head = {"head.weight": np.zeros((classes, width), np.float32)}
    return backbone | head | {"head.bias": np.zeros(classes, np.float32)}


def test_a_backbone_with_another_head_starts_a_network():
    network, variables = _small("vit_tiny_patch16")
    arrays = _timm_backbone(network, variables, classes=1000)
    with pytest.raises(InteropError, match=r"exits\.0\.head\.weight: missing"):
        from_state_dict(network, arrays)
    loaded = from_backbone(network, arrays, jax.random.key(3))

    @jax.jit
    def exits(key, images):
        params = network.init(key, images)["params"]
        return {"params": {name: params[name] for name in ("exits_0", "exits_1")}}

    fresh = exits(jax.random.key(3), np.zeros((1, 48, 48, 3), np.float32))
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    for name in ("blocks_0", "blocks_2", "patch_embed"):
        jax.tree.map(
            np.testing.assert_array_equal, loaded["params"][name], variables["params"][name]
        )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    for want, exit_, part in (
        (variables, "exits_1", "norm"),
        (fresh, "exits_1", "head"),
        (fresh, "exits_0", "norm"),
        (fresh, "exits_0", "head"),
    ):
        jax.tree.map(close, loaded["params"][exit_][part], want["params"][exit_][part])


def test_a_head_for_the_same_classes_is_taken():
    """With something before the names, too."""
    network, variables = _small("vit_tiny_patch16")
    arrays = {f"model.{n}": v for n, v in _timm_backbone(network, variables, 7).items()}
    loaded = from_backbone(network, arrays, jax.random.key(0))
    assert not np.any(loaded["params"]["exits_1"]["head"]["kernel"])
    np.testing.assert_array_equal(
        loaded["params"]["blocks_1"]["mlp"]["fc1"]["kernel"],
        variables["params"]["blocks_1"]["mlp"]["fc1"]["kernel"],
    )


def test_an_incomplete_backbone_is_refused():
    network, variables = _small("vit_tiny_patch16")
    arrays = _timm_backbone(network, variables, classes=7)
    del arrays["blocks.1.norm1.weight"]
    with pytest.raises(InteropError, match=r"1 entries .*\n  blocks.1.norm1.weight: missing"):
        from_backbone(network, arrays, jax.random.key(0))
