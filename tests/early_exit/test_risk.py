"""The promise of a bounded loss: its arithmetic exactly, and by simulation how often it is kept."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfs_jax.early_exit import budget, confidence, risk

RESAMPLES = 1000
CLASSES = 10


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 80), st.integers(1, 19), st.integers(1, 19))
def test_allowed_losses_by_exact_fractions(size, risk_in_20ths, probability_in_20ths):
    rate, level = Fraction(risk_in_20ths, 20), Fraction(20 - probability_in_20ths, 20)
    tail, expected, tie = Fraction(0), -1, None
    for k in range(size + 1):
        tail += math.comb(size, k) * rate**k * (1 - rate) ** (size - k)
        if tail > level:
            break
        expected, tie = k, k if tail == level else None
    found = risk.allowed_losses(size, float(rate), probability_in_20ths / 20)
    # At a tie the rounding of the tail's probability decides.
    assert found == expected or (tie is not None and found == tie - 1)


def test_allowed_losses_of_large_splits():
    """Many images with a probability of no losses that no float can hold."""
    size, rate = 50_000, 0.1
    expected = size * rate - 1.645 * math.sqrt(size * rate * (1 - rate))  # the normal quantile
    assert risk.allowed_losses(size, rate, 0.95) == pytest.approx(expected, abs=3)


def test_losses_are_what_only_the_full_network_gets_right():
    confidences = np.array([[0.9, 0.9, 0.9, 0.9, 0.1], [1.0] * 5])
    correct = np.array([[1, 0, 1, 0, 0], [1, 1, 0, 0, 1]], bool)
    values = np.array([[0.5, budget.ALWAYS], [budget.NEVER, budget.ALWAYS], [0.0, budget.ALWAYS]])
    assert risk.count_losses(confidences, correct, values).tolist() == [1, 0, 2]


def test_testing_stops_at_the_first_failure():
    assert risk.passing(np.array([0, 2, 5, 1, 0]), allowed=2) == 2
    assert risk.passing(np.array([0, 0]), allowed=0) == 2


@pytest.mark.parametrize("score", confidence.names())
def test_levels_go_from_nobody_to_everybody(score):
    levels = risk.levels(score, CLASSES, num_exits=5)
    assert levels[0] == budget.NEVER
    assert (np.diff(levels) <= 0).all()
    np.testing.assert_array_equal(levels, levels.astype(np.float32))
    logits = np.zeros((1, CLASSES), np.float32)  # as unsure as can be
    least = np.asarray(confidence.score(score, logits, np.ones((3, 1), int)))
    assert least >= levels[-1] - 1e-6


class _Population:
    """A distribution of images: drawing from it with replacement, and its true risks."""

    def __init__(self, confidences, correct):
        self.confidences, self.correct = confidences, correct
        self.costs = tuple(range(1, len(confidences) + 1))
        common = risk.levels("max_softmax", CLASSES, len(confidences))
        values = np.repeat(common[:, None], len(confidences), axis=1)
        values[:, -1] = budget.ALWAYS
        losses = risk.count_losses(confidences, correct, values)
        found = budget.outcome(confidences, values, self.costs, correct)
        self.risk = dict(zip(common, losses / correct.shape[1], strict=True))
        loss = correct[-1].mean() - found.top1
        self.accuracy_loss = dict(zip(common, loss, strict=True))

    def broken(self, size, e, d):
        """How often, in share of the resamples, the risk and the accuracy loss exceed e."""
        rng = np.random.default_rng(0)
        risks, losses = [], []
        for _ in range(RESAMPLES):
            drawn = rng.integers(0, self.correct.shape[1], size)
            chosen = risk.thresholds(
                "max_softmax",
                self.confidences[:, drawn],
                self.correct[:, drawn],
                self.costs,
                num_classes=CLASSES,
                risk=e,
                probability=d,
            )
            risks.append(self.risk[chosen.values[0]])
            losses.append(self.accuracy_loss[chosen.values[0]])
        assert min(risks) < max(risks)
        return np.mean(np.array(risks) > e), np.mean(np.array(losses) > e)


def _network(seed, overconfidence):
    """Four exits on 20,000 images; deeper ones are right more often, if not on every image."""
    rng = np.random.default_rng(seed)
    ease = rng.beta(2, 1, 20_000)
    right = np.clip(ease + np.array([-0.15, -0.08, -0.03, 0.05])[:, None], 0.02, 0.99)
    noise = rng.normal(0, 0.1, right.shape)
    sure = np.clip(right + noise, 0.1, 0.999) ** (1 / overconfidence)
    luck = np.where(rng.random(right.shape) < 0.9, rng.random(20_000), rng.random(right.shape))
    return _Population(sure.astype(np.float32), luck < right)


@pytest.mark.parametrize(
    ("overconfidence", "size", "e", "d"), [(1.0, 500, 0.02, 0.9), (4.0, 300, 0.05, 0.8)]
)
def test_the_promise_is_kept_on_drawn_networks(overconfidence, size, e, d):
    """Each risk of 1,000 validation splits; `e` is reached by thresholds well inside the range."""
    by_risk, by_accuracy = _network(1, overconfidence).broken(size, e, d)
    assert by_accuracy <= by_risk <= 1 - d


def test_the_promise_is_kept_where_it_is_hardest():
    """Below one level the risk is a hair above e: every pass there breaks the promise.

    The chance of it is P[Binomial(500, 0.0102) <= 1] = 0.0366, under the promised 0.05; a bound
    that were no bound would be broken far more often, one too cautious never.
    """
    size, e, d = 500, 0.01, 0.95
    images = 5000
    lost = np.arange(images) < 51  # 0.0102 of all
    confidences = np.full((2, images), 0.75, np.float32)
    population = _Population(confidences, np.stack([~lost, np.ones(images, bool)]))
    by_risk, by_accuracy = population.broken(size, e, d)
    assert by_risk == by_accuracy
    assert 0.02 < by_risk <= 1 - d


def test_it_costs_less_than_the_full_network_and_says_what_it_promises():
    population = _network(2, 1.0)
    found = risk.thresholds(
        "max_softmax",
        population.confidences[:, :2000],
        population.correct[:, :2000],
        population.costs,
        num_classes=CLASSES,
        risk=0.05,
        probability=0.9,
    )
    assert found.expected_cost < 3.5  # of 4
    assert found.fitted_for == (
        "an accuracy at most 0.05 below the full network's, with probability 0.9"
    )
    full = population.correct[-1, :2000].mean()
    assert full - 0.05 < found.expected_accuracy


def test_unmeetable_promises_are_refused():
    confidences, correct = np.ones((2, 100), np.float32), np.ones((2, 100), bool)

    def thresholds(e, d):
        return risk.thresholds(
            "margin", confidences, correct, (1, 2), num_classes=CLASSES, risk=e, probability=d
        )

    with pytest.raises(ValueError, match=r"100 validation images .* at least 299 can"):
        thresholds(0.01, 0.95)
    assert risk.allowed_losses(298, 0.01, 0.95) == -1
    assert risk.allowed_losses(299, 0.01, 0.95) == 0
    for e, d in ((0, 0.9), (1, 0.9), (0.1, 1), (0.1, math.nan)):
        with pytest.raises(ValueError, match="between 0 and 1"):
            thresholds(e, d)
    with pytest.raises(ValueError, match="unknown confidence 'max'; known: max_softmax"):
        risk.levels("max", CLASSES, 3)
