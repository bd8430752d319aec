"""The fast formulations of convolution against the library's, and where each of them runs."""

import re

import jax
import jax.numpy as jnp
import pytest
from by_library import PROPERTY, assert_equal_with_gradients, random
from hypothesis import example, given
from hypothesis import strategies as st
from plain_networks import conv as plain_conv

from dfs_jax.ops import compiler
from dfs_jax.surgery import Partitioned, conv

PADDINGS = st.sampled_from([0, 1, "SAME", ((0, 2), (1, 0))])


@PROPERTY
@given(
    size=st.sampled_from([3, 5, 8, 9]),
    channels=st.integers(1, 4),
    outputs=st.integers(1, 3),
    window=st.sampled_from([(1, 1), (3, 3), (2, 3)]),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=PADDINGS,
    dead=st.booleans(),
    seed=st.integers(0, 99),
)
def test_convolution_is_the_library_s(
    size, channels, outputs, window, strides, padding, dead, seed
):
    live = ((channels // 2, channels),) if dead else ((0, channels),)
    choice = {"strides": strides, "padding": padding}
    with jax.enable_x64(True):
        x = random(seed, 2, size, size + 1, channels)
        kernel = random(seed + 1, *window, channels, outputs)
        assert_equal_with_gradients(
            lambda x, k: conv(Partitioned(x, live), k, **choice),
            lambda x, k: plain_conv(Partitioned(x, live), k, **choice),
            *(x, kernel),
        )


@PROPERTY
@given(
    batch=st.sampled_from([1, 2, 7, 12, 16, 40]),
    size=st.sampled_from([12, 16, 33, 70]),
    channels=st.integers(1, 3),
    outputs=st.integers(1, 3),
    strides=st.integers(1, 2),
    seed=st.integers(0, 99),
)
@example(batch=40, size=16, channels=3, outputs=2, strides=1, seed=0)  # ten pieces
@example(batch=16, size=16, channels=2, outputs=3, strides=1, seed=0)  # one, all of its pixels
@example(batch=1, size=70, channels=2, outputs=2, strides=1, seed=0)  # an image that is longer
def test_pointwise_convolution_in_pieces_is_the_library_s(
    batch, size, channels, outputs, strides, seed
):
    with jax.enable_x64(True):
        x, kernel = random(seed, batch, size, size, channels), random(seed, 1, 1, channels, outputs)
        assert_equal_with_gradients(
            lambda x, k: conv(x, k, strides=strides, padding=0),
            lambda x, k: plain_conv(x, k, strides=strides, padding=0),
            *(x, kernel),
        )


@PROPERTY
@given(
    size=st.integers(3, 7),
    channels=st.integers(1, 4),
    multiplier=st.integers(1, 2),
    strides=st.integers(1, 3),
    padding=PADDINGS,
    seed=st.integers(0, 99),
)
def test_depthwise_convolution_is_the_library_s(size, channels, multiplier, strides, padding, seed):
    choice = {"strides": strides, "padding": padding, "groups": channels}
    with jax.enable_x64(True):
        x = random(seed, 2, size, size + 1, channels)
        kernel = random(seed + 1, 3, 3, 1, channels * multiplier)
        assert_equal_with_gradients(
            lambda x, k: conv(x, k, **choice), lambda x, k: plain_conv(x, k, **choice), x, kernel
        )


# Where which formulation runs.


def _gradients(strides, padding, groups=1):
    def loss(x, kernel):
        return jnp.sum(jnp.sin(conv(x, kernel, strides=strides, padding=padding, groups=groups)))

    return jax.jit(jax.grad(loss, (0, 1)))


CASES = {
    "ordinary": (_gradients(1, 1), (3, 3, 16, 16)),
    "strided": (_gradients(2, 1), (3, 3, 16, 16)),
    "pointwise": (_gradients(1, 0), (1, 1, 16, 16)),
    "strided pointwise": (_gradients(2, 0), (1, 1, 16, 16)),
    "depthwise": (_gradients(2, 1, 16), (3, 3, 1, 16)),
}
# Convolutions that are left on CPU; of the four phases of a strided one, one is 1×1 and becomes a
# matrix product.
CONVOLUTIONS = {"ordinary": 3, "strided": 5, "pointwise": 0, "strided pointwise": 0, "depthwise": 0}
IMAGES = (64, 32, 32, 16)


def _abstract(shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("case", CASES)
def test_other_platforms_keep_the_library_s(case, platform):
    function, kernel = CASES[case]
    traced = function.trace(_abstract(IMAGES), _abstract(kernel))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == 3
    assert "stablehlo.dot_general" not in text


@pytest.mark.parametrize("case", CASES)
def test_cpu_runs_the_fast_formulation(case):
    function, kernel = CASES[case]
    text = function.lower(_abstract(IMAGES), _abstract(kernel)).compile().as_text()
    assert "conditional(" not in text
    assert text.count(" convolution(") == CONVOLUTIONS[case]


def test_a_kernel_gradient_does_not_compute_its_operands_again():
    """Within its transpositions the compiler would, in an order that no cache likes."""

    def loss(kernel, x):
        return jnp.sum(jnp.sin(conv(jax.nn.relu(2 * x + 1), kernel, padding=1)))

    function = jax.jit(jax.grad(loss))
    arguments = _abstract((3, 3, 16, 16)), _abstract(IMAGES)
    text = function.lower(*arguments).compile(compiler_options=compiler.options()).as_text()
    assert text.count(" maximum(") == 1


@pytest.mark.parametrize("strides", [1, 2])
def test_a_loop_has_forward_convolutions_alone(strides):
    """In a loop XLA's CPU backend computes those of any other layout by itself, and slowly."""

    def loss(kernel, x):
        return jnp.sum(jnp.sin(conv(x, kernel, strides=strides, padding=1)))

    def curvature(kernel, x):
        return jax.grad(lambda kernel: jnp.sum(jax.grad(loss, 1)(kernel, x) ** 2))(kernel)

    def both(total, x):
        return total + jax.grad(loss)(total, x) + curvature(total, x), None

    function = jax.jit(lambda kernel, batches: jax.lax.scan(both, kernel, batches)[0])
    kernel, batches = _abstract((3, 3, 16, 16)), _abstract((3, 8, 16, 16, 16))
    text = function.lower(kernel, batches).compile().as_text()
    layouts = re.findall(r" convolution\(.*dim_labels=([\w>-]+)", text)
    assert " while(" in text
    assert len(layouts) > 3
    assert set(layouts) == {"b01f_01io->b01f"}


@pytest.mark.parametrize(
    ("case", "images"), [*((case, IMAGES) for case in CASES), ("pointwise", (64, 8, 8, 16))]
)
def test_eight_devices_move_no_activation(case, images):
    """The only thing that they exchange is the kernel's gradient, once."""
    function, kernel = CASES[case]
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    same = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    text = function.lower(_abstract(images, spread), _abstract(kernel, same)).compile().as_text()
    assert "conditional(" not in text
    for moving in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert moving not in text
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1


@pytest.mark.parametrize("case", CASES)
def test_no_formulation_has_more_products(case):
    function, kernel = CASES[case]
    arguments = _abstract(IMAGES), _abstract(kernel)
    one = jnp.zeros(())

    def plain(x, kernel):
        strides = 2 if "strided" in case or case == "depthwise" else 1
        groups = 16 if case == "depthwise" else 1
        padding = 0 if "pointwise" in case else 1
        y = plain_conv(x, kernel, strides=strides, padding=padding, groups=groups)
        return jnp.sum(jnp.sin(y)) + one

    reference = jax.jit(jax.grad(plain, (0, 1)))
    ours, theirs = (compiler.flops(f.lower(*arguments).compile()) for f in (function, reference))
    # The library's count leaves the products with padding out.
    assert ours <= (1.1 if case == "depthwise" else 1.05) * theirs
