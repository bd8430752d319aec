"""Initial weights never depend on surgery; VGG's official draw does, when it is asked for."""

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax.interpreters import partial_eval
from test_networks import ONE_OF_A_KIND, quickly

from dfs_jax import models
from dfs_jax.models.layers import split_torch_default
from dfs_jax.surgery import Surgery

# Options that make every network small, by what its name begins with.
SMALL = {
    "msdnet": {"steps": (1, 1), "initial": 4, "growth": 4},
    "vgg": {"widths": ((40, 40), (60,))},
    "resnet": {"width": 4},
    "vit": {"depth": 3, "first_exit": 1, "patch_size": 4},
}
SURGERIES = [
    Surgery(),
    Surgery(beta=0.0, exit_gradient="all"),
    Surgery(beta=0.7, referencing=False),
    Surgery(beta=1.0, partition=False),
]


def build(name: str, surgery: Surgery, **more):
    options = next(options for word, options in SMALL.items() if name.startswith(word))
    return models.create_model(name, num_classes=5, surgery=surgery, **options, **more)


def drawing(network) -> str:
    """What makes the initial weights, as JAX traces it: these operations and no others."""
    images = np.zeros((2, network.smallest_image, network.smallest_image, 3), np.float32)
    closed = jax.make_jaxpr(lambda key: network.init(key, images)["params"])(jax.random.key(0))
    needed, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return str(needed)


def kernels(network) -> dict[str, np.ndarray]:
    """The drawn ones, by their modules."""
    images = np.zeros((2, network.smallest_image, network.smallest_image, 3), np.float32)
    params = jax.device_get(quickly(network.init)(jax.random.key(0), images)["params"])
    flat = traverse_util.flatten_dict(params, sep="/")
    return {path.removesuffix("/kernel"): x for path, x in flat.items() if path.endswith("kernel")}


def assert_uniform(kernel: np.ndarray) -> None:
    """PyTorch's default for a kernel (…, in, out): uniform in ±1/sqrt(fan_in)."""
    bound = 1 / np.sqrt(np.prod(kernel.shape[:-1]))
    assert 0.9 * bound < np.abs(kernel).max() <= bound
    assert abs(kernel.mean()) < 4 * bound / np.sqrt(3 * kernel.size)
    np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=2 / np.sqrt(kernel.size))


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_initial_weights_do_not_depend_on_surgery(name):
    first, *others = (drawing(build(name, surgery)) for surgery in SURGERIES)
    assert "random_bits" in first
    assert others == [first] * len(others)


def test_vgg_draws_its_kernels_whole():
    drawn = kernels(build("vgg7_cifar100", Surgery(0.3)))
    for module, kernel in kernels(build("vgg7_cifar100", Surgery(0.8, partition=False))).items():
        assert_uniform(kernel)
        np.testing.assert_array_equal(kernel, drawn[module])


@pytest.mark.parametrize("partition", [True, False])
def test_split_init_draws_by_where_surgery_cuts(partition):
    """Without partition as well, as the official code does."""
    chosen = {"split_init": True}
    network = build("vgg7_cifar100", Surgery(0.3, partition), **chosen)
    for module, kernel in kernels(network).items():
        if module == "convs_0":  # reads the images: one kernel there too
            assert_uniform(kernel)
        else:
            cut = round(0.3 * kernel.shape[-2])
            assert_uniform(kernel[..., :cut, :])
            assert_uniform(kernel[..., cut:, :])
    assert drawing(network) != drawing(build("vgg7_cifar100", Surgery(0.4, partition), **chosen))


@pytest.mark.parametrize(
    ("shape", "cut"), [((3, 3, 40, 30), 4), ((3, 3, 40, 30), 40), ((40, 100), 20), ((40, 100), 0)]
)
def test_split_draw_is_that_of_two_kernels(shape, cut):
    kernel = np.asarray(split_torch_default(cut)(jax.random.key(1), shape))
    assert kernel.shape == shape
    for part in (kernel[..., :cut, :], kernel[..., cut:, :]):
        if part.size:
            assert_uniform(part)


@pytest.mark.parametrize("name", models.names())
def test_only_vgg_has_the_option_and_it_is_off(name):
    has = "split_init" in models.options(name)
    assert has == name.startswith("vgg")
    assert not models.options(name).get("split_init", False)
