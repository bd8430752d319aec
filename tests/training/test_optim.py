import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dfs_jax import config
from dfs_jax.config import ConfigError
from dfs_jax.training import optim

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "lr_schedule.json").read_text())


def configured(**optimizer):
    c = config.default()
    for name, value in optimizer.items():
        c.optimizer[name] = value
    return c


def rates(schedule, steps):
    with jax.enable_x64(True):
        return np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(steps)))


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_five_steps_equal_pytorchs_sgd_written_out_in_numpy(momentum, nesterov):
    decay, milestone_step = 5e-2, 3
    c = configured(
        weight_decay=decay, momentum=momentum, nesterov=nesterov, milestones=(milestone_step,)
    )
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(3, 4)), "scale": rng.normal(size=4)}
    pull = {"kernel": rng.normal(size=(3, 4)), "scale": rng.normal(size=4)}

    def gradient(name, p):
        return np.sin(p) * pull[name]

    expected = {name: p.copy() for name, p in start.items()}
    velocity = {}
    for step in range(5):
        rate = 0.1 if step < milestone_step else 0.1 * 0.1
        for name, p in expected.items():
            g = gradient(name, p) + decay * p
            v = velocity[name] = g if step == 0 else momentum * velocity[name] + g
            expected[name] = p - rate * (g + momentum * v if nesterov else v)

    with jax.enable_x64(True):
        tx, _ = optim.create_optimizer(c, steps_per_epoch=1, total_steps=5)
        params = jax.tree.map(jnp.asarray, start)
        state = tx.init(params)
        for _ in range(5):
            grads = {name: jnp.asarray(gradient(name, np.asarray(p))) for name, p in params.items()}
            updates, state = jax.jit(tx.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
        for name in start:
            np.testing.assert_allclose(params[name], expected[name], rtol=0, atol=1e-12)


def test_three_steps_equal_pytorchs_adamw_written_out_in_numpy():
    rate, decay, clip = 0.1, 0.02, 1.0
    c = configured(
        name="adamw", learning_rate=rate, weight_decay=decay, clip_norm=clip, schedule="constant"
    )
    rng = np.random.default_rng(1)
    expected = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    # The first gradient is larger than the clipping norm, the others are not.
    gradients = [
        {name: scale * rng.normal(size=p.shape) for name, p in expected.items()}
        for scale in (10.0, 0.1, 0.1)
    ]
    with jax.enable_x64(True):
        tx, _ = optim.create_optimizer(c, steps_per_epoch=1, total_steps=3)
        params = jax.tree.map(jnp.asarray, expected)
        state = tx.init(params)
        for g in gradients:
            updates, state = jax.jit(tx.update)(jax.tree.map(jnp.asarray, g), state, params)
            params = optax.apply_updates(params, updates)

        first = {name: np.zeros(p.shape) for name, p in expected.items()}
        second = {name: np.zeros(p.shape) for name, p in expected.items()}
        for t, g in enumerate(gradients, 1):
            norm = np.sqrt(sum((part**2).sum() for part in g.values()))
            assert (norm > clip) == (t == 1)
            for name, p in expected.items():
                clipped = g[name] * min(1.0, clip / norm)
                first[name] = 0.9 * first[name] + 0.1 * clipped
                second[name] = 0.999 * second[name] + 0.001 * clipped**2
                step = (first[name] / (1 - 0.9**t)) / (
                    np.sqrt(second[name] / (1 - 0.999**t)) + 1e-8
                )
                expected[name] = p * (1 - rate * decay) - rate * step
        for name, p in expected.items():
            np.testing.assert_allclose(params[name], p, rtol=0, atol=1e-12)


def test_clipping_scales_the_whole_gradient_of_any_optimizer():
    c = configured(momentum=0.0, weight_decay=0.0, clip_norm=1.0, learning_rate=1.0)
    tx, _ = optim.create_optimizer(c, 1, 1)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    gradients = {"a": jnp.array([3.0]), "b": jnp.array([-4.0])}
    updates, _ = tx.update(gradients, tx.init(params), params)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.6, 0.8], rtol=1e-6)


def test_parameters_keep_their_dtype():
    tx, _ = optim.create_optimizer(configured(warmup_epochs=1.0), 2, 10)
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3, jnp.float32)}
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)


@pytest.mark.parametrize("run", GOLDEN["runs"], ids=lambda r: f"{r['kind']}-{r['milestones']}")
def test_multistep_against_the_official_rates(run):
    c = configured(
        learning_rate=run["base"], decay_rate=run["rate"], milestones=tuple(run["milestones"])
    )
    steps_per_epoch = 90
    schedule = optim.create_schedule(c, steps_per_epoch, run["epochs"] * steps_per_epoch)
    starts = [epoch for epoch, _ in run["from_epoch"]]
    official = np.array(
        [
            run["from_epoch"][np.searchsorted(starts, epoch, "right") - 1][1]
            for epoch in range(run["epochs"])
        ]
    )
    epochs = np.arange(run["epochs"])
    for within in (0, 1, steps_per_epoch - 1):
        ours = rates(schedule, epochs * steps_per_epoch + within)
        if run["kind"] == "published":
            np.testing.assert_allclose(ours, official, rtol=1e-14)
        else:
            # The official rule counts a milestone again at each of its multiples; ours does not.
            before = epochs < 2 * run["milestones"][0]
            usual = run["base"] * run["rate"] ** np.searchsorted(run["milestones"], epochs, "right")
            np.testing.assert_allclose(ours, usual, rtol=1e-14)
            np.testing.assert_allclose(ours[:40], official[:40], rtol=1e-14)
            assert (ours[~before] > 1.5 * official[~before]).any()


@pytest.mark.parametrize(
    ("steps_per_epoch", "milestone", "first"),
    [(7, 2, 14), (97.65625, 70, 6836), (100 / 3, 3, 100), (10, 0.25, 3)],
)
def test_milestone_is_the_first_step_not_before_it(steps_per_epoch, milestone, first):
    c = configured(milestones=(milestone,))
    schedule = optim.create_schedule(c, steps_per_epoch, 10_000)
    np.testing.assert_allclose(rates(schedule, [0, first - 1, first]), [0.1, 0.1, 0.01])


def test_cosine_against_the_official_rates_and_at_its_end():
    golden = GOLDEN["cosine"]
    schedule = optim.create_schedule(configured(schedule="cosine"), 10, golden["epochs"] * 10)
    steps = np.arange(0, golden["epochs"], 9) * 10
    np.testing.assert_allclose(rates(schedule, steps), golden["every_9th_epoch"], rtol=1e-14)
    np.testing.assert_allclose(rates(schedule, [900, 950]), 0.0, atol=1e-17)


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_warmup_is_linear_from_zero_to_the_peak(name):
    c = configured(schedule=name, warmup_epochs=2.0, milestones=(1, 5), learning_rate=0.4)
    schedule = optim.create_schedule(c, 10, 100)
    at = dict(enumerate(rates(schedule, np.arange(101))))
    assert at[0] == 0
    np.testing.assert_allclose(at[5], 0.1)
    if name == "multistep":  # milestones count from the start of the run
        np.testing.assert_allclose([at[10], at[20], at[49], at[50]], [0.02, 0.04, 0.04, 0.004])
    else:
        np.testing.assert_allclose([at[10], at[19], at[20]], [0.2, 0.38, 0.4])
        np.testing.assert_allclose(
            [at[60], at[100]], [0.2, 0.0] if name == "cosine" else [0.4, 0.4], atol=1e-16
        )


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_a_short_try_of_a_long_recipe_stays_in_the_warmup(name):
    c = configured(schedule=name, warmup_epochs=5.0, milestones=(70, 80))
    schedule = optim.create_schedule(c, 100, 10)
    np.testing.assert_allclose(rates(schedule, np.arange(10)), 0.1 * np.arange(10) / 500)


def test_the_optimizer_uses_the_schedule_it_returns():
    c = configured(schedule="cosine", warmup_epochs=1.0, momentum=0.0, weight_decay=0.0)
    tx, schedule = optim.create_optimizer(c, 3, 9)
    params = {"w": jnp.zeros(())}
    state = tx.init(params)
    for step in range(9):
        updates, state = tx.update({"w": jnp.ones(())}, state, params)
        np.testing.assert_allclose(updates["w"], -schedule(step), rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": -0.1}, "learning_rate = -0.1 must be 0 or more"),
        ({"learning_rate": float("nan")}, "learning_rate = nan"),
        ({"momentum": 1.0}, "momentum = 1.0"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov = True needs"),
        ({"weight_decay": -1e-4}, "weight_decay"),
        ({"decay_rate": 0.0}, "decay_rate"),
        ({"milestones": (250, 250)}, r"milestones = \(250, 250\).*increasing"),
        ({"milestones": (80, 70)}, "milestones"),
        ({"milestones": (0, 70)}, "milestones"),
        ({"warmup_epochs": -1.0}, "warmup_epochs"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"name": "adam"}, "'adam' is unknown; known: adamw, lamb, lars, sgd"),
        ({"schedule": "step"}, "'step' is unknown; known: multistep, cosine, constant"),
    ],
)
def test_values_that_cannot_be_used_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        optim.create_optimizer(configured(**values), 10, 50)
