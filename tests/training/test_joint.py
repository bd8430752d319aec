"""The problem that gradient methods work on, and joint training, the method without any trick."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax import gradients, models
from dfs_jax.gradients import Problem
from dfs_jax.objectives import Objective
from dfs_jax.surgery import Surgery

PLAIN = Objective()
DISTILLING = Objective(logit_weight=0.3, feature_weight=0.05, exit_weights=(0.5, 1.0, 2.0))
DROPOUT = jax.random.key(7)


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def network(beta=0.5):
    """Three exits with batch norm, dropout and adapters."""
    return models.create_model(
        "vgg7_cifar100",
        num_classes=3,
        surgery=Surgery(beta=beta),
        dtype=jnp.float64,
        dropout_rate=0.5,
        adapters=True,
        widths=((6, 6), (4,)),
    )


@functools.cache
def start():
    """Variables with statistics that one step has moved, and a batch."""
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(5, 4, 4, 2))),
        "label": jnp.asarray(rng.integers(0, 3, 5)),
    }
    init = jax.jit(network().init, compiler_options={"xla_backend_optimization_level": 0})
    variables = init(jax.random.key(1), batch["image"])
    stats = jax.tree.map(lambda x: x + jnp.asarray(rng.uniform(0.1, 1, x.shape)), variables)
    return variables["params"], stats["batch_stats"], batch


def problem(objective=PLAIN):
    _, stats, batch = start()
    return Problem(network(), objective, batch, stats, DROPOUT)


@functools.cache
def measured(objective):
    """Losses and gradients of the full pass, of every prefix, and of the method `joint`."""
    whole = problem(objective)

    def measure(params):
        teacher = whole.teacher(params)
        joint = gradients.create("joint")
        return {
            "losses": whole.losses(params),
            "examples": whole.example_losses(params),
            "exits": [
                jax.value_and_grad(whole.exit_loss, has_aux=True)(params, i, teacher=teacher)
                for i in range(whole.num_exits)
            ],
            "joint": joint.apply(whole, params, joint.init(params), jax.random.key(3)),
            "teacher": teacher,
        }

    quick = {"xla_backend_optimization_level": 0}
    return jax.jit(measure, compiler_options=quick)(start()[0])


def assert_trees_close(found, want, rtol=1e-9, atol=1e-11):
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def subtree(tree, part):
    return {path: leaf for path, leaf in flat(tree).items() if part in path}


def flat(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.mark.parametrize("objective", [PLAIN, DISTILLING], ids=["plain", "distilling"])
class TestProblem:
    def test_prefix_losses_are_those_of_the_full_pass(self, objective):
        # With dropout on: all passes of a step share one key.
        found = measured(objective)
        losses, aux = found["losses"]
        assert losses.dtype == jnp.float64
        np.testing.assert_allclose(aux.losses, losses, rtol=1e-14)
        prefixes = [loss for (loss, _), _ in found["exits"]]
        np.testing.assert_allclose(prefixes, losses, rtol=1e-11)
        for i, ((loss, prefix), _) in enumerate(found["exits"]):
            assert len(prefix.logits) == i + 1
            assert_trees_close(prefix.logits, aux.logits[: i + 1])
            np.testing.assert_allclose(prefix.losses, [loss], rtol=1e-14)

    def test_example_losses_have_the_losses_as_their_mean(self, objective):
        found = measured(objective)
        assert found["examples"].shape == (5, 3)
        np.testing.assert_allclose(found["examples"].mean(0), found["losses"][0], rtol=1e-11)

    def test_losses_are_the_objective_of_the_networks_answers(self, objective):
        params, stats, batch = start()
        outputs, _ = network().apply(
            {"params": params, "batch_stats": stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": DROPOUT},
        )
        teacher = type(measured(DISTILLING)["teacher"])(outputs.logits[-1], outputs.features[-1])
        want = [
            objective.example_losses(i, 3, z, f, batch["label"], teacher).mean()
            for i, (z, f) in enumerate(zip(outputs.logits, outputs.features, strict=True))
        ]
        np.testing.assert_allclose(measured(objective)["losses"][0], want, rtol=1e-10)

    def test_a_prefix_moves_no_deeper_statistics(self, objective):
        _, before, _ = start()
        found = measured(objective)
        full = found["losses"][1].batch_stats
        for i, ((_, prefix), _) in enumerate(found["exits"]):
            for deep in range(3):
                want = full if deep <= i else before
                name = f"norms_{deep}"
                assert_trees_close(subtree(prefix.batch_stats, name), subtree(want, name))
        moved = [
            np.abs(a - b).max()
            for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(before), strict=True)
        ]
        assert min(moved) > 1e-3

    def test_an_exit_has_no_gradient_beyond_its_prefix(self, objective):
        for i, (_, gradient) in enumerate(measured(objective)["exits"]):
            for path, leaf in flat(gradient).items():
                deep = next((d for d in range(3) if f"s_{d}/" in path), None)
                assert deep is not None, path
                if deep > i:
                    assert not np.any(leaf), path

    def test_joint_is_the_sum_of_the_exits_gradients(self, objective):
        update, aux, state = measured(objective)["joint"]
        exits = [g for _, g in measured(objective)["exits"]]
        assert_trees_close(update.gradients, jax.tree.map(lambda *g: sum(g), *exits))
        assert_trees_close(aux, measured(objective)["losses"][1])
        assert state == ()


def test_the_teacher_is_given_only_if_needed_and_carries_no_gradient():
    assert measured(PLAIN)["teacher"] is None
    teacher = measured(DISTILLING)["teacher"]
    aux = measured(DISTILLING)["losses"][1]
    np.testing.assert_allclose(teacher.logits, aux.logits[-1], rtol=1e-11)
    # Distillation weighs on exit 1 and 2 alone: the deepest exit's head learns from labels only.
    # Its weight is 2 in one objective and 1 in the other.
    deepest = [subtree(measured(o)["joint"][0].gradients, "heads_2") for o in (PLAIN, DISTILLING)]
    assert_trees_close(deepest[1], jax.tree.map(lambda g: 2 * g, deepest[0]))


def test_another_batch_can_be_given():
    params, _, batch = start()
    half = jax.tree.map(lambda x: x[:2], batch)
    whole = problem(DISTILLING)
    other = Problem(network(), DISTILLING, half, whole.batch_stats, DROPOUT)
    found = jax.jit(lambda p: (whole.losses(p, batch=half)[0], other.losses(p)[0]))(params)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
    assert np.abs(found[0] - measured(DISTILLING)["losses"][0]).max() > 1e-3


def test_a_boundary_acts_before_surgery_and_not_at_the_last_exit():
    params, _, _ = start()
    seen = []

    def cut(i, feature):
        seen.append(i)
        return jax.lax.stop_gradient(feature), feature

    whole = problem()
    losses = jax.eval_shape(lambda p: whole.losses(p, boundary=cut)[0], params)
    assert losses.shape == (3,)
    assert seen == [0, 1]
    gradient = jax.jit(jax.grad(lambda p: whole.exit_loss(p, 2, boundary=cut)[0]))(params)
    for path, leaf in flat(gradient).items():
        assert np.any(leaf) == ("_2/" in path and "adapter" not in path), path


def test_joint_costs_one_pass():
    def flops(function):
        quick = {"xla_backend_optimization_level": 0}
        compiled = jax.jit(function).lower(start()[0]).compile(compiler_options=quick)
        return compiled.cost_analysis()["flops"]

    _, stats, batch = start()

    def by_hand(params):
        outputs, updated = network().apply(
            {"params": params, "batch_stats": stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": DROPOUT},
        )
        one_hot = jax.nn.one_hot(batch["label"], 3)
        losses = [-jnp.mean(jnp.sum(one_hot * jax.nn.log_softmax(z), -1)) for z in outputs.logits]
        return sum(losses), (outputs.logits, updated)

    joint = gradients.create("joint")
    ours = flops(lambda params: joint.apply(problem(), params, (), jax.random.key(0))[:2])
    assert ours <= 1.01 * flops(jax.grad(by_hand, has_aux=True))


def test_unknown_methods_and_options():
    with pytest.raises(ValueError, match=r"unknown gradient method 'sum'; known: .*joint"):
        gradients.create("sum")
    assert gradients.options("joint") == {}
