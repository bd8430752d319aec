"""Calibration error by hand and against a loop; temperatures against a scan."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfs_jax.evaluation import calibration


def test_error_of_a_small_example():
    """Two bins: three answers at mean 0.2 with 1/3 right, two at mean 0.9 with all right."""
    confidence = np.array([0.1, 0.2, 0.3, 0.85, 0.95])
    found = calibration.reliability(confidence, np.array([0, 1, 0, 1, 1], bool), bins=2)
    assert found.count.tolist() == [3, 2]
    np.testing.assert_allclose(found.confidence, [0.2, 0.9])
    np.testing.assert_allclose(found.accuracy, [1 / 3, 1])
    assert found.error == pytest.approx(3 / 5 * (1 / 3 - 0.2) + 2 / 5 * 0.1)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_error_against_a_loop(seed, size):
    rng = np.random.default_rng(seed)
    confidence = rng.integers(0, 31, size) / 30  # on the edges of the 15 bins, and between
    correct = rng.random(size) < 0.5
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        inside |= (b == 0) & (confidence == 0)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            expected += inside.mean() * gap
    assert calibration.reliability(confidence, correct).error == pytest.approx(expected, abs=1e-12)


def test_odd_confidences():
    found = calibration.reliability(np.array([1.0, 1.0]), np.array([True, True]))
    assert found.error == 0
    assert found.count[-1] == 2
    assert np.isnan(found.accuracy[0])  # an empty bin has none
    assert np.isnan(calibration.reliability(np.array([0.5, np.nan]), np.ones(2, bool)).error)
    with pytest.raises(ValueError, match="no answers"):
        calibration.reliability(np.zeros(0), np.zeros(0, bool))


def _labelled(temperature, seed=0, size=4000):
    """Logits whose labels are drawn from their softmax at `temperature`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(size, 10)).astype(np.float32) * 3
    labels = np.argmax(logits / temperature + rng.gumbel(size=logits.shape), axis=-1)
    return logits, labels


def _cross_entropy(logits, labels, temperature):
    scaled = logits.astype(np.float64) / temperature
    log_partition = np.logaddexp.reduce(scaled, axis=-1)
    return np.mean(log_partition - scaled[np.arange(len(labels)), labels])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 8.0])
def test_temperature_is_where_the_cross_entropy_is_least(temperature):
    logits, labels = _labelled(temperature)
    found = calibration.fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.15)
    least = _cross_entropy(logits, labels, found)
    for other in found * np.linspace(0.8, 1.25, 46):
        assert _cross_entropy(logits, labels, other) >= least - 1e-7
    shifted = calibration.fit_temperature(logits + 100, labels)
    assert shifted == pytest.approx(found, rel=1e-3)


def test_temperature_makes_overconfident_answers_honest():
    logits, labels = _labelled(3.0)
    correct = logits.argmax(-1) == labels
    held_out, held_out_labels = _labelled(3.0, seed=1)
    fitted = calibration.fit_temperature(held_out, held_out_labels)
    before = calibration.reliability(calibration.max_softmax(logits), correct).error
    after = calibration.reliability(calibration.max_softmax(logits, fitted), correct).error
    assert before > 0.2
    assert after < 0.03


def test_cross_entropy_and_probability_of_a_temperature():
    logits, labels = _labelled(1.0, size=50)
    scaled = np.exp(logits.astype(np.float64) / 1.7)
    probabilities = scaled / scaled.sum(-1, keepdims=True)
    np.testing.assert_allclose(
        calibration.max_softmax(logits, 1.7), probabilities.max(-1), rtol=1e-5
    )
    found = calibration.negative_log_likelihood(logits, labels, 1.7)
    assert found == pytest.approx(_cross_entropy(logits, labels, 1.7), rel=1e-5)
    assert np.isfinite(calibration.negative_log_likelihood(logits * 1e6, labels, 0.05))


def test_temperature_stays_in_its_range():
    logits, _ = _labelled(1.0)
    low, high = calibration.TEMPERATURES
    assert calibration.fit_temperature(logits, logits.argmax(-1)) == low
    assert calibration.fit_temperature(logits, logits.argmin(-1)) == high
    assert calibration.fit_temperature(np.zeros((5, 3)), np.zeros(5, int)) in (low, 1.0, high)


def test_examples_with_infinite_or_nan_logits_are_left_out():
    logits, labels = _labelled(2.0)
    expected = calibration.fit_temperature(logits[2:], labels[2:])
    logits[0, 3], logits[1, 0] = np.nan, -np.inf
    assert calibration.fit_temperature(logits, labels) == expected
    assert calibration.fit_temperature(np.full((3, 2), np.nan), np.zeros(3, int)) == 1.0
