"""Confidence-gated training against weights that are found one example at a time, in NumPy."""

import dataclasses

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dfs_jax import gradients
from dfs_jax.gradients.confidence_gated import example_weights
from dfs_jax.objectives import Objective

THRESHOLD = 0.4  # fresh weights are not surer


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def weights_of(answers, labels, gate, threshold):
    """λ (B, N) for logits N × (B, K) and distributions (B, K)."""
    weights = np.ones((len(labels), len(answers)))
    for b, label in enumerate(labels):
        for i in range(1, len(answers)):
            for z in answers[:i]:
                p = np.exp(z[b]) / np.exp(z[b]).sum()
                done = p.argmax() == label.argmax() and p.max() >= threshold
                weights[b, i] *= 1 - label @ p if gate == "soft" else 0 if done else 1
    return weights


def cross_entropies(answers, labels):
    """Losses (B, N) for distributions (B, K)."""
    log_sums = [jnp.log(jnp.exp(z).sum(1)) for z in answers]
    pairs = zip(log_sums, answers, strict=True)
    return jnp.stack([total - (labels * z).sum(1) for total, z in pairs], 1)


@pytest.mark.parametrize("labels", ["classes", "distributions"])
@pytest.mark.parametrize("gate", ["soft", "hard"])
def test_gradient_is_that_of_losses_with_constant_weights(gate, labels):
    params, problem = tiny.problem(tiny.network(dtype=jnp.float64))
    classes = np.asarray(problem.batch["label"])
    told = np.eye(3)[classes]
    if labels == "distributions":
        told = 0.7 * told + 0.3 * told[::-1]  # as mixup makes them
        batch = {**problem.batch, "label": jnp.asarray(told)}
        problem = dataclasses.replace(problem, batch=batch)
    images = problem.batch["image"]
    method = gradients.create("confidence_gated", gate=gate, threshold=THRESHOLD)

    start = jax.device_get(tiny.jitted(lambda p: by_hand.logits(p, images))(params))
    weights = weights_of(start, told, gate, THRESHOLD)
    # No weight decides alone, and the gates differ between examples and exits.
    assert (weights[:, 0] == 1).all()
    assert 0 < weights[:, 1:].mean() < 1
    assert len(np.unique(weights[:, 2])) > 1
    assert not np.array_equal(weights[:, 1], weights[:, 2])

    @tiny.jitted
    def both(params):
        def total(params):
            losses = cross_entropies(by_hand.logits(params, images), told)
            return (weights * losses).mean(0).sum()

        return jax.grad(total)(params), method.apply(problem, params, (), None)

    want, (update, aux, state) = both(params)
    tiny.assert_close(update.gradients, want, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(aux.losses, cross_entropies(start, told).mean(0), rtol=1e-12)
    assert state == ()


def test_gates_that_never_close_are_joint_training():
    params, problem = tiny.problem(tiny.network(dtype=jnp.float64, dropout_rate=0.3))
    gated = gradients.create("confidence_gated", gate="hard", threshold=1.01)
    joint = gradients.create("joint")

    @tiny.jitted
    def both(params):
        return [method.apply(problem, params, (), None)[0] for method in (gated, joint)]

    found, want = both(params)
    tiny.assert_close(found.gradients, want.gradients, rtol=1e-12, atol=1e-15)


HALF, SURE, NONE = (0.5, 0.25, 0.25), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("gate", "exits", "label", "want"),
    [
        ("soft", (HALF, HALF, SURE), 0, (1, 0.5, 0.25)),
        ("soft", (HALF, SURE, HALF), 1, (1, 0.75, 0.75)),
        ("soft", (NONE, NONE, NONE), 0, (1, 1, 1)),
        ("soft", (SURE, HALF, HALF), 0, (1, 0, 0)),
        ("soft", (HALF, HALF, HALF), (0.5, 0.5, 0.0), (1, 0.625, 0.625**2)),
        ("hard", (HALF, SURE, HALF), 0, (1, 0, 0)),  # as sure as the threshold asks for
        ("hard", (NONE, SURE, HALF), 0, (1, 1, 0)),  # sure and wrong
        ("hard", (SURE, NONE, HALF), 0, (1, 0, 0)),  # what was left is not taken up again
        ("hard", ((0.4, 0.3, 0.3), HALF, HALF), 0, (1, 1, 0)),  # right and not sure
        ("hard", (HALF, NONE, HALF), (0.4, 0.6, 0.0), (1, 1, 0)),
    ],
)
def test_weights_by_hand(gate, exits, label, want):
    logits = [jnp.log(jnp.asarray([p]) + 1e-260) for p in exits]
    found = example_weights(logits, jnp.asarray([label]), gate, 0.5 - 1e-12)
    np.testing.assert_allclose(found, [want], rtol=1e-12, atol=1e-200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "firm"}, "gate must be one of soft, hard, got 'firm'"),
        ({"threshold": -0.1}, "threshold must be 0 or more, got -0.1"),
        ({"threshold": float("nan")}, "threshold must be 0 or more, got nan"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        gradients.create("confidence_gated", **options)


def test_a_loss_of_the_whole_batch_is_refused():
    method = gradients.create("confidence_gated")
    whole_batch = Objective(feature_weight=0.1, feature_reduction="batch_norm")
    with pytest.raises(ValueError, match=r'confidence_gated weights examples.*; use "mean"'):
        method.check(tiny.network(), whole_batch)
    method.check(tiny.network(), Objective(feature_weight=0.1))
