"""Cosines between exits' gradients: against NumPy on the gradient of every exit by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dfs_jax.gradients import conflict
from dfs_jax.gradients.paths import segments_by_tensor
from dfs_jax.objectives import Objective
from dfs_jax.surgery import Surgery

EXITS = 3


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def network(surgery=Surgery(partition=False)):  # noqa: B008
    return tiny.network(surgery, widths=(6, 5, 4), dropout_rate=0.2, dtype=np.float64)


@functools.cache
def measured(net):
    params, problem = tiny.problem(net)
    found = tiny.jitted(lambda params: conflict.measure(problem, params))(params)
    return params, problem, jax.device_get(found)


def exits_gradients(problem, params):
    """Of every exit's loss in the whole network, by the path of the tensor."""
    all_at_once = tiny.jitted(jax.jacrev(lambda p: problem.losses(p)[0]))
    flat = tiny.flat(all_at_once(params))
    return [{name: tensor[i] for name, tensor in flat.items()} for i in range(EXITS)]


def angle(one, other, names):
    """Cosine between two gradients' tensors `names`, NaN where one has none."""
    a, b = (np.concatenate([np.zeros(0), *(g[n].ravel() for n in names)]) for g in (one, other))
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / lengths if lengths else np.nan


def is_exits_own(name):
    return name.startswith("heads")


@pytest.mark.parametrize(
    "surgery",
    [Surgery(partition=False), Surgery(exit_gradient="all"), Surgery(beta=0.3)],
    ids=["joint", "all", "own"],
)
def test_cosines_are_those_of_the_gradients(surgery):
    params, problem, found = measured(network(surgery))
    gradients = exits_gradients(problem, params)
    backbone = [n for n in gradients[0] if not is_exits_own(n)]
    layers = {path: matrix for segment in found.layers for path, matrix in segment.items()}
    for i in range(EXITS):
        for j in range(EXITS):
            shared = [n for n in backbone if tiny.segment_of(n) <= min(i, j)]
            parts = [(found.overall, shared)]
            for s in range(EXITS):
                here = [n for n in backbone if tiny.segment_of(n) == s]
                parts.append((found.segments[s], here))
            for path, matrix in layers.items():
                parts.append((matrix, [n for n in backbone if n.rpartition("/")[0] == path]))
            for matrix, names in parts:
                assert names
                want = angle(gradients[i], gradients[j], names)
                np.testing.assert_allclose(matrix[i, j], want, atol=1e-12, err_msg=str(names))
    useless = f"sides_{EXITS - 1}"  # nothing follows what it hands on
    assert {*layers, useless} == {n.rpartition("/")[0] for n in backbone}


def test_an_exit_has_no_angle_in_deeper_segments():
    _, _, found = measured(network())
    for s in range(EXITS):
        undefined = np.isnan(found.segments[s])
        deeper = np.arange(EXITS) < s
        np.testing.assert_array_equal(undefined, deeper[:, None] | deeper[None, :])


def test_surgery_leaves_nothing_to_disagree_on():
    """In the layer that is cut an exit and the deeper ones train different channels."""
    net = tiny.network(Surgery(beta=0.5), side=False)
    _, _, found = measured(net)
    joint = measured(tiny.network(side=False))[2]
    for s in range(EXITS - 1):
        for j in range(s + 1, EXITS):
            assert found.segments[s, s, j] == found.layers[s][f"mains_{s}"][s, j] == 0.0
            assert joint.segments[s, s, j] != 0
    assert found.segments[0, 1, 2] != 0  # both train what segment 1 hands on


@pytest.mark.parametrize(("beta", "dead"), [(0.0, "deeper"), (1.0, "all but the last")])
def test_what_is_cut_off_altogether_has_no_gradient(beta, dead):
    _, _, found = measured(tiny.network(Surgery(beta=beta), side=False))
    gone = {"deeper": [1, 2], "all but the last": [0, 1]}[dead]
    for i in range(EXITS):
        assert np.isnan(found.segments[0, i, i]) == (i in gone)
        assert all(np.isnan(found.segments[0, i, j]) for j in gone)


class Linear:
    """Two exits whose losses are ⟨a, w⟩ and ⟨b, w⟩."""

    num_exits = 2

    def __init__(self, a, b):
        self.vectors = (jnp.asarray(a), jnp.asarray(b))

    def apply(self, variables, carry, i=None, *, num_exits=None, method=None, **_):
        size = len(variables["params"]["shared"]["w"])
        if method == "advance":
            w = variables["params"]["shared"]["w"] if i == 0 else 0.0
            return ((carry[0], carry[1] + w) if i == 0 else None, carry[0] + w), {}
        answers = tuple(
            jnp.zeros((size, 1)) + v @ variables["params"]["shared"]["w"]
            for v in self.vectors[:num_exits]
        )
        outputs = type("Outputs", (), {"logits": answers, "features": answers})
        return outputs, {}


class Raw(Objective):
    """The logit is the loss."""

    def example_losses(self, i, num_exits, logits, *_):
        return logits[:, 0]


@tiny.jitted
def between(a, b):
    """What is measured between the gradients `a` and `b`."""
    batch = {"image": jnp.zeros((3, 3)), "label": jnp.zeros(3, int)}
    problem = tiny.Problem(Linear(a, b), Raw(), batch, {}, None)
    return conflict.measure(problem, {"shared": {"w": jnp.ones(3)}})


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        ([1, 2, 3], [2, 4, 6], 1),
        ([1, 2, 3], [-3, -6, -9], -1),
        ([1, 0, 2], [0, 5, 0], 0),
        ([1e-30, 0, 0], [1e-30, 1e-30, 0], 0.5**0.5),
        ([0, 0, 0], [1, 2, 3], np.nan),
    ],
    ids=["parallel", "opposed", "apart", "tiny", "zero"],
)
def test_known_angles(a, b, want):
    found = between(np.float64(a), np.float64(b))
    for matrix in (found.overall, found.segments[0], found.layers[0]["shared"]):
        np.testing.assert_allclose(matrix[0, 1], want, rtol=1e-12)
        assert np.isnan(matrix[0, 0]) == np.isnan(want)
    assert np.isnan(found.segments[1]).all()


def test_tensors_belong_to_the_segment_that_reads_them():
    params, problem = tiny.problem(tiny.network(widths=(4, 3)))
    owners = tiny.flat(segments_by_tensor(problem, params))
    for name, segment in owners.items():
        # Of the last segment only what leads to its exit is part of the network.
        unused = name.startswith("sides_1")
        assert segment == (-1 if is_exits_own(name) or unused else tiny.segment_of(name)), name


def test_names_of_the_metrics():
    segments = np.arange(8.0).reshape(2, 2, 2)
    layers = ({"a/b": np.array([[1, 0.25], [0.25, 1]])}, {"c": np.full((2, 2), np.nan)})
    found = conflict.scalars(conflict.Conflict(segments, np.array([[1, 0.5], [0.5, 1]]), layers))
    assert np.isnan(found.pop("conflict/segment2/layer/c"))
    assert found == {
        "conflict/exit1_exit2": 0.5,
        "conflict/segment1/exit1_exit2": 1.0,
        "conflict/segment1/layer/a/b": 0.25,
    }


def test_one_exit_has_nobody_to_disagree_with():
    _, _, found = measured(tiny.network(widths=(4,)))
    assert all(np.isnan(value) for value in conflict.scalars(found).values())
