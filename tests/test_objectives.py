"""The exits' losses against the official code's numbers and against formulas in NumPy."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax import objectives
from dfs_jax.objectives import Objective, Teacher

GOLDEN = Path(__file__).parent / "golden"
RECORDED = json.loads((GOLDEN / "losses.json").read_text())


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def recorded():
    """Inputs of the official code, float64: three exits (M, B, …), the last one, labels (B,)."""
    with np.load(GOLDEN / "losses.npz") as arrays:
        return dict(arrays)


def exit_losses(objective, outputs, labels):
    """Mean loss of every exit, shallow to deep, from (logits, features) of three and of one."""
    mid_logits, final_logits, mid_features, final_feature = outputs
    teacher = Teacher(final_logits, final_feature)
    logits, features = [*mid_logits, final_logits], [*mid_features, final_feature]
    return jnp.stack(
        [
            jnp.mean(objective.example_losses(i, len(logits), z, f, labels, teacher))
            for i, (z, f) in enumerate(zip(logits, features, strict=True))
        ]
    )


def outputs_of(recorded):
    names = ("mid_logits", "final_logits", "mid_features", "final_feature")
    return tuple(jnp.asarray(recorded[name]) for name in names)


def objective_of(row):
    if "use_mtl" in row:  # the deepest exit's cross-entropy alone
        return Objective(exit_weights=(0, 0, 0, 1))
    return Objective(
        logit_weight=row["gamma"] * row["useKD"],
        temperature=row["T"],
        feature_weight=row["fd_coefficient"] * row["useFD"],
        feature_reduction="batch_norm",
    )


def norm(x):
    return float(np.linalg.norm(np.ravel(x)))


@pytest.mark.parametrize("row", RECORDED["rows"], ids=lambda r: f"{r['loss']:.3f}")
def test_totals_and_gradients_are_those_of_the_official_code(recorded, row):
    objective, labels = objective_of(row), jnp.asarray(recorded["labels"])

    def total(outputs):
        return jnp.sum(exit_losses(objective, outputs, labels))

    value, gradients = jax.value_and_grad(total)(outputs_of(recorded))
    np.testing.assert_allclose(value, row["loss"], rtol=1e-10)
    if "use_mtl" in row:
        return
    mid_logits, final_logits, mid_features, final_feature = gradients
    want = row["grad_norm_mid_logits"]
    np.testing.assert_allclose([norm(g) for g in mid_logits], want, rtol=1e-10)
    np.testing.assert_allclose(norm(final_logits), row["grad_norm_final_logits"], rtol=1e-10)
    want = [value or 0.0 for value in row["grad_norm_mid_features"]]
    np.testing.assert_allclose([norm(g) for g in mid_features], want, rtol=1e-10)
    assert norm(final_feature) == 0  # the teacher is a constant
    if (row["useKD"], row["useFD"], row["gamma"]) == (1, 1, 0.3):
        for name, found in [
            ("mid_logits", mid_logits),
            ("final_logits", final_logits),
            ("mid_features", mid_features),
        ]:
            want = recorded[f"grad_{name}_kd1_fd1_g0.3"]
            np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-14)


def test_parts_are_those_of_the_official_code(recorded):
    mid_logits, final_logits, mid_features, final_feature = outputs_of(recorded)
    labels, parts = jnp.asarray(recorded["labels"]), RECORDED["parts"]

    def means(function, values):
        return [float(jnp.mean(function(value))) for value in values]

    found = means(lambda z: objectives.cross_entropy(z, labels), [*mid_logits, final_logits])
    np.testing.assert_allclose(found, [*parts["ce_mid"], parts["ce_final"]], rtol=1e-10)
    for temperature, name in ((3, "kd_T3"), (1, "kd_T1"), (0.5, "kd_T0p5")):
        found = means(
            lambda z, t=temperature: objectives.soft_cross_entropy(z, final_logits, t), mid_logits
        )
        np.testing.assert_allclose(found, parts[name], rtol=1e-10)
    # The entropy of the teacher: it is not subtracted.
    found = jnp.mean(objectives.soft_cross_entropy(final_logits, final_logits, 3))
    np.testing.assert_allclose(found, parts["kd_self_T3"], rtol=1e-10)
    found = means(
        lambda f: objectives.feature_distance(f, final_feature, "batch_norm"), mid_features
    )
    np.testing.assert_allclose(found, parts["fd"], rtol=1e-10)


@pytest.mark.parametrize("reduction", objectives.REDUCTIONS)
def test_equal_features_have_distance_and_gradient_zero(recorded, reduction):
    teacher = jnp.asarray(recorded["final_feature"])

    def distance(feature):
        return jnp.mean(objectives.feature_distance(feature, teacher, reduction))

    value, gradient = jax.value_and_grad(distance)(teacher)
    assert value == RECORDED["parts"]["fd_identical_value"] == 0
    assert norm(gradient) == RECORDED["parts"]["fd_identical_grad_norm"] == 0
    assert not np.isnan(gradient).any()


def test_mean_distance_is_per_example_and_one_equal_example_does_no_harm():
    rng = np.random.default_rng(0)
    feature, teacher = rng.normal(size=(2, 5, 2, 3))
    feature[2] = teacher[2]
    apart = np.array([np.sqrt(((a - b) ** 2).sum()) for a, b in zip(feature, teacher, strict=True)])
    found = objectives.feature_distance(jnp.asarray(feature), jnp.asarray(teacher))
    np.testing.assert_allclose(found, apart, rtol=1e-12)

    def mean(feature):
        return jnp.mean(objectives.feature_distance(feature, jnp.asarray(teacher)))

    safe = np.where(apart > 0, apart, 1.0)
    want = (feature - teacher) / safe[:, None, None] / len(apart)
    np.testing.assert_allclose(jax.grad(mean)(jnp.asarray(feature)), want, rtol=1e-12)
    # The mean does not grow with the batch, the norm over the batch does.
    twice = [jnp.concatenate([x, x]) for x in (feature, teacher)]
    np.testing.assert_allclose(np.mean(objectives.feature_distance(*twice)), apart.mean())
    whole = [objectives.feature_distance(a, b, "batch_norm")[0] for a, b in [(feature, teacher)]]
    doubled = objectives.feature_distance(*twice, "batch_norm")[0]
    np.testing.assert_allclose(doubled, np.sqrt(2) * whole[0])


def reference_cross_entropy(logits, targets):
    """Σ over classes of -t·log p, by the definition of the softmax."""
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -(targets * np.log(p)).sum(-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_with_smoothing_and_soft_labels(smoothing, soft):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(6, 4)) * 3
    labels = rng.dirichlet(np.ones(4), size=6) if soft else rng.integers(0, 4, 6)
    targets = labels if soft else np.eye(4)[labels]
    targets = (1 - smoothing) * targets + smoothing / 4
    objective = Objective(label_smoothing=smoothing)
    # The last exit needs no teacher and no feature.
    found = objective.example_losses(1, 2, jnp.asarray(logits), None, jnp.asarray(labels))
    np.testing.assert_allclose(found, reference_cross_entropy(logits, targets), rtol=1e-12)


def test_smoothing_acts_on_the_cross_entropy_only_and_the_temperature_scale_on_the_rest(recorded):
    logits, teacher = recorded["mid_logits"][0], recorded["final_logits"]
    features, labels = recorded["mid_features"][0], recorded["labels"]
    a, b, smoothing, t = 0.3, 0.05, 0.1, 2.0

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    targets = (1 - smoothing) * np.eye(10)[labels] + smoothing / 10
    hard = reference_cross_entropy(logits, targets)
    soft = reference_cross_entropy(logits / t, softmax(teacher / t))
    apart = np.linalg.norm(features - recorded["final_feature"], axis=1)
    for scaled, factor in ((False, 1), (True, t**2)):
        objective = Objective(
            exit_weights=(0.5, 2),
            label_smoothing=smoothing,
            logit_weight=a,
            temperature=t,
            scale_by_temperature=scaled,
            feature_weight=b,
        )
        found = objective.example_losses(
            0,
            2,
            jnp.asarray(logits),
            jnp.asarray(features),
            jnp.asarray(labels),
            Teacher(jnp.asarray(teacher), jnp.asarray(recorded["final_feature"])),
        )
        want = 0.5 * ((1 - a) * hard + a * factor * soft + b * apart)
        np.testing.assert_allclose(found, want, rtol=1e-12)


def test_exit_weights_multiply_each_exits_loss(recorded):
    labels, outputs = jnp.asarray(recorded["labels"]), outputs_of(recorded)
    plain = exit_losses(Objective(), outputs, labels)
    weights = (0.25, 0.0, 3.0, 1.0)
    weighted = exit_losses(Objective(exit_weights=weights), outputs, labels)
    np.testing.assert_allclose(weighted, np.array(weights) * plain, rtol=1e-14)


def test_a_class_of_probability_zero_does_no_harm_unless_it_is_the_label():
    logits = jnp.asarray([[0.0, -np.inf, 1.0]])
    value, gradient = jax.value_and_grad(
        lambda z: objectives.cross_entropy(z, jnp.asarray([2]))[0]
    )(logits)
    np.testing.assert_allclose(value, np.log1p(np.exp(-1.0)))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "values",
    [
        {"exit_weights": (1, -1)},
        {"exit_weights": ("1",)},
        {"exit_weights": (float("nan"),)},
        {"label_smoothing": 1.0},
        {"label_smoothing": -0.1},
        {"logit_weight": 1.1},
        {"logit_weight": float("nan")},
        {"temperature": 0.0},
        {"feature_weight": -1.0},
        {"feature_reduction": "sum"},
    ],
)
def test_values_out_of_range_are_refused_by_name(values):
    with pytest.raises(ValueError, match=f"objective.{next(iter(values))} must"):
        Objective(**values)


def test_a_number_of_weights_other_than_of_exits_is_refused():
    with pytest.raises(ValueError, match="has 3 values, the network has 4 exits"):
        Objective(exit_weights=(1, 1, 1)).check(4)
    Objective(exit_weights=(1, 1, 1)).check(3)
    Objective().check(4)


def test_features_of_two_shapes_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match="adapters"):
        objectives.feature_distance(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
