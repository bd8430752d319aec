"""Meta-GF: two whole cycles of its training step against the formulas written out."""

import by_hand
import jax
import numpy as np
import optax
import pytest
import small_step
import tiny

from dfs_jax import gradients

EXITS, STEPS = 3, 2  # steps of a phase
AUXILIARY, RATE, KEPT = 0.2, 0.1, 0.9
OTHERS = (1.0, 0.5, 0.8)


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def users(name):
    """Exits, from 0, whose answer depends on a tensor of `Tiny`."""
    i = tiny.segment_of(name)
    if name.startswith("heads"):
        return [i]
    return list(range(i + 1 if name.startswith("sides") else i, EXITS))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Adam:
    """Kingma and Ba's algorithm 1 for a dictionary of arrays."""

    def __init__(self, like):
        self.first = {k: np.zeros_like(v) for k, v in like.items()}
        self.second = {k: np.zeros_like(v) for k, v in like.items()}
        self.count = 0

    def step(self, values, slopes):
        self.count += 1
        new = {}
        for k, g in slopes.items():
            self.first[k] = 0.9 * self.first[k] + 0.1 * g
            self.second[k] = 0.999 * self.second[k] + 0.001 * g**2
            mean = self.first[k] / (1 - 0.9**self.count)
            square = self.second[k] / (1 - 0.999**self.count)
            new[k] = values[k] - RATE * mean / (np.sqrt(square) + 1e-8)
        return new


def nested(flat):
    tree = {}
    for name, value in flat.items():
        layer, tensor = name.split("/")
        tree.setdefault(layer, {})[tensor] = value
    return tree


@tiny.jitted
def slope(params, batch, weights):
    """Gradient of the weighted sum of the exits' losses."""
    return jax.grad(lambda p: weights @ by_hand.losses(p, batch))(params)


def descend(params, momentum, step, weights):
    """SGD with momentum, weight decay being part of the gradient."""
    gradient = tiny.flat(slope(nested(params), small_step.batch(step), np.array(weights)))
    for name in params:
        coupled = gradient[name] + small_step.DECAY * params[name]
        momentum[name] = small_step.MOMENTUM * momentum[name] + coupled
    return {name: params[name] - small_step.RATE * momentum[name] for name in params}


def fused(start, trained, m):
    found = {}
    for name, w0 in start.items():
        shares = {i: sigmoid(m[name][i]) for i in users(name)}
        moved = sum(s * (trained[i][name] - w0) for i, s in shares.items())
        found[name] = w0 + moved / sum(shares.values()) if shares else w0
    return found


def slope_of_m(start, trained, m, gradient):
    """∂L/∂m_i = s' (m_i) · ⟨∂L/∂w, w_i - w⟩ / Σ s, by the quotient rule."""
    point = fused(start, trained, m)
    found = {name: np.zeros(EXITS) for name in m}
    for name in m:
        total = sum(sigmoid(m[name][i]) for i in users(name))
        for i in users(name):
            s = sigmoid(m[name][i])
            along = np.sum(gradient[name] * (trained[i][name] - point[name]))
            found[name][i] = s * (1 - s) * along / total
    return found


def trajectory(params):
    """(parameters, momentum, m) after every step, from given parameters."""
    momentum = {name: np.zeros_like(w) for name, w in params.items()}
    m = {name: np.ones(EXITS) for name in params}
    adam = Adam(m)
    step = 0
    while True:
        start, trained = params, []
        for i in range(EXITS):
            weights = [1.0 if j == i else AUXILIARY * OTHERS[j] for j in range(EXITS)]
            params = start
            for _ in range(STEPS):
                params = descend(params, momentum, step, weights)
                step += 1
                yield params, momentum, m
            trained.append(params)
        before = m
        for k in range(STEPS):
            params = fused(start, trained, m)
            batch = small_step.batch(step)
            gradient = tiny.flat(slope(nested(params), batch, np.ones(EXITS)))
            m = adam.step(m, slope_of_m(start, trained, m, gradient))
            if k == STEPS - 1:
                m = {name: (1 - KEPT) * m[name] + KEPT * before[name] for name in m}
            step += 1
            yield params, momentum, m


def test_two_cycles_equal_the_formulas():
    run = small_step.make_run(
        "meta_gf",
        phase_steps=STEPS,
        auxiliary=AUXILIARY,
        auxiliary_weights=OTHERS,
        learning_rate=RATE,
        momentum=KEPT,
    )
    assert run.method.cycle == (EXITS + 1) * STEPS
    found = small_step.states(run)
    start, _ = next(found)
    want = trajectory(tiny.flat(start.params))
    for at in range(2 * run.method.cycle):
        (state, losses), (params, momentum, m) = next(found), next(want)
        tiny.assert_close(nested(tiny.flat(state.params)), nested(params), rtol=1e-8, atol=1e-11)
        # It goes on from phase to phase, and rests while the fusion is learnt.
        trace = optax.tree_utils.tree_get(state.opt_state, "trace")
        tiny.assert_close(trace, nested(momentum), rtol=1e-8, atol=1e-11)
        importance = tiny.flat(state.method_state.importance)
        for name in importance:
            np.testing.assert_allclose(importance[name], m[name], rtol=1e-7, err_msg=name)
        assert losses.shape == (EXITS,)
        assert state.method_state.step == (at + 1) % run.method.cycle
    moved = [abs(value - 1).max() for name, value in m.items() if len(users(name)) > 1]
    assert min(moved) > 1e-3


def test_published_weights_of_the_other_losses():
    # Seven exits have the official v; phases are told apart by the gradient at one point.
    net = tiny.network(widths=(3,) * 7, side=False, dtype=np.float64)
    params, problem = tiny.problem(net)
    method = gradients.create("meta_gf", num_exits=7, phase_steps=1)
    apply = tiny.jitted(lambda s, key: method.apply(problem, params, s, key)[0].gradients)
    state = method.init(params)
    published = 0.1 * np.array([1, 1, 0.6, 0.6, 0.75, 0.9, 1])
    for phase in (0, 3, 6):
        weights = published.copy()
        weights[phase] = 1
        state = state._replace(step=np.int32(phase), start=params)
        found = apply(state, jax.random.key(0))
        tiny.assert_close(found, slope(params, dict(problem.batch), weights), rtol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phase_steps": 0}, "phase_steps must be at least 1, got 0"),
        ({"phase_steps": 2**29}, "phase_steps must be below 536870912 with 3 exits"),
        ({"auxiliary": -0.1}, "must not be negative"),
        ({"auxiliary_weights": (1.0,)}, "has 1 values, the network has 3 exits"),
        ({"learning_rate": float("nan")}, "learning_rate must be 0 or more"),
        ({"momentum": 1.5}, r"momentum must lie in \[0, 1\]"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        gradients.create("meta_gf", num_exits=3, **options)
