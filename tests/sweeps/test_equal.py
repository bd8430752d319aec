"""Which configurations train the same thing."""

import json

import pytest

from dfs_jax import config as configuration
from dfs_jax.sweeps.equal import differing, what_trains


def trains(request, spec, *overrides):
    file = request.config.rootpath / "configs" / f"{spec}"
    return what_trains(json.loads(configuration.to_json(configuration.load(str(file), overrides))))


@pytest.mark.parametrize(
    ("spec", "one", "other", "equal"),
    [
        ("digits.py:joint", "surgery.beta=0.25", "surgery.beta=0.5", True),
        ("digits.py:joint", "surgery.exit_gradient=own", "surgery.exit_gradient=all", True),
        ("digits.py:joint", "surgery.first_exit=1", "surgery.first_exit=2", True),
        ("digits.py:mixed", "surgery.beta=0.25", "surgery.beta=0.5", False),  # of a phase, maybe
        ("digits.py:pcgrad", "surgery.referencing=true", "surgery.referencing=false", True),
        ("digits.py:dfs", "surgery.beta=0.25", "surgery.beta=0.5", False),
        ("digits.py:dfs", "objective.temperature=2.0", "objective.temperature=3.0", True),
        ("digits.py:dfs", "train.eval_every=5", "train.eval_every=6", True),
        ("digits.py:dfs", "mesh.data=1", "mesh.data=2", True),
        ("digits.py:dfs", "data.dir=/here", "data.dir=/there", False),
        ("digits.py:dfs", "seed=1", "seed=2", False),
        ("digits.py:dfs", "optimizer.milestones=(1.0,)", "optimizer.milestones=(2.0,)", True),
        ("cifar100.py:dfs", "optimizer.milestones=(1.0,)", "optimizer.milestones=(2.0,)", False),
    ],
)
def test_idle_fields_do_not_count(request, spec, one, other, equal):
    assert (trains(request, spec, one) == trains(request, spec, other)) == equal


def test_the_official_draw_of_weights_depends_on_beta(request):
    draw = "model.name=vgg7_cifar100", "model.options.split_init=true"
    one, other = (
        trains(request, "digits.py:joint", *draw, f"surgery.beta={b}") for b in (0.2, 0.4)
    )
    assert one != other


def test_fields_in_which_some_differ(request):
    found = {m: trains(request, f"digits.py:{m}") for m in ("joint", "dfs", "ge")}
    fields = differing(found)
    assert fields["surgery.partition"] == {"joint": False, "dfs": True, "ge": False}
    assert fields["gradients.name"] == {"joint": "joint", "dfs": "joint", "ge": "equilibrium"}
    assert fields["surgery.beta"] == {"joint": None, "dfs": 0.5, "ge": None}
    assert "seed" not in fields
