import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dfs_jax.config import ConfigError
from dfs_jax.data import pipeline
from dfs_jax.data.input import devices, order


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(1, 30),
    batch_size=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_epoch_has_every_example_once(size, batch_size, seed):
    steps = -(-3 * size // batch_size)
    stream = np.concatenate([order.train_indices(size, batch_size, seed, s) for s in range(steps)])
    assert len(stream) == steps * batch_size
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_the_order_depends_on_seed_and_epoch_and_stays_as_it_is():
    orders = {(s, e): tuple(order.permutation(50, s, e)) for s in range(3) for e in range(3)}
    assert len(set(orders.values())) == 9
    # Runs that are resumed after an upgrade rely on these very numbers.
    assert order.permutation(10, 7, 3).tolist() == [8, 4, 5, 3, 6, 0, 9, 7, 1, 2]
    assert order.train_indices(10, 4, 7, 7).tolist()[2:] == [8, 4]


def test_the_cached_order_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        order.permutation(10, 0, 0)[0] = 3


def test_batches_are_checked_against_devices(conf):
    conf.train.batch_size, conf.train.eval_batch_size = 64, 96
    pipeline.check_batch(conf, 8)
    with pytest.raises(
        ConfigError, match=r"train.batch_size 64 is not divisible by the 3 dev.* 66"
    ):
        pipeline.check_batch(conf, 3)
    with pytest.raises(ConfigError, match=r"train.eval_batch_size 96 is not .* the 64 devices"):
        pipeline.check_batch(conf, 64)
    for field in ("batch_size", "eval_batch_size"):
        with conf.unlocked():
            changed = conf.copy_and_resolve_references()
        changed.train[field] = 0
        with pytest.raises(ConfigError, match=rf"train\.{field} 0 is not positive"):
            pipeline.check_batch(changed, 1)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_keys_cannot_take(conf, seed):
    conf.data.seed = seed
    with pytest.raises(ConfigError, match=r"data\.seed"):
        pipeline.check_seed(conf)


def test_place_is_an_explicit_transfer():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    values = np.arange(8)
    for sharding in (None, NamedSharding(mesh, PartitionSpec("data"))):
        with jax.transfer_guard("disallow"):
            placed = devices.place(values, sharding)
        np.testing.assert_array_equal(placed, values)
        assert sharding is None or placed.sharding == sharding
