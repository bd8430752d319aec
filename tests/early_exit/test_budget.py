"""Thresholds against recorded numbers and against the protocol done one image at a time."""

import itertools
import json
import math
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dfs_jax.early_exit import budget
from dfs_jax.early_exit.budget import ALWAYS, NEVER, Thresholds

GOLDEN = Path(__file__).parents[1] / "golden" / "budgeted_batch.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def example():
    """Confidences (4, 300), right answers that depend on them, and costs."""
    rng = np.random.default_rng(3)
    confidences = rng.beta(4, 1.5, (4, 300)).astype(np.float32)
    correct = rng.random((4, 300)) < confidences * np.linspace(0.8, 1, 4)[:, None]
    return confidences, correct, (1.0, 3.0, 4.0, 8.0)


def test_equal_to_the_official_script(golden):
    validation, test = golden["val_probs"].max(-1), golden["test_probs"].max(-1)
    quotas = budget.quotas(500, 7)
    np.testing.assert_array_equal(quotas, golden["out_out_n"])
    values = budget.fit(validation, quotas)
    np.testing.assert_array_equal(values.astype(np.float32), golden["out_T"])

    order = np.argsort(-golden["test_probs"], axis=-1)
    hit = order == golden["test_labels"][:, None]
    found = budget.outcome(test, values, golden["flops"], hit[..., 0], hit[..., :5].any(-1))
    np.testing.assert_array_equal(budget.choose(test, values), golden["out_test_exit_of_sample"])
    np.testing.assert_array_equal(found.leaving, golden["out_test_exit_counts"])
    np.testing.assert_allclose(100 * found.top1, golden["out_test_top1"], rtol=1e-12)
    np.testing.assert_allclose(100 * found.top5, golden["out_test_top5"], rtol=1e-12)
    np.testing.assert_allclose(found.cost, golden["out_test_expected_flops"], rtol=1e-6)

    right = golden["val_probs"].argmax(-1) == golden["val_labels"]
    fitted = budget.outcome(validation, values, golden["flops"], right)
    np.testing.assert_array_equal(fitted.leaving, golden["out_val_exit_counts"])
    np.testing.assert_allclose(100 * fitted.top1, golden["out_val_top1"], rtol=1e-12)
    np.testing.assert_allclose(fitted.cost, golden["out_val_expected_flops"], rtol=1e-6)
    assert fitted.top5 is None


# Few distinct values, so that ties are the rule; NaN among them.
_confidences = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 12)),
    elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, math.nan]),
)


def _leaves_at(confidences, values):
    """The first exit that reaches its threshold, else the last."""
    last = len(confidences) - 1
    return next((k for k in range(last) if confidences[k] >= values[k]), last)


def _fit_one_by_one(confidences, quota):
    left, values = set(), []
    for k in range(len(confidences) - 1):
        sure = [i for i in range(confidences.shape[1]) if not math.isnan(confidences[k, i])]
        waiting = sorted((confidences[k, i] for i in sure if i not in left), reverse=True)
        enough = 0 < quota[k] <= len(waiting)
        values.append(waiting[quota[k] - 1] if enough else NEVER)
        left |= {i for i in sure if confidences[k, i] >= values[-1]}
    return [*values, ALWAYS]


@settings(max_examples=200, deadline=None)
@given(_confidences, st.data())
def test_fit_and_choose_as_done_one_image_at_a_time(confidences, data):
    num_exits, size = confidences.shape
    quotas = data.draw(arrays.arrays(np.int64, (3, num_exits), elements=st.integers(0, size + 1)))
    values = budget.fit(confidences, quotas)
    expected = [_fit_one_by_one(confidences, quota) for quota in quotas]
    np.testing.assert_array_equal(values, expected)
    exits = budget.choose(confidences, values)
    for p in range(3):
        assert exits[p].tolist() == [_leaves_at(confidences[:, i], values[p]) for i in range(size)]
        assert budget.choose(confidences, values[p]).tolist() == exits[p].tolist()


def test_ties_leave_together_and_nan_goes_to_the_deepest_exit():
    confidences = np.array([[0.9, 0.5, 0.5, np.nan, 0.1], [0.2, 0.3, 0.4, np.nan, 0.8]])
    values = budget.fit(confidences, np.array([[2, 3]]))
    assert values.tolist() == [[0.5, ALWAYS]]
    assert budget.choose(confidences, values[0]).tolist() == [0, 0, 0, 1, 1]
    assert budget.choose(confidences, (ALWAYS, ALWAYS)).tolist() == [0, 0, 0, 1, 0]


def test_quotas_are_exact_shares():
    for size, num_exits in ((500, 7), (5000, 4), (240, 1), (50_000, 5), (1, 3)):
        found = budget.quotas(size, num_exits)
        for p, row in enumerate(found, 1):
            powers = [Fraction(p, 20) ** k for k in range(1, num_exits + 1)]
            assert row.tolist() == [math.floor(size * w / sum(powers)) for w in powers]


def test_quotas_at_the_ends_and_beyond_the_range_of_floats():
    found = budget.quotas(100, 3, [0, 1e-300, 1e300, math.inf])
    assert found.tolist() == [[100, 0, 0], [100, 0, 0], [0, 0, 100], [0, 0, 100]]


def test_outcome_is_the_mean_over_images(example):
    confidences, correct, costs = example
    values = np.array([[0.9, 0.8, 0.7, ALWAYS], [NEVER, 0.5, NEVER, ALWAYS]])
    found = budget.outcome(confidences, values, costs, correct, ~correct)
    for p in range(2):
        exits = [_leaves_at(confidences[:, i], values[p]) for i in range(300)]
        right = np.mean([correct[k, i] for i, k in enumerate(exits)])
        assert found.cost[p] == pytest.approx(np.mean([costs[k] for k in exits]), rel=1e-12)
        assert found.top1[p] == pytest.approx(right, rel=1e-12)
        assert found.top5[p] == pytest.approx(1 - right, rel=1e-12)
        assert found.leaving[p].tolist() == np.bincount(exits, minlength=4).tolist()


def test_family_keeps_what_no_other_thresholds_beat(example):
    confidences, correct, costs = example
    family = budget.family("max_softmax", confidences, correct, costs)
    assert len(family) > 10
    assert family[0].expected_cost == costs[0]
    for cheaper, dearer in itertools.pairwise(family):
        assert cheaper.expected_cost < dearer.expected_cost
        assert cheaper.expected_accuracy < dearer.expected_accuracy
    for thresholds in family:
        found = budget.outcome(confidences, np.array([thresholds.values]), costs, correct)
        assert (found.cost[0], found.top1[0]) == (
            thresholds.expected_cost,
            thresholds.expected_accuracy,
        )
    # All images at one exit are among what was compared.
    for k in (0, 3):
        best = budget.within(family, costs[k])
        assert best.expected_accuracy >= correct[k].mean()


def _nudged(confidences, rng):
    """Every confidence up to two units in the last place of a float32 larger or smaller."""
    nudged = np.asarray(confidences, np.float32)
    for _ in range(2):
        towards = rng.choice(np.float32([-np.inf, np.inf]), nudged.shape)
        nudged = np.where(rng.random(nudged.shape) < 0.8, np.nextafter(nudged, towards), nudged)
    return nudged


# From 0 to 1 with whole crowds a few units apart, entropies, counts, ties and NaN.
_crowded = st.one_of(
    st.floats(0, 1, width=32),
    st.integers(0, 40).map(lambda n: 1 - n * 2**-24),
    st.integers(0, 40).map(lambda n: -6.9 + n * 2**-21),
    st.integers(0, 3).map(float),
    st.just(math.nan),
)


@settings(max_examples=100, deadline=None)
@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=_crowded),
    st.integers(0, 2**32 - 1),
)
def test_the_last_bits_of_confidences_change_no_exit(confidences, seed):
    rng = np.random.default_rng(seed)
    correct = rng.random(confidences.shape) < 0.7
    costs = np.arange(1.0, len(confidences) + 1)
    for thresholds in budget.family("max_softmax", confidences, correct, costs):
        exits = budget.choose(confidences, thresholds.values)
        for other in (confidences.astype(np.float64), *(_nudged(confidences, rng) for _ in "ab")):
            np.testing.assert_array_equal(budget.choose(other, thresholds.values), exits)
            found = budget.outcome(other, np.array([thresholds.values]), costs, correct)
            assert found.cost[0] == thresholds.expected_cost
            assert found.top1[0] == thresholds.expected_accuracy


def test_thresholds_lie_halfway_between_two_confidences():
    confidences = np.float32([[0.9, 0.8, 0.5, 0.1], [0.3, 0.3, 0.7, 0.2]])
    correct = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
    family = budget.family("margin", confidences, correct, (1.0, 3.0))
    two, three = np.float32(0.8), np.float32(0.5)
    best = budget.within(family, 2.0)
    assert best.values == ((float(two) + float(three)) / 2, ALWAYS)
    assert (best.expected_cost, best.expected_accuracy) == (2.0, 1.0)


def test_confidences_that_differ_in_the_last_bits_leave_together():
    close = np.nextafter(np.float32(0.9), np.float32(0))
    confidences = np.float32([[0.9, close, 0.5], [1, 1, 1]])
    right = np.array([[1, 0, 0], [1, 1, 1]], bool)
    family = budget.family("max_softmax", confidences, right, (1.0, 3.0))
    together = {len(set(budget.choose(confidences, t.values)[:2])) for t in family}
    assert together == {1}


def test_patience_can_ask_for_the_same_number_at_every_exit():
    """Its few values tie, so that thresholds by quota skip most of these."""
    rng = np.random.default_rng(0)
    answers = np.where(rng.random((6, 2000)) < 0.7, 1, rng.integers(0, 4, (6, 2000)))
    patience, correct = np.zeros((6, 2000), np.float32), answers == 1
    for k in range(1, 6):
        patience[k] = np.where(answers[k] == answers[k - 1], patience[k - 1] + 1, 0)
    costs = np.arange(1.0, 7)
    family = budget.family("patience", patience, correct, costs)
    for wanted in (1, 2, 3):
        same = budget.outcome(patience, np.array([[wanted] * 5 + [ALWAYS]]), costs, correct)
        assert budget.within(family, same.cost[0]).expected_accuracy >= same.top1[0]


def test_target_of_cost_or_accuracy(example):
    confidences, correct, costs = example
    family = budget.family("margin", confidences, correct, costs)
    for cost in (1.0, 2.5, 5.0, 100.0):
        chosen = budget.within(family, cost)
        assert chosen.expected_cost <= cost
        affordable = [t.expected_accuracy for t in family if t.expected_cost <= cost]
        assert chosen.expected_accuracy == max(affordable)
    assert chosen.fitted_for == "a cost of at most 100 per image"
    top = family[-1].expected_accuracy
    for accuracy in (0.0, top - 0.02, top):
        chosen = budget.reaching(family, accuracy)
        assert chosen.expected_accuracy >= accuracy
        enough = [t.expected_cost for t in family if t.expected_accuracy >= accuracy]
        assert chosen.expected_cost == min(enough)
    with pytest.raises(ValueError, match=r"cost 0.5 or less .* cheapest cost 1"):
        budget.within(family, 0.5)
    with pytest.raises(ValueError, match=rf"an accuracy of 0.99; the best is {top:.4f}"):
        budget.reaching(family, 0.99)


def test_thresholds_survive_json():
    saved = Thresholds("entropy", (-0.5, math.inf, -math.inf), 12.5, 0.75, "a test")
    assert saved.values == (-0.5, NEVER, ALWAYS)
    text = json.dumps(saved.to_json(), allow_nan=False)
    assert Thresholds.from_json(json.loads(text)) == saved
    theirs = Thresholds("margin", (0.5, ALWAYS), step=40, weights="ab12", warning="hopeful")
    assert Thresholds.from_json(json.loads(json.dumps(theirs.to_json()))) == theirs


def test_thresholds_that_say_no_checkpoint_are_read():
    """As versions before wrote them."""
    saved = Thresholds("margin", (0.5, ALWAYS), 2.0, 0.5, "a test").to_json()
    for name in ("step", "weights", "warning"):
        del saved[name]
    assert Thresholds.from_json(saved) == Thresholds("margin", (0.5, ALWAYS), 2.0, 0.5, "a test")


@pytest.mark.parametrize(
    ("values", "message"),
    [((), "one per exit"), ((0.5, 0.5), "last one -inf"), ((math.nan, ALWAYS), "numbers")],
)
def test_no_thresholds(values, message):
    with pytest.raises(ValueError, match=message):
        Thresholds("margin", values)


def test_foreign_thresholds_are_refused():
    good = Thresholds("margin", (0.5, ALWAYS)).to_json()
    for bad in ([0.5], {**good, "more": 1}, {"values": [0.5]}, {**good, "values": 3}):
        with pytest.raises(ValueError, match="saved thresholds"):
            Thresholds.from_json(bad)
    with pytest.raises(ValueError, match="unknown confidence 'max'; known: max_softmax"):
        Thresholds.from_json({**good, "confidence": "max"})
    with pytest.raises(ValueError, match="2 exits need as many"):
        budget.choose(np.zeros((2, 5)), (0.1, 0.2, ALWAYS))


def test_ten_thousand_images_and_forty_budgets_in_a_moment():
    """Two seconds are promised; this takes a tenth of one."""
    rng = np.random.default_rng(0)
    p = rng.random((7, 10_000, 100), dtype=np.float32) ** 20
    labels = rng.integers(0, 100, 10_000)
    began = time.perf_counter()
    confidences, correct = p.max(-1), p.argmax(-1) == labels
    values = budget.fit(confidences, budget.quotas(10_000, 7))
    found = budget.outcome(confidences, values, np.arange(1.0, 8), correct)
    assert time.perf_counter() - began < 2
    assert found.leaving.shape == (40, 7)
