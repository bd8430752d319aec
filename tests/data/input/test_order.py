import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfs_jax import config
from dfs_jax.config import ConfigError
from dfs_jax.data.input import order
from dfs_jax.data.input.order import Streams


@st.composite
def plans(draw):
    count, rows_per_stream = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    size = draw(st.integers(count, 150))
    return Streams(count, size, count * rows_per_stream, seed=draw(st.integers(0, 2**32 - 1)))


@given(plans())
def test_streams_divide_the_records_evenly(plan):
    bounds = [plan.bounds(v) for v in range(plan.count)]
    assert [r for first, last in bounds for r in range(first, last)] == list(range(plan.size))
    lengths = [last - first for first, last in bounds]
    assert max(lengths) - min(lengths) <= 1


@settings(max_examples=40)
@given(plans())
def test_every_record_of_a_stream_once_per_epoch_in_an_order_of_its_own(plan):
    rows = np.arange(plan.batch_size)
    first, last = plan.bounds(plan.count - 1)
    steps = -(-2 * (last - first) // plan.rows_per_stream)
    own = np.concatenate([plan.indices(s, rows)[-plan.rows_per_stream :] for s in range(steps)])[
        : 2 * (last - first)
    ]
    one, two = np.split(own, 2)
    assert sorted(one) == sorted(two) == list(range(first, last))
    if last - first > 8:
        assert list(one) != list(two)


@given(plans(), st.integers(0, 10**9), st.data())
def test_a_host_makes_its_rows_of_the_same_batch(plan, step, data):
    hosts = data.draw(st.sampled_from([h for h in (1, 2, 3, 4, 6) if plan.count % h == 0]))
    parts = [plan.indices(step, order.host_rows(plan.batch_size, h, hosts)) for h in range(hosts)]
    whole = plan.indices(step, np.arange(plan.batch_size))
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    chosen = [plan.of_rows(order.host_rows(plan.batch_size, h, hosts)) for h in range(hosts)]
    np.testing.assert_array_equal(np.concatenate(chosen), np.arange(plan.count))


def test_another_seed_is_another_order():
    rows = np.arange(8)
    orders = [Streams(2, 1000, 8, seed).indices(3, rows).tolist() for seed in (0, 1)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize(
    ("fields", "hosts", "message"),
    [
        ({"streams": 48}, 1, "batch_size 64 is not a multiple of data.streams 48.*take 96"),
        ({"streams": 64}, 48, "streams 64 cannot be shared evenly by 48 hosts; take 96"),
        ({"streams": 0}, 1, "data.streams 0 is not positive"),
        ({"streams": 64, "size": 50}, 1, "more than the 50 training examples"),
        ({"streams": 16, "eval": 100}, 16, "eval_batch_size 100 cannot be shared evenly by 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, hosts, message):
    c = config.default()
    c.data.streams = fields["streams"]
    c.train.eval_batch_size = fields.get("eval", 48 * 64)
    with pytest.raises(ConfigError, match=message):
        Streams.from_config(c, fields.get("size", 10_000), hosts)


def test_rows_that_are_no_whole_streams_are_refused():
    with pytest.raises(ConfigError, match=r"a host makes 2 of the 8 rows.*no whole streams of 4"):
        Streams(2, 100, 8, 0).of_rows(np.arange(2))
