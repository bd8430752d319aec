"""What holds for every gradient method: one exit, surgery, cost, devices, refusals, resuming."""

import functools
from typing import NamedTuple

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_step
import tiny

from dfs_jax import config as configuration
from dfs_jax import gradients, models
from dfs_jax.config import ConfigError
from dfs_jax.gradients import Problem
from dfs_jax.objectives import Objective
from dfs_jax.surgery import Surgery
from dfs_jax.training.run import create_method

# Options that make the methods small, or fit for few exits and steps.
OPTIONS = {
    "bdl": {"size": 2},
    "cagrad": {},
    "confidence_gated": {},
    "equilibrium": {},
    "joint": {},
    "l2w_den": {"hidden": 7},
    "meta_gf": {"phase_steps": 1},
    "nash_mtl": {},
    "pcgrad": {},
}
every_method = pytest.mark.parametrize("name", OPTIONS)

WHOLE, OWN = Surgery(partition=False), Surgery(beta=0.5)
COMPOSED = {
    "own": OWN,
    "all": Surgery(beta=0.5, exit_gradient="all"),
    "zeros": Surgery(beta=0.5, referencing=False),
}
DISTILLING = Objective(logit_weight=0.3, feature_weight=0.1, label_smoothing=0.1)


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_no_method_is_left_out():
    assert set(OPTIONS) == set(gradients.names())


class Results(NamedTuple):
    """What all methods make of one problem."""

    params: dict
    problem: Problem
    whole: gradients.Aux  # of the plain pass
    by_method: dict  # name -> (gradients, aux, state before, state after)


@functools.cache
def results(exits, surgery, objective):
    net = tiny.network(surgery, widths=(6,) * exits, dtype=jnp.float64, dropout_rate=0.3)
    if exits == 1:
        net = net.clone(dropout_rate=0.0)
    params, problem = tiny.problem(net, objective)
    methods = {n: gradients.create(n, num_exits=exits, **o) for n, o in OPTIONS.items()}

    def apply(method, params):
        method.check(net, objective)
        state = method.init(params)
        found, aux, after = method.apply(problem, params, state, jax.random.key(0))
        return found.gradients, aux, state, after

    @tiny.jitted
    def run(params):
        return problem.losses(params)[1], {n: apply(m, params) for n, m in methods.items()}

    return Results(params, problem, *run(params))


@every_method
def test_one_exit_is_plain_training(name):
    found = results(1, WHOLE, Objective())
    gradient, aux, _, _ = found.by_method[name]
    loss, want = jax.value_and_grad(lambda p: by_hand.losses(p, found.problem.batch)[0])(
        found.params
    )
    np.testing.assert_allclose(aux.losses, [loss], rtol=1e-10)
    tiny.assert_close(gradient, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "surgery", ["own", *(pytest.param(s, marks=pytest.mark.slow) for s in ("all", "zeros"))]
)
@every_method
def test_composes_with_surgery_and_distillation(name, surgery):
    found = results(2, COMPOSED[surgery], DISTILLING)
    gradient, aux, before, after = found.by_method[name]
    for tree, like in ((gradient, found.params), (after, before)):
        assert jax.tree.structure(tree) == jax.tree.structure(like)
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert np.isfinite(a).all()
    # Whatever else a method computes, the step's answers and statistics are one full pass's.
    tiny.assert_close(aux, found.whole, rtol=1e-8, atol=1e-11)
    # What is trained: everything but the last of the features that nothing reads.
    still = {path for path, g in tiny.flat(gradient).items() if not np.any(g)}
    assert still == {"sides_1/kernel", "sides_1/bias"}


class Cost(NamedTuple):
    flops: float
    scratch: float  # memory beside arguments and results, in gradient trees


@functools.cache
def cost_for_vgg7(name):
    """Of one step of VGG7 with its six exits, compiled from shapes alone."""
    net = models.create_model("vgg7_cifar100", num_classes=100, surgery=WHOLE)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    params, batch = variables["params"], {"image": images, "label": jnp.zeros(2, jnp.int32)}
    method = gradients.create(name, num_exits=net.num_exits)

    @tiny.jitted
    def step(params, stats, state, batch):
        problem = Problem(net, Objective(), batch, stats, jax.random.key(0))
        return method.apply(problem, params, state, jax.random.key(1))

    state = jax.eval_shape(method.init, params)
    compiled = step.lower(params, variables["batch_stats"], state, batch).compile()
    tree = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    scratch = compiled.memory_analysis().temp_size_in_bytes
    return Cost(compiled.cost_analysis()["flops"], scratch / tree)


@pytest.mark.parametrize(
    "name",
    ["pcgrad", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cagrad", "nash_mtl"))],
)
def test_per_exit_gradients_cost_their_prefixes(name):
    """Measured: 2.45 times joint training, and 9.3 gradient trees for six exits."""
    found, joint = cost_for_vgg7(name), cost_for_vgg7("joint")
    assert found.flops / joint.flops <= 2.6
    assert found.scratch - joint.scratch <= 2 * 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["equilibrium", "confidence_gated", "bdl", "meta_gf"])
def test_methods_of_a_single_pass(name):
    ratio = cost_for_vgg7(name).flops / cost_for_vgg7("joint").flops
    # Overlap of three costs (1 + 2·3) / 3 at most. Meta-GF's fusion depends on the number of
    # parameters alone, which weighs in a batch of two.
    most = {"equilibrium": 1.01, "confidence_gated": 1.01, "bdl": 7 / 3, "meta_gf": 1.06}
    assert ratio <= most[name]


@pytest.mark.parametrize(
    "name", [n if n == "l2w_den" else pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS]
)
def test_eight_devices_train_as_one_does(name):
    net = tiny.network(OWN, widths=(4, 4), side=False, dtype=jnp.float64)

    def three_steps(devices):
        run = small_step.make_run(name, net=net, devices=devices, **OPTIONS[name])
        found = small_step.states(run, size=32)
        return [next(found) for _ in range(4)]

    for (one, losses), (eight, same) in zip(three_steps(1), three_steps(8), strict=True):
        if losses is not None:
            np.testing.assert_allclose(same, losses, rtol=1e-9)
        tiny.assert_close(eight, one, rtol=1e-7, atol=1e-10)


class TestRefusals:
    def test_unknown_names_list_the_known(self):
        known = ", ".join(sorted(OPTIONS))
        with pytest.raises(ValueError, match=f"unknown gradient method 'mgda'; known: {known}"):
            gradients.create("mgda", num_exits=3)
        with pytest.raises(ValueError, match="unknown gradient method 'mgda'"):
            gradients.options("mgda")

    def test_unknown_options_list_the_known(self):
        with pytest.raises(ValueError, match="bdl has no option 'reach'; its options: variant, "):
            gradients.create("bdl", num_exits=3, reach=2)
        with pytest.raises(ValueError, match="pcgrad has no option 'a'; its options: none"):
            gradients.create("pcgrad", a=1)

    @every_method
    def test_the_number_of_exits_is_asked_for_where_it_matters(self, name):
        if name in ("bdl", "l2w_den", "meta_gf", "nash_mtl"):
            with pytest.raises(ValueError, match=f"{name} needs num_exits"):
                gradients.create(name)
        else:
            gradients.create(name)

    @pytest.mark.parametrize(
        ("name", "options", "changes", "message"),
        [
            ("bdl", {"variant": "local"}, {"surgery.beta": 0.5}, "reaches segment 1, so nothing"),
            (
                "l2w_den",
                {},
                {"objective.feature_weight": 0.1, "objective.feature_reduction": "batch_norm"},
                "weights examples",
            ),
            ("meta_gf", {}, {"train.accumulation": 2}, "train.accumulation must be 1, got 2"),
            ("meta_gf", {"auxiliary_weights": (1.0,)}, {}, "the network has 3 exits"),
        ],
    )
    def test_combinations_without_sense_are_refused_with_the_reason(
        self, name, options, changes, message
    ):
        c = configuration.default()
        configuration.set_gradients(c, name, **options)
        c.update_from_flattened_dict(changes)
        losses = Objective(**c.objective.to_dict())
        with pytest.raises(ConfigError, match=message):
            create_method(c, tiny.network(Surgery(**c.surgery.to_dict())), losses)
