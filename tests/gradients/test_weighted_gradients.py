"""PCGrad, CAGrad and Nash-MTL against NumPy and SciPy in float64."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from dfs_jax import gradients
from dfs_jax.gradients import Aux
from dfs_jax.gradients.cagrad import averse_weights, simplex_argmin
from dfs_jax.gradients.gram import gram, weighted_sum
from dfs_jax.gradients.nash_mtl import bargain
from dfs_jax.gradients.pcgrad import projected

SIZE = 12  # numbers in a gradient


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


class Linear(NamedTuple):
    """Losses g_i · params, so that the gradients are given. Parameters: "a" (3, 2), "b" (6,)."""

    gradients: np.ndarray  # (N, SIZE)

    @property
    def num_exits(self):
        return len(self.gradients)

    def teacher(self, params):
        return None

    def exit_loss(self, params, i, *, teacher):
        trees = self.tree(self.gradients[i])
        loss = sum(jnp.vdot(trees[name], params[name]) for name in params)
        return loss, Aux(loss[None], (), ())

    @staticmethod
    def tree(vector):
        return {"a": jnp.asarray(vector[:6]).reshape(3, 2), "b": jnp.asarray(vector[6:])}


def update(name, vectors, state=None, key=0, **options):
    """The vector that a method makes of given gradients, and its next state."""
    init, apply = compiled(name, len(vectors), **options)
    state = init(Linear.tree(np.ones(SIZE))) if state is None else state
    result, losses, state = apply(jnp.asarray(vectors), state, jax.random.key(key))
    np.testing.assert_allclose(losses, vectors.sum(1), rtol=1e-9, atol=1e-9)
    return np.concatenate([np.ravel(result["a"]), result["b"]]), state


@functools.cache
def compiled(name, count, **options):
    method = gradients.create(name, num_exits=count, **options)

    @tiny.jitted
    def apply(vectors, state, key):
        params = Linear.tree(jnp.ones(SIZE))
        update, aux, state = method.apply(Linear(vectors), params, state, key)
        return update.gradients, aux.losses, state

    return method.init, apply


def jitted(function):
    """Compiled so that float64 divides to its last digit, which XLA's older emitters do not."""
    return jax.jit(function, compiler_options=tiny.QUICK | {"xla_cpu_use_fusion_emitters": True})


argmin = jitted(functools.partial(simplex_argmin, radius=0.5))
weights = jitted(functools.partial(averse_weights, radius=0.5))
bargained = jitted(bargain)
projecting = jitted(projected)


def random(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, SIZE))


def opposed(count):
    vectors = random(count)
    vectors[1] = -2 * vectors[0]
    return vectors


def cancelling(count):
    vectors = random(count)
    vectors[1] = -vectors[0]
    return vectors


def aligned(count):
    return random(1) * np.arange(1, count + 1)[:, None]


def one_zero(count):
    vectors = random(count)
    vectors[-1] = 0
    return vectors


CASES = [
    *((f"random {n}", random(n, seed=n)) for n in (1, 2, 3, 6)),
    *((f"scales {n}", random(n, n) * 10.0 ** np.arange(-2, n - 2)[:, None]) for n in (3, 6)),
    *((f"opposed {n}", opposed(n)) for n in (2, 6)),
    *((f"cancelling {n}", cancelling(n)) for n in (2, 6)),
    *((f"aligned {n}", aligned(n)) for n in (2, 6)),
    *((f"one zero {n}", one_zero(n)) for n in (2, 3)),
]
cases = pytest.mark.parametrize("vectors", [c[1] for c in CASES], ids=[c[0] for c in CASES])


def test_gram_and_weighted_sum_are_those_of_the_vectors():
    vectors = random(4)
    trees = [Linear.tree(v) for v in vectors]
    np.testing.assert_allclose(gram(trees), vectors @ vectors.T, rtol=1e-12)
    shares = np.array([0.5, -1.0, 2.0, 0.0])
    found = weighted_sum(trees, jnp.asarray(shares))
    np.testing.assert_allclose(found["b"], (shares @ vectors)[6:], rtol=1e-12)


def test_gram_of_half_precision_gradients_is_float32():
    trees = [{"w": jnp.full(1000, 0.1, jnp.bfloat16)}] * 2
    found = gram(trees)
    assert found.dtype == jnp.float32
    value = float(jnp.bfloat16(0.1))
    np.testing.assert_allclose(found, np.full((2, 2), 1000 * value**2), rtol=1e-5)


class TestPCGrad:
    @staticmethod
    def by_hand(vectors, orders):
        total = np.zeros(SIZE)
        for i, order in enumerate(orders):
            mine = vectors[i].copy()
            for j in order:
                if j != i and mine @ vectors[j] < 0:
                    mine -= mine @ vectors[j] / (vectors[j] @ vectors[j]) * vectors[j]
            total += mine
        return total

    @cases
    def test_projections_equal_numpy(self, vectors):
        count = len(vectors)
        rng = np.random.default_rng(count)
        orders = np.stack([rng.permutation(count) for _ in range(count)])
        found = projecting(jnp.asarray(vectors @ vectors.T), jnp.asarray(orders)) @ vectors
        want = self.by_hand(vectors, orders)
        np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-9 * abs(vectors).max())

    def test_the_update_of_two_exits_needs_no_order(self):
        vectors = random(2, seed=3)
        vectors[1] -= 2 * vectors[0]
        found, state = update("pcgrad", vectors)
        np.testing.assert_allclose(found, self.by_hand(vectors, [[0, 1], [0, 1]]), rtol=1e-9)
        assert state == ()

    def test_the_order_is_drawn_from_the_key(self):
        vectors = random(5, seed=1)
        vectors -= vectors.mean(0)  # every one is against several others
        first, again, other = (update("pcgrad", vectors, key=key)[0] for key in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert abs(first - other).max() > 1e-6

    def test_gradients_without_conflict_are_summed(self):
        vectors = aligned(5)
        np.testing.assert_allclose(update("pcgrad", vectors)[0], vectors.sum(0), rtol=1e-12)


class TestCAGrad:
    @staticmethod
    def objective(vectors, radius, w):
        mean = vectors.mean(0)
        return mean @ (w @ vectors) + radius * np.linalg.norm(mean) * np.linalg.norm(w @ vectors)

    def minimum(self, vectors, radius):
        """The least value that SciPy finds, from several starts, and its weights."""
        count = len(vectors)
        scale = np.mean(np.sum(vectors**2, 1))
        rng = np.random.default_rng(0)
        starts = [np.full(count, 1 / count), *rng.dirichlet(np.ones(count), 2)]
        ends = [*np.eye(count)]
        for start in starts:
            found = optimize.minimize(
                lambda w: self.objective(vectors, radius, w) / scale,
                start,
                bounds=[(0, 1)] * count,
                constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
                method="SLSQP",
                options={"ftol": 1e-15, "maxiter": 500},
            )
            w = np.clip(found.x, 0, None)
            ends.append(w / w.sum())
        return min(ends, key=lambda w: self.objective(vectors, radius, w)), scale

    @cases
    def test_the_minimum_over_the_simplex_equals_scipys(self, vectors):
        found = np.asarray(argmin(jnp.asarray(vectors @ vectors.T)))
        assert found.min() >= 0
        np.testing.assert_allclose(found.sum(), 1, rtol=1e-12)
        best, scale = self.minimum(vectors, 0.5)
        excess = self.objective(vectors, 0.5, found) - self.objective(vectors, 0.5, best)
        assert excess / scale < 1e-7

    @pytest.mark.parametrize(("count", "radius"), [(5, 0.5), (6, 0.8)])
    def test_the_update_equals_the_papers_formula(self, count, radius):
        vectors = random(count, seed=7)
        w, _ = self.minimum(vectors, radius)
        mean, along = vectors.mean(0), w @ vectors
        ball = radius * np.linalg.norm(mean)
        want = count * (mean + ball / np.linalg.norm(along) * along) / (1 + radius**2)
        found, state = update("cagrad", vectors, radius=radius)
        np.testing.assert_allclose(found, want, rtol=2e-3, atol=1e-3)
        assert state == ()

    def test_no_radius_is_the_plain_sum(self):
        vectors = random(4)
        np.testing.assert_allclose(update("cagrad", vectors, radius=0.0)[0], vectors.sum(0))

    def test_the_worst_off_exit_gains(self):
        vectors = random(5, seed=2)
        direction = update("cagrad", vectors)[0] * 1.25 / 5
        assert (vectors @ direction).min() > (vectors @ vectors.mean(0)).min()

    def test_gradients_that_cancel_leave_no_direction(self):
        found = update("cagrad", cancelling(2))[0]
        np.testing.assert_allclose(found, np.zeros(SIZE), atol=1e-9)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 10_000), st.integers(1, 3), st.floats(-3, 3))
    def test_float32_is_good_enough(self, seed, rank, exponent):
        rng = np.random.default_rng(seed)
        vectors = rng.normal(size=(5, rank)) @ rng.normal(size=(rank, SIZE))
        matrix = vectors @ vectors.T
        exact = np.asarray(argmin(jnp.asarray(matrix)))
        scaled = jnp.asarray(matrix * 10.0**exponent, jnp.float32)
        found = np.asarray(argmin(scaled), float)
        excess = self.objective(vectors, 0.5, found) - self.objective(vectors, 0.5, exact)
        assert excess / np.mean(np.diag(matrix)) < 5e-4  # ‖g_w‖ near 0 has half of the digits
        assert np.isfinite(weights(scaled)).all()

    @pytest.mark.parametrize("radius", [-0.1, 1.0, float("nan")])
    def test_bad_radius(self, radius):
        with pytest.raises(ValueError, match=r"radius must lie in \[0, 1\)"):
            gradients.create("cagrad", radius=radius)


class TestNashMTL:
    @staticmethod
    def solved(matrix):
        """α of G α = 1 / α by SciPy, in log α."""
        matrix = matrix / np.linalg.norm(matrix)
        found = optimize.least_squares(
            lambda u: np.exp(u) * (matrix @ np.exp(u)) - 1,
            -0.5 * np.log(np.diag(matrix)),
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
        )
        assert abs(found.fun).max() < 1e-9
        return np.exp(found.x)

    @pytest.mark.parametrize(
        "vectors",
        [c[1] for c in CASES if c[0].split()[0] in ("random", "scales", "aligned")],
        ids=[c[0] for c in CASES if c[0].split()[0] in ("random", "scales", "aligned")],
    )
    def test_the_bargain_equals_scipys(self, vectors):
        matrix = vectors @ vectors.T
        found = bargained(jnp.asarray(matrix), jnp.ones(len(vectors)))
        np.testing.assert_allclose(found, self.solved(matrix), rtol=1e-9)

    @pytest.mark.parametrize("start", [1e-4, 1.0, 1e4])
    def test_the_bargain_does_not_depend_on_where_it_starts(self, start):
        vectors = random(6)
        matrix = vectors @ vectors.T
        found = bargained(jnp.asarray(matrix), start * jnp.arange(1.0, 7.0))
        np.testing.assert_allclose(found, self.solved(matrix), rtol=1e-9)

    @pytest.mark.parametrize("vectors", [opposed(2), opposed(6), cancelling(3)])
    def test_without_agreement_the_last_weights_stay(self, vectors):
        previous = jnp.linspace(0.5, 2.0, len(vectors))
        found = bargained(jnp.asarray(vectors @ vectors.T), previous)
        np.testing.assert_array_equal(found, previous)

    def test_an_exit_without_gradient_leaves_the_bargain_to_the_others(self):
        vectors = one_zero(3)
        found = bargained(jnp.asarray(vectors @ vectors.T), jnp.ones(3))
        want = self.solved((vectors @ vectors.T)[:2, :2])
        np.testing.assert_allclose(found, [*want, 0], rtol=1e-9)

    def test_nothing_to_bargain_for(self):
        found = bargained(jnp.zeros((3, 3)), jnp.ones(3))
        assert np.isfinite(found).all()

    @pytest.mark.parametrize("max_norm", [1.0, 1e9])
    def test_the_update_is_the_weighted_sum_of_limited_length(self, max_norm):
        vectors = random(3)
        found, state = update("nash_mtl", vectors, max_norm=max_norm)
        alpha = self.solved(vectors @ vectors.T)
        np.testing.assert_allclose(state, alpha, rtol=1e-9)
        want = alpha @ vectors
        want *= min(1, max_norm / np.linalg.norm(want))
        np.testing.assert_allclose(found, want, rtol=1e-9)

    def test_only_tensors_of_several_exits_are_limited(self):
        vectors = 10 * random(2)
        vectors[1, 6:] = 0  # "b" belongs to the first exit alone
        found, alpha = update("nash_mtl", vectors)
        np.testing.assert_allclose(np.linalg.norm(found[:6]), 1, rtol=1e-12)
        np.testing.assert_allclose(found[6:], alpha[0] * vectors[0, 6:], rtol=1e-12)

    def test_the_state_is_where_the_next_step_starts(self):
        _, state = update("nash_mtl", random(3))
        _, kept = update("nash_mtl", opposed(3), state)
        np.testing.assert_array_equal(kept, state)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_norm": 0.0}, "max_norm must be positive"),
            ({"iterations": 0}, "must be 1 to 10,000"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            gradients.create("nash_mtl", num_exits=3, **options)


@pytest.mark.parametrize("name", ["pcgrad", "cagrad", "nash_mtl"])
def test_updates_are_finite_whatever_the_gradients(name):
    for vectors in (opposed(2), cancelling(2), one_zero(2), aligned(2), 1e-6 * random(2)):
        assert np.isfinite(update(name, vectors)[0]).all()


@pytest.mark.parametrize("name", ["pcgrad", "cagrad", "nash_mtl"])
def test_a_single_exit_keeps_its_gradient(name):
    vectors = 3 * random(1)
    np.testing.assert_array_equal(update(name, vectors)[0], vectors[0])
