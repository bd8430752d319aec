"""Block-dependent losses: which loss reaches which parameter, and what is computed twice."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from dfs_jax import gradients
from dfs_jax.gradients.bdl import reach
from dfs_jax.objectives import Objective, Teacher, cross_entropy
from dfs_jax.surgery import Surgery

# Segments, from the first on, that the loss of exit 1, 2, … reaches.
REACH = {
    ("local", 3, False): "1000000 0100000 0010000 0001000 0000100 0000010 0000001",
    ("local", 3, True): "1000000 0100000 0010000 0001000 0000100 0000010 1111111",
    ("groups", 3, False): "1000000 1100000 1110000 0001000 0001100 0001110 0001111",
    ("groups", 3, True): "1000000 1100000 1110000 0001000 0001100 0001110 1111111",
    ("overlap", 3, False): "1000000 1100000 1110000 0111000 0011100 0001110 0000111",
    ("overlap", 3, True): "1000000 1100000 1110000 0111000 0011100 0001110 1111111",
    ("local", 2, False): "1000 0100 0010 0001",
    ("groups", 2, False): "1000 1100 0010 0011",
    ("overlap", 2, False): "1000 1100 0110 0011",
    ("overlap", 2, True): "1000 1100 0110 1111",
    ("groups", 2, True): "10000 11000 00100 00110 11111",
    ("overlap", 9, False): "100 110 111",
}


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


class Dropping(tiny.Tiny):
    """With dropout inside the segments, where running one again would show."""

    def setup(self):
        super().setup()
        self.inside = [nn.Dropout(0.4) for _ in self.widths]

    def segment(self, i: int, *features: Any, train: bool) -> tuple[Any, ...]:
        *others, y = super().segment(i, *features, train=train)
        return (*others, self.inside[i](y, deterministic=not train))


def network(count, surgery=Surgery(partition=False)):  # noqa: B008, a frozen dataclass
    return Dropping(
        num_classes=3,
        surgery=surgery,
        widths=(4,) * count,
        dropout_rate=0.3,
        dtype=jnp.float64,
    )


class Weighted(NamedTuple):
    """Cross-entropy with weights (N,) that may be traced."""

    weights: jax.Array
    needs_teacher: bool = False

    def example_losses(self, i, num_exits, logits, feature, labels, teacher):
        del num_exits, feature, teacher
        return self.weights[i] * cross_entropy(logits, labels)


@functools.cache
def by_loss(variant, size, final_loss, count):
    """The method's gradient for every loss by itself, leaves (N, …)."""
    net = tiny.network(widths=(4,) * count, dtype=jnp.float64)
    params, problem = tiny.problem(net, Weighted(jnp.ones(count)), size=6)
    method = gradients.create(
        "bdl", num_exits=count, variant=variant, size=size, final_loss=final_loss
    )

    @tiny.jitted
    @jax.vmap
    def of_losses(weights):
        alone = dataclasses.replace(problem, objective=Weighted(weights))
        return method.apply(alone, params, (), jax.random.key(0))[0].gradients

    return tiny.flat(of_losses(jnp.eye(count)))


@pytest.mark.parametrize(
    "case", REACH, ids=lambda case: f"{case[0]}-{case[1]}-{'final' if case[2] else 'near'}"
)
def test_reach_of_every_loss(case):
    rows = REACH[case].split()
    starts = reach(len(rows), *case)
    found = ["0" * start + "1" * (j + 1 - start) for j, start in enumerate(starts)]
    assert [row.ljust(len(rows), "0") for row in found] == rows


@pytest.mark.parametrize(
    "case",
    [("local", 2, False), ("groups", 2, False), ("overlap", 2, False), ("overlap", 2, True)],
    ids=str,
)
def test_zeros_are_exactly_where_a_loss_does_not_reach(case):
    rows = REACH[case].split()
    for name, gradient in by_loss(*case, len(rows)).items():
        i = tiny.segment_of(name)
        for j, row in enumerate(rows):
            if name.startswith("heads"):
                want = i == j
            elif name.startswith("sides"):  # what segment i makes for the deeper ones
                want = row[i] == "1" and i < j
            else:
                want = row[i] == "1"
            assert np.any(gradient[j]) == want, (name, j)


def run_again(problem, params, starts):
    """Losses (N,) as the official code computes them.

    Every exit's segments from the one that its loss reaches are run again, on a feature that
    is detached, with the dropout key of the first pass; the statistics of that are dropped.
    """
    stats, rngs = problem.batch_stats, {"dropout": problem.rng}

    def run(x, i, method):
        variables = {"params": params, "batch_stats": stats}
        more = {"train": True, "mutable": ["batch_stats"], "rngs": rngs}
        return problem.network.apply(variables, x, i, method=method, **more)[0]

    answers = []
    for j, start in enumerate(starts):
        carry = problem.batch["image"]
        for i in range(j + 1):
            if i == start:
                carry = jax.lax.stop_gradient(carry)
            carry, exit_input = run(carry, i, "advance")
        answers.append(run(exit_input, j, "classify"))
    teacher = Teacher(*jax.lax.stop_gradient(answers[-1]))
    losses = [
        problem.objective.example_losses(
            j, len(starts), *answer, problem.batch["label"], teacher
        ).mean()
        for j, answer in enumerate(answers)
    ]
    return jnp.stack(losses)


DISTILLING = Objective(logit_weight=0.3, feature_weight=0.1, exit_weights=(0.5, 1.0, 2.0, 1.5))
COMPOSED = {
    "whole": ({"size": 2}, (0, 0, 1, 2), Surgery(partition=False)),
    "surgery": ({"size": 2, "final_loss": True}, (0, 0, 1, 0), Surgery(beta=0.5)),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_one_pass_equals_running_segments_again(name):
    options, starts, surgery = COMPOSED[name]
    net = network(4, surgery)
    params, problem = tiny.problem(net, DISTILLING)
    method = gradients.create("bdl", num_exits=4, **options)
    method.check(net, DISTILLING)

    @tiny.jitted
    def measure(params):
        def total(params):
            losses = run_again(problem, params, starts)
            return losses.sum(), losses

        found = method.apply(problem, params, (), jax.random.key(0))
        return found, jax.grad(total, has_aux=True)(params), problem.losses(params)[1]

    (update, aux, state), (want, losses), whole = measure(params)
    tiny.assert_close(update.gradients, want)
    np.testing.assert_allclose(aux.losses, losses, rtol=1e-10)
    # The step's answers and running statistics are those of one pass, which moves them once.
    tiny.assert_close(aux, whole)
    before, after = (tiny.flat(x.batch_stats) for x in (problem, aux))
    assert min(abs(after[name] - before[name]).max() for name in before) > 1e-3
    assert state == ()


@pytest.mark.parametrize(
    ("surgery", "options", "refused"),
    [
        (Surgery(), {"variant": "local"}, 1),
        (Surgery(), {"variant": "groups", "size": 2}, 2),
        (Surgery(), {"variant": "overlap", "size": 1}, 1),
        (Surgery(referencing=False, exit_gradient="all"), {"variant": "local"}, 1),
        (Surgery(), {"variant": "local", "final_loss": True}, None),
        (Surgery(), {"variant": "overlap", "size": 2}, None),
        (Surgery(beta=0.0), {"variant": "local"}, None),
        (Surgery(exit_gradient="all"), {"variant": "local"}, None),
        (Surgery(partition=False), {"variant": "local"}, None),
    ],
)
def test_channels_that_nothing_would_train_are_refused(surgery, options, refused):
    net = network(4, surgery)
    method = gradients.create("bdl", num_exits=4, **options)
    if refused is None:
        method.check(net, Objective())
        return
    with pytest.raises(ValueError, match=rf"no deeper exit's loss reaches segment {refused}.*use"):
        method.check(net, Objective())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"variant": "far"}, "one of local, groups, overlap"), ({"size": 0}, "at least 1, got 0")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        gradients.create("bdl", num_exits=3, **options)
