"""Exits that see the previous exit's answer, by collaboration or boosting: values by hand,
gradients, segment by segment."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_networks import SMALL, filled, quickly, small

from dfs_jax import models
from dfs_jax.early_exit import bundle, confidence, export, stages, throughput
from dfs_jax.early_exit.budget import ALWAYS, Thresholds
from dfs_jax.early_exit.preprocessing import Preprocessing
from dfs_jax.early_exit.router import Router
from dfs_jax.gradients import Problem
from dfs_jax.gradients.bdl import reach, reaching_gradients
from dfs_jax.gradients.per_exit import exit_gradients
from dfs_jax.interop import torch
from dfs_jax.models.cost import CONVENTIONS, exit_costs
from dfs_jax.objectives import Objective
from dfs_jax.surgery import Surgery

CHEAPEST = "vgg7_cifar100"
SHARE = 0.5  # of boosting
SEEING = {"collaboration": {"collaboration": True}, "boosting": {"boosting": SHARE}}
seeing = pytest.mark.parametrize("seeing", SEEING)


def network(name=CHEAPEST, seeing="collaboration", **options):
    """A small network whose exits see the previous answer, images, and variables from numpy."""
    model, images = small(name, **SEEING[seeing], **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    return model, images, filled(shapes)


def without(variables):
    """The variables of the same network without collaboration."""
    return {
        collection: {k: v for k, v in tree.items() if not k.startswith("collaborators")}
        for collection, tree in variables.items()
    }


def term(variables, i, previous):
    """What exit i (from 0) adds for the logits `previous`, written out in NumPy."""
    unit = variables["params"][f"collaborators_{i - 1}"]
    stats = variables["batch_stats"][f"collaborators_{i - 1}"]["bn"]
    x = previous @ unit["hidden"]["kernel"] + unit["hidden"]["bias"]
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    x = np.maximum(x * unit["bn"]["scale"] + unit["bn"]["bias"], 0)
    return x @ unit["dense"]["kernel"]


@pytest.mark.parametrize("name", SMALL)
def test_logits_are_those_without_plus_what_the_previous_ones_say(name):
    model, images, variables = network(name)
    plain = model.clone(collaboration=False)
    width = {
        "msdnet_cifar100": 128,
        "vgg7_cifar100": 6,
        "resnet18_cifar100": 32,
        "vit_tiny_patch16": 192,
    }[name]
    last = variables["params"][f"collaborators_{model.num_exits - 2}"]
    assert last["dense"]["kernel"].shape == (width, 5)

    boosted = plain.clone(boosting=SHARE)

    @quickly
    def run(variables):
        others = without(variables)
        every = (model, variables), (boosted, others), (plain, others)
        return [network.apply(given, images) for network, given in every]

    collaborating, boosting, apart = run(variables)
    for found, seen in (
        (collaborating, lambda i, previous: term(variables, i, previous)),
        (boosting, lambda i, previous: SHARE * previous),
    ):
        answer = None
        for i, logits in enumerate(apart.logits):
            answer = np.asarray(logits) + (0 if answer is None else seen(i, answer))
            np.testing.assert_allclose(found.logits[i], answer, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(found.features[i], apart.features[i], rtol=1e-5, atol=1e-5)


def test_one_dense_layer_on_feature_and_answer_side_by_side():
    """The published form, with the kernels of the two last layers stacked."""
    model, images, variables = network("msdnet_cifar100")
    out = quickly(lambda v: model.apply(v, images))(variables)
    unit = {**variables["params"]["collaborators_0"]}
    exit_ = variables["params"]["exits_1"]["dense"]
    kernel = np.concatenate([exit_["kernel"], unit["dense"]["kernel"]])
    identity = {**unit, "dense": {"kernel": np.eye(len(unit["dense"]["kernel"]))}}
    at = {**variables, "params": {**variables["params"], "collaborators_0": identity}}
    seen = np.concatenate([out.features[1], term(at, 1, np.asarray(out.logits[0]))], axis=1)
    np.testing.assert_allclose(seen @ kernel + exit_["bias"], out.logits[1], rtol=1e-3, atol=1e-4)


@seeing
def test_segments_and_prefix_equal_the_whole(seeing):
    model, images, variables = network(seeing=seeing, dropout_rate=0.3)
    mode = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(1)}}

    @quickly
    def run(variables):
        whole, moved = model.apply(variables, images, **mode)
        prefix, _ = model.apply(variables, images, num_exits=2, **mode)
        carry, logits, stats = images, [None], variables["batch_stats"]
        for i in range(model.num_exits):
            given = {"params": variables["params"], "batch_stats": stats}
            (carry, exit_input), state = model.apply(given, carry, i, method="advance", **mode)
            given["batch_stats"] = state["batch_stats"]
            (answer, _), state = model.apply(
                given, exit_input, i, previous=logits[-1], method="classify", **mode
            )
            stats = state["batch_stats"]
            logits.append(answer)
        return whole.logits, prefix.logits, logits[1:], moved["batch_stats"], stats

    whole, prefix, logits, moved, stats = run(variables)
    for found in (prefix, logits):
        for a, b in zip(found, whole, strict=False):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    if seeing == "collaboration":
        before = variables["batch_stats"]["collaborators_1"]["bn"]["mean"]
        assert not np.allclose(moved["collaborators_1"]["bn"]["mean"], before)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), moved, stats)


@seeing
def test_an_exit_cannot_answer_alone(seeing):
    model, images, variables = network(seeing=seeing)
    _, exit_input = model.apply(variables, images, 0, method="advance")
    model.apply(variables, exit_input, 0, method="classify")  # nothing lies before the first
    with pytest.raises(ValueError, match="previous=, the logits of exit 1"):
        model.apply(variables, exit_input, 1, method="classify")


def _problem(**options):
    model, images, variables = network(**options)
    batch = {"image": jnp.asarray(images), "label": jnp.array([1, 3])}
    problem = Problem(model, Objective(), batch, variables["batch_stats"], jax.random.key(0))
    return problem, variables["params"]


def _touched(gradient):
    return {name for name, tree in gradient.items() if any(map(np.any, jax.tree.leaves(tree)))}


@seeing
def test_no_gradient_flows_into_the_previous_exit(seeing):
    problem, params = _problem(seeing=seeing)
    gradients = quickly(lambda p: exit_gradients(problem, p)[0])(params)
    for i, gradient in enumerate(gradients):
        own = {f"heads_{i}"} | ({f"collaborators_{i - 1}"} & set(params))
        assert {n for n in _touched(gradient) if n.startswith(("heads", "coll"))} == own


@seeing
def test_block_dependent_losses_keep_their_blocks(seeing):
    problem, params = _problem(seeing=seeing)
    starts = reach(problem.num_exits, "local", 1, False)

    @quickly
    def both(params):
        found, aux = reaching_gradients(problem, params, starts)
        return found, aux.logits, exit_gradients(problem, params)[0], problem.losses(params)[1]

    found, logits, apart, aux = both(params)
    for a, b in zip(logits, aux.logits, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for i, gradient in enumerate(apart):
        own = {f"heads_{i}", f"convs_{i}", f"collaborators_{i - 1}"}
        for name in own & set(params):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
                found[name],
                gradient[name],
            )


def test_cost_counts_what_the_previous_answer_takes():
    model, images, _ = network()
    batch, classes = images[:1], 5
    for convention in CONVENTIONS:
        plain = exit_costs(model.clone(collaboration=False), batch, convention=convention)
        costs = exit_costs(model, batch, convention=convention)
        extra = [0]
        for width in (4, 6):
            products = classes * width + width * classes
            extra.append(products + (2 * width if convention == "published" else 0))
        assert np.subtract(costs.heads, plain.heads).tolist() == extra
        assert np.subtract(costs.cumulative, plain.cumulative).tolist() == [
            0,
            *np.cumsum(extra[1:]),
        ]
        assert costs.path == costs.cumulative  # no exit can answer without those before
        assert costs.segments == plain.segments
    grown = np.subtract(costs.parameters.heads, plain.parameters.heads)
    assert grown.tolist() == [0, *(classes * w + w + 2 * w + w * classes for w in (4, 6))]


def test_boosting_costs_nothing_but_every_head_before():
    model, images, _ = network(seeing="boosting")
    batch = images[:1]
    plain = exit_costs(model.clone(boosting=0.0), batch)
    costs = exit_costs(model, batch)
    assert costs.cumulative == plain.cumulative == costs.path
    assert (costs.segments, costs.heads) == (plain.segments, plain.heads)
    assert plain.path[-1] < costs.path[-1]
    assert costs.parameters.cumulative == plain.parameters.cumulative == costs.parameters.path


def _route(parts, images, score):
    """Answers where a third of the images leaves at each exit."""
    router = Router(parts, images.shape[1:], confidence=score, sizes=(1, 4))
    thresholds = Thresholds(score, (0.5, 0.5, ALWAYS))
    sure = np.eye(3)[np.arange(len(images)) % 3].T
    return router(images, thresholds, confidences=sure)


@pytest.fixture(scope="module", params=SEEING)
def served(request):
    model, _, variables = network(seeing=request.param)
    images = np.random.default_rng(5).standard_normal((7, 8, 8, 3)).astype(np.float32)
    want = np.stack(quickly(lambda v: model.apply(v, images).logits)(variables))
    parts = stages.from_network(model, variables, images)
    return parts, images, want


@pytest.mark.parametrize("score", confidence.names())
def test_early_exit_gives_the_answers_of_the_whole(served, score):
    parts, images, want = served
    answers = _route(parts, images, score)
    exits = np.arange(7) % 3
    np.testing.assert_array_equal(answers.exits, exits)
    np.testing.assert_allclose(answers.logits, want[exits, np.arange(7)], rtol=1e-4, atol=1e-4)


def test_every_stage_can_be_timed_alone(served):
    parts, images, want = served
    alone = throughput._Alone(parts, images)
    for i, head in enumerate(alone.heads):
        np.testing.assert_allclose(head()[0], want[i], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(alone.full(), want[-1], rtol=1e-4, atol=1e-4)


def test_exported_stages_give_the_same_answers(served, tmp_path):
    parts, images, want = served
    contents = export.Contents(
        labels=tuple("abcde"),
        costs=(1, 2, 3),
        preprocessing=Preprocessing((8, 8, 3), (0.0,) * 3, (1.0,) * 3),
        thresholds=Thresholds("max_softmax", (1.1, 1.1, ALWAYS)),
    )
    path = str(tmp_path / "network.bundle")
    export.export(path, parts, contents, (4,))
    found = bundle.EarlyExit.load(path)
    np.testing.assert_allclose(found(images).logits, want[2], rtol=1e-4, atol=1e-4)


def test_pytorch_has_no_names_for_it():
    model, _, variables = network("msdnet_cifar100")
    with pytest.raises(torch.InteropError, match="collaborators_"):
        torch.to_state_dict(model, variables)
    with pytest.raises(torch.InteropError, match="collaborat"):
        torch.from_state_dict(model, torch.to_state_dict(model, without(variables)))


def test_weights_without_collaboration_fit():
    """Names and shapes of everything else are the same."""
    model, images, variables = network("resnet18_cifar100")
    plain = model.clone(collaboration=False)
    shapes = jax.eval_shape(plain.init, jax.random.key(0), images)
    assert jax.tree.map(jnp.shape, without(variables)) == jax.tree.map(jnp.shape, dict(shapes))


@pytest.mark.parametrize("name", models.names())
def test_every_network_has_the_option(name):
    given = models.options(name)
    assert (given["collaboration"], given["boosting"]) == (False, 0.0)
    create = functools.partial(models.create_model, name, num_classes=2, surgery=Surgery())
    assert create(collaboration=True).collaboration
    assert create(boosting=0.25).boosting == 0.25
    assert [create(**o).sees_previous for o in (*SEEING.values(), {})] == [True, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boosting": -0.1}, r"boosting must lie in \[0, 1\], got -0.1"),
        ({"boosting": 1.5}, r"boosting must lie in \[0, 1\], got 1.5"),
        ({"boosting": float("nan")}, r"boosting must lie in \[0, 1\], got nan"),
        ({"boosting": 0.5, "collaboration": True}, "choose one, got boosting=0.5 and coll"),
    ],
)
def test_boosting_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message) as refused:
        models.create_model(CHEAPEST, num_classes=2, surgery=Surgery(), **options)
    assert "\n" not in str(refused.value)
