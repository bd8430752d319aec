"""L2W-DEN: steps of training against the formulas written out, and its parts by hand."""

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_step
import tiny

from dfs_jax import gradients
from dfs_jax.gradients.l2w_den import assigned, initial_mlp
from dfs_jax.objectives import Objective

EXITS, EPSILON, QUOTA, VIRTUAL = 3, 0.7, 0.6, 0.2
RATE, DECAY = 0.01, 0.05  # of the MLP; large, so that they show


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def leaving(confidences, quota):
    """Exit, from 0, at which each example (B,) leaves; the most confident go first."""
    size, count = confidences.shape
    shares = quota ** np.arange(1, count + 1)
    left = set(range(size))
    exits = np.full(size, count - 1)
    for k in range(count - 1):
        number = int(size * shares[k] / shares.sum())
        for b in sorted(left, key=lambda b: -confidences[b, k])[:number]:
            exits[b] = k
            left.remove(b)
    return exits


def weighted(mlp, losses):
    """The weighted loss () of losses (B, N); h sees them as constants."""
    seen = jax.lax.stop_gradient(losses)
    hidden = jnp.maximum(seen @ mlp["hidden_kernel"] + mlp["hidden_bias"], 0)
    answer = jnp.tanh(hidden @ mlp["output_kernel"] + mlp["output_bias"])
    weights = 1 + EPSILON * (answer - answer.mean(1, keepdims=True))
    return (weights * losses).mean(0).sum()


def losses_of(params, batch):
    answers = by_hand.logits(params, batch["image"])
    return by_hand.example_losses(answers, batch["label"]), answers


def moved(mlp, params, batch):
    """Parameters after the virtual step."""
    gradient = jax.grad(lambda p: weighted(mlp, losses_of(p, batch)[0]))(params)
    return jax.tree.map(lambda w, g: w - VIRTUAL * g, params, gradient)


@tiny.jitted
def confidences_after(mlp, params, train, held_out):
    _, answers = losses_of(moved(mlp, params, train), held_out)
    return jnp.stack([jax.nn.softmax(z).max(1) for z in answers], 1)


@tiny.jitted
def slope_of_mlp(mlp, params, train, held_out, exits):
    def meta(mlp):
        losses, _ = losses_of(moved(mlp, params, train), held_out)
        scores = [losses[:, k] * (exits == k) for k in range(EXITS)]
        counts = [jnp.maximum((exits == k).sum(), 1) for k in range(EXITS)]
        return sum(s.sum() / n for s, n in zip(scores, counts, strict=True))

    return jax.grad(meta)(mlp)


@tiny.jitted
def slope(mlp, params, batch):
    return jax.grad(lambda p: weighted(mlp, losses_of(p, batch)[0]))(params)


def adam(values, slopes, moments, count):
    """One step with coupled weight decay: new values, new moments."""
    new, kept = {}, {}
    for k in values:
        g = slopes[k] + DECAY * values[k]
        first = 0.9 * moments[k][0] + 0.1 * g
        second = 0.999 * moments[k][1] + 0.001 * g**2
        mean, square = first / (1 - 0.9**count), second / (1 - 0.999**count)
        new[k], kept[k] = values[k] - RATE * mean / (np.sqrt(square) + 1e-8), (first, second)
    return new, kept


def test_steps_equal_the_formulas():
    run = small_step.make_run(
        "l2w_den",
        epsilon=EPSILON,
        quota=QUOTA,
        virtual_rate=VIRTUAL,
        learning_rate=RATE,
        weight_decay=DECAY,
        hidden=5,
    )
    found = small_step.states(run, size=21)  # halves of ten, and one example left over
    start, _ = next(found)
    params = jax.tree.map(np.asarray, start.params)
    mlp = jax.tree.map(np.asarray, start.method_state[0])
    moments = {k: (np.zeros_like(v), np.zeros_like(v)) for k, v in mlp.items()}
    trace = jax.tree.map(np.zeros_like, params)
    for at in range(2):
        whole = small_step.batch(at, 21)
        even, odd = ({k: x[first:20:2] for k, x in whole.items()} for first in (0, 1))
        for role, (train, held_out) in enumerate([(even, odd), (odd, even)]):
            exits = leaving(np.asarray(confidences_after(mlp, params, train, held_out)), QUOTA)
            assert len(set(exits)) == EXITS
            gradient = jax.device_get(slope_of_mlp(mlp, params, train, held_out, exits))
            mlp, moments = adam(mlp, gradient, moments, 2 * at + role + 1)
        gradient = jax.device_get(slope(mlp, params, whole))
        trace = jax.tree.map(
            lambda t, g, w: small_step.MOMENTUM * t + g + small_step.DECAY * w,
            trace,
            gradient,
            params,
        )
        params = jax.tree.map(lambda w, t: w - small_step.RATE * t, params, trace)
        state, losses = next(found)
        for name, value in mlp.items():
            now = state.method_state[0][name]
            np.testing.assert_allclose(now, value, rtol=1e-8, atol=1e-11, err_msg=name)
        tiny.assert_close(state.params, params, rtol=1e-8, atol=1e-11)
        assert losses.shape == (EXITS,)


@pytest.mark.parametrize("shape", [(1, 3), (9, 1), (25, 4)])
def test_examples_are_handed_out_as_a_budget_would(shape):
    confidences = np.random.default_rng(0).uniform(0.1, 1, shape)
    quotas = (0.3, 0.75, 1.0, 1.5)
    every = tiny.jitted(lambda confidences: [assigned(confidences, quota) for quota in quotas])
    for quota, found in zip(quotas, jax.device_get(every(confidences)), strict=True):
        np.testing.assert_array_equal(found.sum(1), 1)
        np.testing.assert_array_equal(found.argmax(1), leaving(confidences, quota))


def test_the_first_weights_of_h_are_pytorchs():
    mlp = initial_mlp(4, 500, np.float64)
    inputs = {"hidden": 4, "output": 500}
    for name, tensor in mlp.items():
        bound = 1 / np.sqrt(inputs[name.split("_")[0]])
        assert 0.5 * bound < np.abs(tensor).max() <= bound
    assert {name: tensor.shape for name, tensor in mlp.items()} == {
        "hidden_kernel": (4, 500),
        "hidden_bias": (500,),
        "output_kernel": (500, 4),
        "output_bias": (4,),
    }


def test_refusals():
    method = gradients.create("l2w_den", num_exits=3)
    whole_batch = Objective(feature_weight=0.1, feature_reduction="batch_norm")
    with pytest.raises(ValueError, match='no loss per example; use "mean"'):
        method.check(tiny.network(), whole_batch)
    method.check(tiny.network(), Objective(feature_weight=0.1))
    params, problem = tiny.problem(tiny.network(), size=1)
    with pytest.raises(ValueError, match="halves the batch, which has one example"):
        jax.eval_shape(lambda p, s: method.apply(problem, p, s, None), params, method.init(params))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 1.0}, r"epsilon must lie in \[0, 1\), got 1.0"),
        ({"quota": 0.0}, "quota must be positive, got 0.0"),
        (
            {"quota": 1e101},
            r"quota, to the power of 3 exits, must stay .*got 1e[+]101",
        ),
        ({"virtual_rate": float("nan")}, "virtual_rate must be positive, got nan"),
        ({"hidden": 0}, "hidden must be positive, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be 0 or more, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more, got -1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        gradients.create("l2w_den", num_exits=3, **options)
