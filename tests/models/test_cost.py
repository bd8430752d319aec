"""Cost and parameters per exit: against the published columns and against hand counts."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax
from shapes import image

from dfs_jax import surgery
from dfs_jax.models import ExitOutputs, MultiExit, create_model
from dfs_jax.models.cost import (
    CONVENTIONS,
    exit_costs,
    minimal_training_multiply_adds,
    training_flops,
)
from dfs_jax.models.layers import BatchNorm, Conv, Dense, global_average_pool, relu
from dfs_jax.ops.pooling import max_pool
from dfs_jax.ops.tags import tagged
from dfs_jax.surgery import Surgery

# Counted by the official code; for resnet18 and VGG, on which that raises, by the same rules.
GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "flops.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_columns(name):
    """With adapters, which count nothing."""
    golden = GOLDEN[name]
    network = create_model(
        name, num_classes=golden["num_classes"], surgery=Surgery(), adapters=True
    )
    costs = exit_costs(network, image(*golden["image_shape"]))
    counted = {
        "cumulative_flops": costs.cumulative,
        "cumulative_params": costs.parameters.cumulative,
        "path_flops": costs.path,
        "path_params": costs.parameters.path,
    }
    for column, numbers in counted.items():
        if column in golden:
            assert list(numbers) == golden[column], column
    if name.startswith("msdnet"):
        _assert_every_printed_digit(name, costs)


def _assert_every_printed_digit(name, costs):
    golden = GOLDEN[name]
    column, unit = ("published_flops_M", 1e6) if "cifar" in name else ("published_flops_G", 1e9)
    assert [round(cost / unit, 2) for cost in costs.cumulative] == golden[column]
    parameters = [round(count / 1e6, 2) for count in costs.parameters.cumulative]
    assert parameters == golden["published_params_M"]


# Every rule on a network whose layers can be counted by hand.


class Tiny(MultiExit):
    """Two exits on 9×9 images with two channels."""

    num_exits = 2
    smallest_image = 9

    def setup(self):
        self.stem = Conv(4, 3, strides=2, use_bias=True, dtype=self.dtype)
        self.depthwise = Conv(4, 3, depthwise=True, dtype=self.dtype)
        self.pointwise = Conv(6, 1, dtype=self.dtype)
        self.norm = BatchNorm(dtype=self.dtype)
        self.first_head = Dense(self.num_classes, dtype=self.dtype)
        self.last_head = Dense(self.num_classes, use_bias=False, dtype=self.dtype)
        self.adapter_layers = self.dense_adapters(24)

    def segment(self, i, x, *, train):
        if i == 0:
            return (max_pool(self.depthwise(relu(self.stem(x))), 2, 2),)
        return (self.norm(self.pointwise(x), train=train),)

    def head(self, i, exit_input, *, train):
        if i == 0:
            pooled = global_average_pool(exit_input)
            return self.first_head(pooled), pooled.stopped()
        flat = exit_input.reshape(exit_input.shape[0], -1)
        return self.last_head(flat), flat


STEM, DEPTHWISE, POINTWISE = 5 * 5 * 4 * (9 * 2), 5 * 5 * 4 * 9, 2 * 2 * 6 * 4
FIRST, LAST = 4 * 3, 24 * 3
RELU, MAX_POOL, MEAN, BIAS = 5 * 5 * 4, 2 * 2 * 4 * 4, 2 * 2 * 4, 3


def _tiny(adapters=False, **kwargs):
    return Tiny(num_classes=3, surgery=Surgery(**kwargs), adapters=adapters)


@pytest.mark.parametrize("adapters", [False, True])
def test_both_conventions_by_hand(adapters):
    costs = exit_costs(_tiny(adapters), image(9, 9, 2))
    segments = (STEM + RELU + DEPTHWISE + MAX_POOL, POINTWISE)
    heads = (MEAN + FIRST + BIAS, LAST)
    assert costs.convention == "published"
    assert costs.segments == segments
    assert costs.heads == heads
    assert costs.path == (segments[0] + heads[0], sum(segments) + heads[1])
    assert costs.cumulative == (segments[0] + heads[0], sum(segments) + sum(heads))
    plain = exit_costs(_tiny(adapters), image(9, 9, 2), convention="multiply_adds")
    assert plain.convention == "multiply_adds"
    assert plain.segments == (STEM + DEPTHWISE, POINTWISE)
    assert plain.heads == (FIRST, LAST)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_parameters_by_hand(adapters, convention):
    counts = exit_costs(_tiny(adapters), image(9, 9, 2), convention=convention).parameters
    segments, heads = ((9 * 2 * 4 + 4) + 9 * 4, 4 * 6 + 2 * 6), (4 * 3 + 3, 24 * 3)
    assert counts.segments == segments
    assert counts.heads == heads
    assert counts.path == (segments[0] + heads[0], sum(segments) + heads[1])
    assert counts.cumulative == (segments[0] + heads[0], sum(segments) + sum(heads))


def test_training_by_hand():
    def counted(**kwargs):
        return minimal_training_multiply_adds(_tiny(**kwargs), image(9, 9, 2))

    # Forward, kernel gradient, input gradient; the images need none.
    fixed = 2 * STEM + 3 * DEPTHWISE + 3 * LAST
    assert counted(partition=False) == fixed + 3 * POINTWISE + 3 * FIRST
    for beta in (0.0, 0.25, 0.5, 1.0):
        live = round(beta * 4) / 4
        halves = (2 + live) * POINTWISE + (3 - live) * FIRST
        assert counted(beta=beta) == fixed + halves, beta
        everything = (2 + live) * POINTWISE + 3 * FIRST
        assert counted(beta=beta, exit_gradient="all") == fixed + everything, beta
    assert counted(adapters=True) == counted()
    batch = jax.ShapeDtypeStruct((32, 9, 9, 2), jnp.float32)
    assert training_flops(_tiny(), batch) == 64 * counted()


@pytest.mark.parametrize("depthwise", [False, True])
def test_live_channels_of_a_convolution(depthwise):
    def layer(p, x):
        x = surgery.Partitioned(p["scale"] * x, ((0, 1), (2, 4)))
        return surgery.conv(x, p["kernel"], groups=8 if depthwise else 1)

    params = {"scale": (8,), "kernel": (3, 3, 1 if depthwise else 8, 16)}
    products = 3 * 3 * 16 * 9 * (1 if depthwise else 8)
    network = Plain(layer, params)
    assert exit_costs(network, image(5, 5, 8)).segments == (products,)
    assert minimal_training_multiply_adds(network, image(5, 5, 8)) == products * (2 + 3 / 8)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vgg7_cifar100", {"widths": ((4, 4), (6,))}),
        ("resnet18_cifar100", {"width": 4}),
        ("msdnet_cifar100", {"steps": (1, 1, 1), "initial": 4, "growth": 4}),
    ],
)
def test_surgery_does_not_change_the_cost(name, options):
    choices = [
        Surgery(partition=False),
        Surgery(beta=0.0, referencing=False),
        Surgery(beta=1.0, exit_gradient="all"),
    ]
    counts = {
        exit_costs(create_model(name, num_classes=10, surgery=choice, **options), image(32, 32, 3))
        for choice in choices
    }
    assert len(counts) == 1


def test_precision_does_not_change_the_cost():
    one, other = (
        exit_costs(
            create_model("msdnet_digits", num_classes=10, surgery=Surgery(), dtype=dtype),
            image(8, 8, 1),
        )
        for dtype in ("bfloat16", "float32")
    )
    assert one == other


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vgg7_cifar100", 32),
        ("msdnet_digits", 8),
        ("resnet18_cifar100", 32),
        ("vit_tiny_patch16", 32),
    ],
)
def test_columns_follow_from_segments_and_heads(name, size):
    network = create_model(name, num_classes=10, surgery=Surgery())
    costs = exit_costs(network, image(size, size, 3))
    for counts in (costs, costs.parameters):
        for i in range(network.num_exits):
            backbone = sum(counts.segments[: i + 1])
            assert counts.path[i] == backbone + counts.heads[i]
            assert counts.cumulative[i] == backbone + sum(counts.heads[: i + 1])
    plain = exit_costs(network, image(size, size, 3), convention="multiply_adds")
    assert all(a <= b for a, b in zip(plain.cumulative, costs.cumulative, strict=True))
    assert plain.parameters == costs.parameters


def test_attention_counts():
    """A vision transformer: convolution, dense layers with biases, two products per head."""
    network = create_model("vit_tiny_patch16", num_classes=10, surgery=Surgery(), adapters=True)
    costs = exit_costs(network, image(32, 32, 3), convention="multiply_adds")
    tokens, width = 5, 192
    block = tokens * 12 * width * width + 2 * tokens * tokens * width
    assert costs.segments[0] == (tokens - 1) * 16 * 16 * 3 * width + 7 * block
    assert costs.segments[1:] == (block,) * 5
    assert costs.heads == (width * 10,) * 6
    published = exit_costs(network, image(32, 32, 3))
    assert published.segments[1] == block + tokens * 9 * width


# Computations inside computations, on a network that is not linen at all.


class Plain:
    """The contract of a network with one exit: `function(params, images)` is its segment."""

    def __init__(self, function, shapes):
        self.function, self.shapes = function, shapes

    def init(self, rng, images):
        del rng, images
        return {"params": {name: jnp.zeros(shape) for name, shape in self.shapes.items()}}

    def apply(self, variables, x, *_, train, method="__call__"):
        assert not train
        if method == "classify":
            return x, x
        y = self.function(variables["params"], x)
        return (None, y) if method == "advance" else ExitOutputs((y,), (y,))


SQUARE = {"w": (4, 4)}


def _multiply_adds(function, shapes=SQUARE):
    costs = exit_costs(Plain(function, shapes), image(2, 3, 4), convention="multiply_adds")
    assert costs.heads == (0,)
    return costs.segments[0]


def _product(p, x):
    return x @ p["w"]


@jax.custom_vjp
def _custom(x, w):
    return x @ w


_custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[1]))


@jax.custom_jvp
def _custom_forward(x, w):
    return x @ w


_custom_forward.defjvp(lambda values, tangents: (values[0] @ values[1], tangents[0] @ values[1]))


def _scanned(p, x):
    return lax.scan(lambda y, _: (_product(p, y), None), x, length=5)[0]


def _looped(p, x):
    return lax.fori_loop(0, 5, lambda _, y: _product(p, y), x)


def _branched(p, x):
    few = [lambda y: y, lambda y: _product(p, y), lambda y: _product(p, _product(p, y))]
    return lax.switch(jnp.int32(jnp.sum(x)), few, x)


@pytest.mark.parametrize(
    ("function", "times"),
    [
        (_product, 1),
        (jax.jit(_product), 1),
        (jax.jit(jax.jit(_product)), 1),
        (jax.checkpoint(_product), 1),
        (lambda p, x: _custom(x, p["w"]), 1),
        (lambda p, x: _custom_forward(x, p["w"]), 1),
        (lambda p, x: jax.vmap(lambda y: _product(p, y))(x), 1),
        (_scanned, 5),
        (_looped, 5),
        (lambda p, x: jax.jit(_scanned)(p, _scanned(p, x)), 10),
        (_branched, 2),
        (lambda p, x: surgery.dense(x, p["w"]), 1),
        (jax.jit(lambda p, x: surgery.dense(x, p["w"])), 1),
    ],
)
def test_nested_computations(function, times):
    assert _multiply_adds(function) == times * 2 * 3 * 4 * 4
    training = minimal_training_multiply_adds(Plain(function, SQUARE), image(2, 3, 4))
    first = times if times > 1 else 0  # a loop's later rounds do have parameters before them
    if function is not _branched:
        assert training == (2 * times + first) * 2 * 3 * 4 * 4
    assert exit_costs(Plain(function, SQUARE), image(2, 3, 4)).parameters.segments == (16,)


def test_stacked_parameters_of_a_scan():
    def stacked(p, x):
        return lax.scan(lambda y, w: (y @ w, None), x, p["w"])[0]

    assert _multiply_adds(stacked, {"w": (7, 4, 4)}) == 7 * 2 * 3 * 4 * 4


def test_arguments_and_results_of_a_scan():
    """Constants, several carried values and slices of data: only `w` lies before a product."""

    def function(p, x):
        def body(carry, row):
            old, number = carry
            return (row @ p["w"], number + 1), (old, row @ p["v"])

        (last, _), (stacked, mapped) = lax.scan(body, (x[0], 0), x)
        return (last + stacked[0] + mapped[0])[None]

    network = Plain(function, {**SQUARE, "v": (4, 4), "unused": (4, 4)})
    product = 2 * 3 * 4 * 4
    assert exit_costs(network, image(2, 3, 4)).segments == (2 * product,)
    assert minimal_training_multiply_adds(network, image(2, 3, 4)) == 2 * product * 2
    assert exit_costs(network, image(2, 3, 4)).parameters.segments == (32,)


@pytest.mark.parametrize("groups", [1, 4])
def test_untagged_convolution(groups):
    def convolve(p, x):
        return lax.conv_general_dilated(
            x,
            p["w"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    assert _multiply_adds(convolve, {"w": (3, 3, 4 // groups, 8)}) == 2 * 3 * 8 * 9 * 4 // groups


def test_what_counts_nothing():
    def function(p, x):
        x = jax.image.resize(x, (1, 8, 8, 4), "bilinear")  # a product with constant matrices
        return jnp.concatenate([x + p["w"][0], jax.nn.sigmoid(x)], axis=-1)

    costs = exit_costs(Plain(function, SQUARE), image(2, 3, 4))
    assert costs.cumulative == (0,)
    assert costs.parameters.cumulative == (16,)


def test_parameters_that_no_operation_reads_do_not_count():
    ignoring = jax.jit(lambda w, unused, x: x @ w)

    def function(p, x):
        return ignoring(p["w"], p["unused"], x)

    network = Plain(function, {**SQUARE, "unused": (100,), "untouched": (100,)})
    assert exit_costs(network, image(2, 3, 4)).parameters.cumulative == (16,)


def test_shared_parameters_count_once():
    class Shared(MultiExit):
        num_exits, smallest_image = 2, 1

        def setup(self):
            self.conv, self.dense = Conv(4, 1), Dense(3)

        def segment(self, i, x, *, train):
            return (self.conv(x),)

        def head(self, i, exit_input, *, train):
            y = global_average_pool(exit_input)
            y = y.stopped() if isinstance(y, surgery.Partitioned) else y
            return self.dense(y), y

    costs = exit_costs(Shared(num_classes=3, surgery=Surgery()), image(1, 1, 4))
    assert costs.cumulative == (16 + 4 + 15, 2 * (16 + 4 + 15))
    assert costs.parameters.cumulative == costs.parameters.path == (16 + 15,) * 2
    assert costs.parameters.segments == (16, 16)


def test_stopped_values_need_no_input_gradient():
    def function(p, x):
        return lax.stop_gradient(x @ p["w"]) @ p["w"]

    product = 2 * 3 * 4 * 4
    counted = minimal_training_multiply_adds(Plain(function, SQUARE), image(2, 3, 4))
    assert counted == 2 * product + 2 * product


def test_linen_remat_and_scan():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.remat(Dense)(4)(x), None

    layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)

    class Looped(MultiExit):
        num_exits, smallest_image = 1, 1

        @nn.compact
        def segment(self, i, x, *, train):
            return (layers()(x, None)[0],)

        def head(self, i, exit_input, *, train):
            return exit_input[:, 0, 0], exit_input

    costs = exit_costs(Looped(num_classes=4, surgery=Surgery()), image(2, 3, 4))
    assert costs.cumulative == (3 * 6 * (16 + 4),)
    assert costs.parameters.cumulative == (3 * (16 + 4),)


# What is refused.


def test_loops_of_unknown_length_are_refused():
    def function(p, x):
        return lax.while_loop(lambda y: jnp.sum(y) > 0, lambda y: _product(p, y), x)

    with pytest.raises(ValueError, match="how often they run is unknown"):
        _multiply_adds(function)
    idle = lambda p, x: lax.while_loop(lambda y: jnp.sum(y) > 0, lambda y: y - 1, x)  # noqa: E731
    assert _multiply_adds(idle) == 0


def test_unknown_tags_are_refused():
    swish = tagged("swish", jax.nn.swish)
    with pytest.raises(ValueError, match=r"'swish'.*tags\.py"):
        _multiply_adds(lambda p, x: swish(x))


def test_bad_requests_are_refused():
    network = create_model("msdnet_cifar100", num_classes=10, surgery=Surgery())
    with pytest.raises(ValueError, match=r"'macs'.*published, multiply_adds"):
        exit_costs(network, image(32, 32, 3), convention="macs")
    with pytest.raises(ValueError, match="17x17"):
        exit_costs(network, image(16, 16, 3))
    with pytest.raises(ValueError, match="takes images"):
        training_flops(network, jax.ShapeDtypeStruct((32, 32, 3), jnp.float32))
