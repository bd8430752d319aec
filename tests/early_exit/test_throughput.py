"""The measurement of early exit's speed-up: who is sent where, and the arithmetic of a round."""

import bundles
import numpy as np
import pytest
from shapes import image

from dfs_jax.early_exit import stages, throughput
from dfs_jax.early_exit.throughput import Round


@pytest.mark.parametrize("ratio", [0.25, 1.0, 2.0])
def test_shares_grow_by_the_ratio_from_exit_to_exit(ratio):
    confidences = throughput._prescribed(np.random.default_rng(0), 2000, 4, ratio)
    leaving = np.bincount(confidences.argmax(0), minlength=4) / 2000
    shares = ratio ** np.arange(4)
    np.testing.assert_allclose(leaving, shares / shares.sum(), atol=1e-3)
    assert (np.diff(confidences, axis=0) >= 0).all()  # who is sure stays sure
    assert set(np.unique(confidences)) == {0, 1}


def test_speedups_are_medians_of_what_the_rounds_measured():
    """Half leave at each of two exits: 2 + 1 seconds for all, 3 + 1 more for half of them."""
    prescribed = np.array([[0, 1, 0, 1], [1, 1, 1, 1]], float)
    rounds = [
        Round(np.array([2.0, 3.0]), np.array([1.0, 1.0]), 6.0, np.array([slow]), np.array([4.0]))
        for slow in (4.0, 8.0, 60.0)
    ]
    found = throughput._speedup(1.0, prescribed, 0, rounds, 2)
    promised = 6 / (3 + 4 / 2)
    assert found.leaving == (0.5, 0.5)
    assert found.promised == pytest.approx(promised)
    assert found.batch == pytest.approx(6 / 8)
    assert found.batch_share == pytest.approx(6 / 8 / promised)
    assert found.refill == pytest.approx(6 / 4)


def test_the_router_is_measured():
    parts = stages.from_network(bundles.Dense(), bundles.variables(), image(*bundles.IMAGE))
    found = throughput.measure(
        parts, bundles.IMAGE, batch_size=2, batches=2, repeats=1, ratios=(0.5, 1.0)
    )
    assert [f.ratio for f in found] == [0.5, 1.0]
    assert all(np.isfinite(f[2:]).all() and min(f[2:]) > 0 for f in found)
    header, _, *lines = throughput.table(found).splitlines()
    assert header.split()[0] == "q"
    assert [line.split()[0] for line in lines] == ["0.5", "1"]


def test_requests_that_cannot_be_carried_out(capsys):
    config = ["--config", "configs/digits.py"]
    assert throughput.main([*config, "--repeats", "0"]) == 2
    assert "--repeats must be at least 1" in capsys.readouterr().err
    assert throughput.main([*config, "--config.data.name=other"]) == 2
    assert "'other' are not known here; known: digits" in capsys.readouterr().err
