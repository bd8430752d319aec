"""TFRECORD files, whole and damaged, and the files of either backend in streams."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import stored

from dfs_jax.data.input import order, records
from dfs_jax.data.input.order import Streams

LENGTHS = (10, 3, 0, 17, 8)
SIZE = sum(LENGTHS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, number, paths = tmp_path_factory.mktemp("records"), itertools.count(), []
    for i, length in enumerate(LENGTHS):
        payloads = [b"%d" % next(number) + b"." * 500 for _ in range(length)]
        paths.append(stored.tfrecord(folder / f"{i}.tfrecord", payloads))
    return records.Files(tuple(paths), LENGTHS)


def read(dataset, size=None):
    """Numbers from the records themselves, None for those that could not be read."""
    numbers = []
    for raw, index in itertools.islice(dataset.as_numpy_iterator(), size):
        assert raw == b"" or int(raw.rstrip(b".")) == index
        numbers.append(int(index) if raw else None)
    return numbers


def steps(source, plan, start, count, rows=None):
    rows = np.arange(plan.batch_size) if rows is None else rows
    numbers = read(source.shuffled(plan, start, rows), count * len(rows))
    return np.array(numbers).reshape(count, len(rows))


def test_stored_order_of_any_part(files):
    source = records.TFRecords(files, shuffle_buffer=4)
    for first, last in ((0, SIZE), (0, 0), (5, 12), (10, 13), (12, 31), (SIZE - 1, SIZE)):
        assert read(source.ordered(first, last)) == list(range(first, last))


def test_every_record_of_a_stream_once_per_epoch(files):
    plan = Streams(count=3, size=35, batch_size=6, seed=5)  # the last three are held out
    batches = steps(records.TFRecords(files, shuffle_buffer=4), plan, 0, 13)
    for v in range(3):
        first, last = plan.bounds(v)
        own = batches[:, 2 * v : 2 * v + 2].ravel()
        one, two = own[: last - first], own[last - first : 2 * (last - first)]
        assert sorted(one) == sorted(two) == list(range(first, last))
        assert list(one) != list(two)
        assert list(one) != sorted(one)


def test_going_on_and_a_part_of_the_rows_give_the_same_batches(files):
    source = records.TFRecords(files, shuffle_buffer=4)
    plan = Streams(count=4, size=SIZE, batch_size=8, seed=2**32 - 1)
    whole = steps(source, plan, 0, 14)  # nearly three epochs
    for start in (3, 5, 11):
        np.testing.assert_array_equal(steps(source, plan, start, 3), whole[start : start + 3])
    for host in range(2):
        rows = order.host_rows(8, host, 2)
        np.testing.assert_array_equal(steps(source, plan, 2, 4, rows), whole[2:6, rows])
    apart = np.array([0, 1, 6, 7])  # as where devices of a host do not follow each other
    np.testing.assert_array_equal(steps(source, plan, 2, 4, apart), whole[2:6, apart])


def test_other_seeds_are_other_orders(files):
    source = records.TFRecords(files, shuffle_buffer=4)
    one, two = (steps(source, Streams(2, SIZE, 4, seed), 0, 5) for seed in (0, 1))
    assert (one != two).any()


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        ("truncate", range(4, 10)),
        ("flip", range(4, 10)),
        ("empty", range(10)),
        ("garbage", range(10)),
        ("remove", range(10)),
        ("forbid", range(10)),
    ],
)
def test_damage_loses_just_what_cannot_be_read_and_says_where(files, tmp_path, damage, lost):
    path = tmp_path / "0.tfrecord"
    content = bytearray(Path(files.paths[0]).read_bytes())
    record = len(content) // 10
    if damage == "truncate":
        content = content[: int(4.5 * record)]
    if damage == "flip":
        content[4 * record + 100] ^= 1
    path.write_bytes({"empty": b"", "garbage": os.urandom(5000)}.get(damage, bytes(content)))
    if damage == "remove":
        path.unlink()
    if damage == "forbid":  # a folder cannot be read as a file by anyone, the superuser neither
        path.unlink()
        path.mkdir()
    broken = records.Files((str(path), *files.paths[1:]), LENGTHS)
    source = records.TFRecords(broken, shuffle_buffer=4)
    assert read(source.ordered(0, SIZE)) == [None if i in lost else i for i in range(SIZE)]
    epoch = steps(source, Streams(1, SIZE, 2, 0), 0, SIZE // 2).ravel().tolist()
    assert epoch.count(None) == len(lost)
    assert {i for i in epoch if i is not None} == set(range(SIZE)) - set(lost)
    assert broken.where(lost[0]) == f"record {lost[0]} of {path}"


def test_names_of_records(files):
    assert files.where(0) == f"record 0 of {files.paths[0]}"
    assert files.where(12) == f"record 2 of {files.paths[1]}"
    assert files.where(13) == f"record 0 of {files.paths[3]}"  # the third is empty
    assert files.where(SIZE - 1) == f"record 7 of {files.paths[4]}"


def test_the_first_missing_file(files, tmp_path):
    assert records.first_missing(files.paths) is None
    missing = str(tmp_path / "nowhere" / "x")
    assert records.first_missing([*files.paths, missing]) == missing
