"""Scores of confidence against NumPy in float64, and what they say of odd logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.early_exit import confidence


def _logits(seed=0, size=40, classes=7, scale=4.0):
    return np.random.default_rng(seed).normal(size=(size, classes)).astype(np.float32) * scale


def _softmax(logits):
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(-1, keepdims=True)


def _score(name, logits, previous=()):
    return np.asarray(confidence.score(name, jnp.asarray(logits), previous))


def test_scores_equal_their_definitions():
    logits = _logits()
    p = _softmax(logits)
    ordered = np.sort(p, axis=-1)
    np.testing.assert_allclose(_score("max_softmax", logits), p.max(-1), rtol=1e-5)
    np.testing.assert_allclose(
        _score("margin", logits), ordered[:, -1] - ordered[:, -2], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        _score("entropy", logits), (p * np.log(p)).sum(-1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["max_softmax", "margin", "entropy"])
def test_larger_means_surer(name):
    logits = np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [1e4, 0, 0]])
    assert (np.diff(_score(name, logits)) > 0).all()
    certain = {"max_softmax": 1.0, "margin": 1.0, "entropy": 0.0}
    assert _score(name, logits)[-1] == certain[name]


def test_patience_counts_the_unbroken_agreement_before_an_exit():
    logits = np.eye(3)[[2, 2, 2, 2, 2]]
    previous = np.array([[2, 2, 0, 2, 1], [2, 0, 2, 2, 1], [2, 2, 2, 0, 1]])
    assert _score("patience", logits, previous).tolist() == [3, 1, 2, 0, 0]
    assert _score("patience", logits, list(previous[:2])).tolist() == [2, 0, 1, 2, 0]
    assert _score("patience", logits, previous[:0]).tolist() == [0] * 5  # the first exit


@pytest.mark.parametrize("name", confidence.names())
def test_a_nan_among_the_logits_gives_nan_for_that_image_alone(name):
    logits = _logits(size=3)
    logits[1, 4] = np.nan
    previous = np.broadcast_to(logits.argmax(-1), (2, 3))
    assert np.isnan(_score(name, logits, previous)).tolist() == [False, True, False]


@pytest.mark.parametrize("name", confidence.names())
def test_a_class_that_is_ruled_out_is_no_nan(name):
    logits = np.array([[-np.inf, 0, 0], [-np.inf, -np.inf, 0]])
    expected = {
        "max_softmax": [0.5, 1],
        "margin": [0, 1],
        "entropy": [-np.log(2), 0],
        "patience": [0, 0],
    }
    np.testing.assert_allclose(_score(name, logits), expected[name], atol=1e-7)


@pytest.mark.parametrize("name", confidence.names())
def test_under_jit_and_in_float32_for_narrow_logits(name):
    logits = jnp.asarray(_logits(), jnp.bfloat16)
    previous = jnp.argmax(logits, -1)[None]
    compiled = jax.jit(confidence.score, static_argnums=0)(name, logits, previous)
    assert compiled.dtype == jnp.float32
    expected = _score(name, np.asarray(logits, np.float32), previous)
    np.testing.assert_allclose(compiled, expected, rtol=1e-6, atol=1e-6)


def test_refusals_say_what_would_be_right():
    logits = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="'maximum'; known: max_softmax, margin, entropy, patien"):
        confidence.score("maximum", logits)
    with pytest.raises(ValueError, match="two classes"):
        confidence.score("margin", logits[:, :1])
    with pytest.raises(ValueError, match="previous_predictions"):
        confidence.score("patience", logits)
