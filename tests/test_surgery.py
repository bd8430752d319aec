"""Surgery against its definition: stop_gradient and concatenate, then plain lax operations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from dfs_jax import models
from dfs_jax.surgery import Partitioned, Surgery, conv, dense

PROPERTY = settings(max_examples=8, deadline=None)
BETAS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 0.9, 1.0])
MODES = ("joint", "partition", "own", "all")


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def surgery_of(mode: str, beta: float) -> Surgery:
    return Surgery(
        beta=beta,
        partition=mode != "joint",
        referencing=mode != "partition",
        exit_gradient="all" if mode == "all" else "own",
    )


def defined_views(mode: str, beta: float, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(what the next segment sees, what the exit sees), by the table of the method."""
    k = round(beta * x.shape[-1])
    plus, sub = x[..., :k], x[..., k:]
    sg, join = lax.stop_gradient, functools.partial(jnp.concatenate, axis=-1)
    return {
        "joint": (x, x),
        "partition": (join([plus, 0 * sub]), join([0 * plus, sub])),
        "own": (join([plus, sg(sub)]), join([sg(plus), sub])),
        "all": (join([plus, sg(sub)]), x),
    }[mode]


def lax_conv(x, kernel, strides, padding, groups=1):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=dimensions, feature_group_count=groups
    )


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def masked(x: jax.Array, live) -> jax.Array:
    alive = np.zeros(x.shape[-1], bool)
    for start, stop in live:
        alive[start:stop] = True
    return jnp.where(alive, x, lax.stop_gradient(x))


def assert_close(ours, theirs, tolerance=1e-10):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, theirs
    )


def assert_same(ours, theirs, *arguments, tolerance=1e-10):
    """Two functions of the same arguments, in one compilation: these take most of the time."""
    both = jax.jit(lambda *arguments: (ours(*arguments), theirs(*arguments)))
    assert_close(*both(*arguments), tolerance)


ranges = st.lists(st.integers(0, 9), min_size=2, max_size=6).map(
    lambda cuts: tuple(zip(sorted(cuts)[0::2], sorted(cuts)[1::2], strict=False))
)


@PROPERTY
@given(
    mode=st.sampled_from(MODES),
    beta=BETAS,
    channels=st.integers(1, 7),
    size=st.integers(3, 6),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padding=st.sampled_from(["SAME", "VALID", ((1, 1), (1, 1)), ((0, 2), (1, 0))]),
    window=st.sampled_from([(1, 1), (3, 3), (2, 3)]),
    seed=st.integers(0, 99),
)
def test_convolution_follows_the_definition(
    mode, beta, channels, size, strides, padding, window, seed
):
    """Both views of a feature, each through a convolution: values and all gradients."""
    x = random(seed, 2, size, size + 1, channels)
    kernels = [random(seed + i, *window, channels, 3) for i in (1, 2)]
    surgery = surgery_of(mode, beta)

    def ours(x, kernels):
        views = surgery.to_next(x), surgery.to_exit(x)
        return [conv(v, k, strides=strides, padding=padding) for v, k in zip(views, kernels)]  # noqa: B905

    def theirs(x, kernels):
        views = defined_views(mode, beta, x)
        return [lax_conv(v, k, strides, padding) for v, k in zip(views, kernels)]  # noqa: B905

    def with_gradients(f):
        return lambda *a: (
            f(*a),
            jax.grad(lambda *a: sum(jnp.sum(jnp.sin(y)) for y in f(*a)), (0, 1))(*a),
        )

    assert_same(with_gradients(ours), with_gradients(theirs), x, kernels)


@PROPERTY
@given(live=ranges, width=st.integers(1, 4), seed=st.integers(0, 99), leading=st.integers(1, 3))
def test_dense_follows_the_definition(live, width, seed, leading):
    x = random(seed, *range(2, 2 + leading), 9)
    kernel, bias = random(seed + 1, 9, width), random(seed + 2, width)

    def ours(x, kernel, bias):
        return jnp.sum(jnp.sin(dense(Partitioned(x, live), kernel, bias)))

    def theirs(x, kernel, bias):
        return jnp.sum(jnp.sin(masked(x, live) @ kernel + bias))

    gradients = functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    assert_same(gradients(ours), gradients(theirs), x, kernel, bias)


@PROPERTY
@given(live=ranges, multiplier=st.integers(1, 2), seed=st.integers(0, 99))
def test_depthwise_convolution_follows_the_definition(live, multiplier, seed):
    x, kernel = random(seed, 2, 5, 4, 9), random(seed + 1, 3, 3, 1, 9 * multiplier)

    def ours(x, kernel):
        y = conv(Partitioned(x, live), kernel, strides=2, padding=1, groups=9)
        return jnp.sum(jnp.sin(y))

    def theirs(x, kernel):
        return jnp.sum(jnp.sin(lax_conv(masked(x, live), kernel, (2, 2), ((1, 1),) * 2, 9)))

    assert_same(jax.value_and_grad(ours, (0, 1)), jax.value_and_grad(theirs, (0, 1)), x, kernel)


@pytest.mark.slow
@PROPERTY
@given(live=ranges, seed=st.integers(0, 99))
def test_gradient_of_gradient_follows_the_definition(live, seed):
    x, kernel = random(seed, 2, 4, 4, 9), random(seed + 1, 3, 3, 9, 2)

    def penalty(loss):
        def squared_gradients(x, kernel):
            return sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(x, kernel))

        return jax.grad(squared_gradients, (0, 1))

    def ours(x, kernel):
        return jnp.sum(conv(Partitioned(x, live), kernel, padding=1) ** 3)

    def theirs(x, kernel):
        return jnp.sum(lax_conv(masked(x, live), kernel, (1, 1), ((1, 1),) * 2) ** 3)

    assert_same(penalty(ours), penalty(theirs), x, kernel, tolerance=1e-9)


@PROPERTY
@given(lives=st.lists(ranges, min_size=1, max_size=3), seed=st.integers(0, 99))
def test_concatenation_keeps_dead_channels_dead(lives, seed):
    """Joined partitioned and plain features: same values and gradients as masking each."""
    parts = [random(seed + i, 2, 9) for i in range(len(lives) + 1)]

    def ours(parts):
        features = [Partitioned(x, live) for x, live in zip(parts, lives, strict=False)]
        joined = Partitioned.concat([*features, parts[-1]])
        return joined.live, jnp.sum(jnp.sin(joined.stopped()))

    def theirs(parts):
        features = [masked(x, live) for x, live in zip(parts, lives, strict=False)]
        return jnp.sum(jnp.sin(jnp.concatenate([*features, parts[-1]], axis=-1)))

    live, _ = ours(parts)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(live)), "touching ranges are one"
    assert_same(jax.value_and_grad(lambda p: ours(p)[1]), jax.value_and_grad(theirs), parts)


@pytest.mark.parametrize("transform", ["jit", "vmap", "remat", "sharding"])
def test_transformations_keep_values_and_gradients(transform):
    x, kernel = random(0, 8, 2, 4, 4, 6), random(1, 3, 3, 6, 5)

    def loss(x, kernel):
        return jnp.sum(jnp.sin(conv(Partitioned(x, ((1, 3), (4, 5))), kernel, padding=1)))

    gradients = jax.grad(loss, (0, 1))
    one = jax.jit(gradients)
    expected = [jax.device_get(one(example, kernel)) for example in x]
    if transform == "vmap":
        dx, dk = jax.vmap(gradients, in_axes=(0, None))(x, kernel)
        assert_close(dx, np.stack([e[0] for e in expected]))
        assert_close(dk, jnp.stack([e[1] for e in expected]))
        return
    if transform == "sharding":
        mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec("data")
        batch = jax.device_put(x.reshape(16, 4, 4, 6), jax.sharding.NamedSharding(mesh, spec))
        dx, dk = jax.jit(gradients)(batch, kernel)
        assert_close(dx, np.concatenate([e[0] for e in expected]))
        assert_close(dk, sum(e[1] for e in expected))
        return
    wrapped = jax.jit(gradients) if transform == "jit" else jax.grad(jax.remat(loss), (0, 1))
    assert_close(wrapped(x[0], kernel), expected[0])


def test_bfloat16_stays_bfloat16_and_close():
    x, kernel = random(0, 2, 6, 6, 8), random(1, 3, 3, 8, 4)
    live = ((2, 5),)

    def loss(x, kernel):
        return jnp.sum(conv(Partitioned(x, live), kernel, padding=1).astype(jnp.float32))

    short = [a.astype(jnp.bfloat16) for a in (x, kernel)]
    gradients = jax.grad(loss, (0, 1))(*short)
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2
    exact = jax.grad(loss, (0, 1))(x, kernel)
    for ours, true in zip(gradients, exact, strict=True):
        error = jnp.linalg.norm(ours.astype(float) - true) / jnp.linalg.norm(true)
        assert error < 0.02


def test_forward_mode_is_refused_by_jax():
    x = random(0, 2, 4, 4, 3)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: conv(Partitioned(x, ((0, 1),)), random(1, 1, 1, 3, 2)), (x,), (x,))


@given(channels=st.integers(0, 300), beta=st.floats(0, 1))
def test_cut_rounds_as_python_does(channels, beta):
    surgery = Surgery(beta=beta)
    assert surgery.cut(channels) == round(beta * channels)
    if channels:
        x = jax.ShapeDtypeStruct((1, channels), jnp.float32)
        onwards, aside = (
            jax.eval_shape(view, x).live for view in (surgery.to_next, surgery.to_exit)
        )
        covered = [c for start, stop in onwards + aside for c in range(start, stop)]
        assert covered == list(range(channels)), "every channel is trained by exactly one side"


@pytest.mark.parametrize(("channels", "cut"), [(5, 2), (1, 0), (127, 64), (3, 2), (64, 32)])
def test_cut_of_a_half_goes_to_even(channels, cut):
    assert Surgery(beta=0.5).cut(channels) == cut


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": -0.1}, "beta must lie in"),
        ({"beta": 1.1}, "beta must lie in"),
        ({"beta": float("nan")}, "beta must lie in"),
        ({"exit_gradient": "both"}, '"own" or "all"'),
        ({"beta": ()}, "beta must lie in"),
        ({"beta": (0.5, 2.0)}, "beta must lie in"),
        ({"first_exit": 0}, "first_exit must be 1 or more"),
    ],
)
def test_bad_choices_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Surgery(**fields)


@pytest.mark.parametrize(
    ("surgery", "cuts"),
    [
        (Surgery(beta=(0.25, 0.5)), (1, 3)),
        (Surgery(beta=(0.25, 0.5), first_exit=2), (None, 3)),
        (Surgery(first_exit=3), (None, None)),
    ],
)
def test_each_place_has_its_cut(surgery, cuts):
    """Which exits train which channels of the two features between the segments of a VGG."""
    network = models.create_model(
        "vgg7_cifar100", num_classes=3, surgery=surgery, widths=((4,), (6,), (4,))
    )
    images = random(0, 4, 8, 8, 1).astype(np.float32)
    variables = network.init(jax.random.key(0), images)

    def losses(params):
        out, _ = network.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.stack([jnp.sum(jnp.square(z - 1)) for z in out.logits])

    gradients = jax.jit(jax.jacrev(losses))(variables["params"])
    for i, cut in enumerate(cuts):
        kernel = gradients[f"convs_{i}"]["kernel"]
        trained = np.any(np.asarray(kernel) != 0, axis=(1, 2, 3))  # (exits, channels)
        channels = np.arange(trained.shape[-1])
        for j in range(i, 3):
            own = channels >= (cut or 0) if j == i else channels < (cut or len(channels))
            np.testing.assert_array_equal(trained[j], own if cut else True)


def test_a_surgery_that_does_not_fit_the_network_is_refused():
    for surgery, message in (
        (Surgery(beta=(0.5,)), "beta has 1 values, and 2 features of the network's 3 exits"),
        (Surgery(first_exit=4), "first_exit = 4 is no exit of the network's 3"),
    ):
        with pytest.raises(ValueError, match=message):
            models.create_model(
                "vgg7_cifar100", num_classes=2, surgery=surgery, widths=((4,), (4,), (4,))
            )


def test_kernel_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit 4 channels"):
        conv(random(0, 1, 5, 5, 4), random(1, 3, 3, 5, 2))
