"""The contract of every network of the registry: shapes and types of all of them as published,
values of small ones."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax import models
from dfs_jax.models import traced
from dfs_jax.surgery import Surgery

# Name: side of the images it is made for, exits.
PUBLISHED = {
    "msdnet_cifar100": (32, 7),
    "msdnet_digits": (8, 4),
    "msdnet_imagenet": (224, 5),
    "resnet18_cifar100": (32, 4),
    "resnet34_cifar100": (32, 4),
    "resnet50_cifar100": (32, 4),
    "resnet101_cifar100": (32, 4),
    "vgg7_cifar100": (32, 6),
    "vgg16_imagenet": (224, 13),
    "vit_tiny_patch16": (224, 6),
    "vit_small_patch16": (224, 6),
    "vit_base_patch16": (224, 6),
}

# Those that differ in more than the number and the width of their layers.
ONE_OF_A_KIND = (
    "msdnet_cifar100",
    "msdnet_digits",
    "msdnet_imagenet",
    "resnet18_cifar100",
    "resnet50_cifar100",
    "vgg7_cifar100",
    "vgg16_imagenet",
    "vit_tiny_patch16",
)

# Small ones, one per class and kind of block, that are cheap to run.
SMALL = {
    "msdnet_cifar100": (20, {"steps": (1, 1, 1), "initial": 4, "growth": 4}),
    "vgg7_cifar100": (8, {"widths": ((4, 4), (6,))}),
    "resnet18_cifar100": (8, {"width": 4}),
    "vit_tiny_patch16": (8, {"depth": 4, "first_exit": 1, "patch_size": 4}),
}

# Counted elsewhere: torchvision's ResNets without their last layer, the 3×3 stem (3·3·3·64)
# in the place of the 7×7 one (7·7·3·64).
TORCHVISION = {
    "resnet18_cifar100": 11_689_512 - 1000 * 513,
    "resnet34_cifar100": 21_797_672 - 1000 * 513,
    "resnet50_cifar100": 25_557_032 - 1000 * 2049,
    "resnet101_cifar100": 44_549_160 - 1000 * 2049,
}
# timm's vit_*_patch16_224 with 1000 classes.
TIMM = {
    "vit_tiny_patch16": 5_717_416,
    "vit_small_patch16": 22_050_664,
    "vit_base_patch16": 86_567_656,
}
# The official DFS code's count of everything, heads of all exits included.
OFFICIAL = {
    "msdnet_cifar100": 7_362_348,
    "msdnet_imagenet": 23_958_440,
    "resnet18_cifar100": 12_283_344,
    "vgg7_cifar100": 1_235_968,
    "vgg16_imagenet": 18_942_976,
}


def classes_of(name: str) -> int:
    return 1000 if PUBLISHED[name][0] == 224 else 100


def published(name: str, **more):
    """The network as published, and the shapes of its answers and variables."""
    model = models.create_model(name, num_classes=classes_of(name), surgery=Surgery(), **more)
    images = jax.ShapeDtypeStruct((2, *[PUBLISHED[name][0]] * 2, 3), jnp.float32)
    return model, *jax.eval_shape(model.init_with_output, jax.random.key(0), images)


def small(name: str, **more):
    size, options = SMALL[name]
    model = models.create_model(name, num_classes=5, surgery=Surgery(), **options, **more)
    images = np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
    return model, images


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


def parameters(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def shallow_part(model, images):
    """Shapes of the variables that exits 1 and 2 have."""
    return jax.eval_shape(lambda k, x: model.init(k, x, num_exits=2), jax.random.key(0), images)


def leaves_of(tree) -> dict:
    return dict(jax.tree_util.tree_flatten_with_path(tree)[0])


def test_registry_is_covered():
    assert set(PUBLISHED) == set(models.names())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_network(name):
    model, out, variables = published(name, adapters=True)
    exits, classes = PUBLISHED[name][1], classes_of(name)
    assert model.num_exits == exits == len(out.logits) == len(out.features)
    for logits, feature in zip(out.logits, out.features, strict=True):
        assert (logits.shape, logits.dtype) == ((2, classes), jnp.float32)
        assert (feature.shape, feature.dtype) == (out.features[-1].shape, jnp.float32)
    params = dict(variables["params"])
    extra = [module for module in params if module.startswith("adapter_layers_")]
    assert len(extra) == exits - 1
    without = {module: tree for module, tree in params.items() if module not in extra}
    trunk = {module: tree for module, tree in without.items() if not module.startswith("exits_")}
    if name in OFFICIAL:
        assert parameters(without) == OFFICIAL[name]
    if name in TORCHVISION:
        assert parameters(trunk) == TORCHVISION[name] - 64 * 3 * (49 - 9)
    if name in TIMM:
        assert parameters(trunk) + parameters(without[f"exits_{exits - 1}"]) == TIMM[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_options_are_accepted(name):
    options = models.options(name)
    assert options["dropout_rate"] is None
    assert not options["adapters"]
    model = models.create_model(name, num_classes=3, surgery=Surgery(), **options)
    assert model.num_classes == 3
    assert model.dropout_rate == (0.5 if "msdnet" in name else 0.0)


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_smallest_images(name):
    model = models.create_model(name, num_classes=3, surgery=Surgery())
    side = model.smallest_image

    def init(*shape):
        return jax.eval_shape(
            model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32)
        )

    init(2, side, side, 3)
    for shape in ((2, side - 1, side, 3), (2, side, side - 1, 3)):
        with pytest.raises(ValueError, match=f"at least {side}x{side} pixels"):
            init(*shape)
    with pytest.raises(ValueError, match="takes images"):
        init(side, side, 3)


@pytest.mark.parametrize("name", SMALL)
def test_types(name):
    def types(dtype):
        model, images = small(name, dtype=dtype, adapters=True)
        variables = traced.variables(model, images)
        results = jax.eval_shape(
            lambda v: model.apply(
                v, images, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)}
            ),
            variables,
        )
        return {leaf.dtype for leaf in jax.tree.leaves((variables, results))}

    assert types(jnp.float32) == {jnp.dtype("float32")}
    assert types(jnp.bfloat16) == {jnp.dtype("float32")}
    with jax.enable_x64(True):
        assert types(jnp.float64) == {jnp.dtype("float64")}


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_is_close(name):
    model, images = small(name)
    low = small(name, dtype=jnp.bfloat16)[0]
    variables = filled(traced.variables(model, images))
    wanted, found = quickly(lambda v: (model.apply(v, images), low.apply(v, images)))(variables)
    for a, b in zip(wanted.logits, found.logits, strict=True):
        np.testing.assert_allclose(a, b, atol=0.05 * max(1.0, np.abs(a).max()))


@pytest.mark.parametrize("name", SMALL)
def test_segments_and_prefixes_equal_the_whole(name):
    """In train mode with dropout: logits, features and statistics."""
    model, images = small(name, dropout_rate=0.3, adapters=True)
    mode = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(1)}}

    @quickly
    def run(variables):
        whole = model.apply(variables, images, **mode)
        prefix = model.apply(variables, images, num_exits=2, **mode)
        carry, answers, stats = images, [], variables.get("batch_stats", {})
        for i in range(model.num_exits):
            (carry, exit_input), state = model.apply(
                {**variables, "batch_stats": stats}, carry, i, method="advance", **mode
            )
            stats = state.get("batch_stats", stats)
            answer, state = model.apply(
                {**variables, "batch_stats": stats}, exit_input, i, method="classify", **mode
            )
            stats = state.get("batch_stats", stats)
            answers.append(answer)
        assert carry is None
        return whole, prefix, (answers, stats)

    variables = filled(traced.variables(model, images))
    (whole, moved), (prefix, prefix_moved), (answers, stats) = run(variables)
    close = {"rtol": 1e-4, "atol": 1e-4}
    assert len(answers) == len(whole.logits) == model.num_exits
    for i, (logits, feature) in enumerate(answers):
        np.testing.assert_allclose(logits, whole.logits[i], **close)
        np.testing.assert_allclose(feature, whole.features[i], **close)
    assert len(prefix.logits) == len(prefix.features) == 2
    for i in range(2):
        np.testing.assert_allclose(prefix.logits[i], whole.logits[i], **close)
        np.testing.assert_allclose(prefix.features[i], whole.features[i], **close)

    before, after = leaves_of(variables.get("batch_stats", {})), moved.get("batch_stats", {})
    near = leaves_of(shallow_part(model, images).get("batch_stats", {}))
    assert set(leaves_of(after)) == set(leaves_of(stats)) == set(before)
    for path, value in leaves_of(after).items():
        np.testing.assert_allclose(leaves_of(stats)[path], value, **close)
        assert not np.array_equal(value, before[path])
        left = leaves_of(prefix_moved["batch_stats"])[path]
        if path in near:
            np.testing.assert_allclose(left, value, **close)
        else:
            np.testing.assert_array_equal(left, before[path])


@pytest.mark.parametrize("name", SMALL)
def test_prefix_needs_nothing_deeper(name):
    """It runs on the variables of its own exits alone, which are fewer."""
    model, images = small(name)
    variables = traced.variables(model, images)
    shallow = shallow_part(model, images)
    assert parameters(shallow["params"]) < parameters(variables["params"])
    out = jax.eval_shape(lambda v, x: model.apply(v, x, num_exits=2), shallow, images)
    assert len(out.logits) == 2


@pytest.mark.parametrize("num_exits", [0, 4, -1])
def test_number_of_exits_is_checked(num_exits):
    model, images = small("vgg7_cifar100")
    with pytest.raises(ValueError, match=r"num_exits must lie in 1\.\.3"):
        jax.eval_shape(lambda key: model.init(key, images, num_exits=num_exits), jax.random.key(0))


def test_errors_name_the_known():
    def create(name, num_classes=3, **options):
        return models.create_model(name, num_classes=num_classes, surgery=Surgery(), **options)

    with pytest.raises(ValueError, match="unknown network 'resnet19'") as error:
        create("resnet19")
    assert all(name in str(error.value) for name in models.names())
    with pytest.raises(ValueError, match="unknown network 'resnet19'"):
        models.options("resnet19")
    with pytest.raises(ValueError, match="no option 'stages'; its options: width"):
        create("resnet18_cifar100", stages=3)
    with pytest.raises(ValueError, match="its options: depth, patch_size, first_exit"):
        create("vit_tiny_patch16", width=3)
    for wrong in ({"num_classes": 0}, {"dropout_rate": 1.0}, {"dropout_rate": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            create("vgg7_cifar100", **wrong)
    with pytest.raises(TypeError):
        create("vgg7_cifar100", dtype="float33")
