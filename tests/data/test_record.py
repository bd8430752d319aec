"""What a run notes of its data: kept as JSON, and compared."""

import json

import pytest

from dfs_jax.config import ConfigError
from dfs_jax.data import record
from dfs_jax.data.record import Record, Split

PARTS = {"ant": (3, "a"), "cat": (4, "c")}
BEFORE = Record(
    classes=("ant", "cat"),
    splits={
        "train": Split("train", PARTS),
        "validation": Split("train", {"cat": (2, "v")}),
        "test": Split("test", PARTS),
    },
    held_out={"validation": ("cat/1.jpg", "cat/\udc80.jpg")},  # a name that is no UTF-8
    statistics=((0.5,), (0.25,)),
)


def with_split(name, split):
    return Record(BEFORE.classes, {**BEFORE.splits, name: split}, BEFORE.held_out)


def test_a_record_is_the_same_after_json():
    for noted in (BEFORE, record.OF_BEFORE, record.whole({"train": 9, "test": 2}, "ab")):
        assert Record.from_json(json.loads(json.dumps(noted.to_json()))) == noted


def test_a_fingerprint_depends_on_every_line_and_on_no_order():
    prints = [record.fingerprint(lines) for lines in (["a", "b"], ["b", "a"], ["a"], ["ab"])]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (("ant", "cat"), []),
        (("ant", "zcat"), ["class 'cat' is gone", "class 'zcat' is new"]),
        (("ant", "bee", "cat"), ["class 'bee' is new"]),
        (("ant",), ["class 'cat' is gone"]),
        (("cat", "ant"), ["the classes are in another order, 'cat', 'ant' now"]),
    ],
)
def test_classes_that_differ_are_named(now, told):
    assert record.of_classes(BEFORE.classes, now) == told


@pytest.mark.parametrize(
    ("split", "told"),
    [
        (Split("test", PARTS), []),
        (
            Split("test", {"ant": (3, "a"), "cat": (5, "d")}),
            ["test split, cat: 5 examples, 4 before"],
        ),
        (
            Split("test", {"ant": (3, "x"), "cat": (4, "c")}),
            ["test split, ant: 3 examples as before, of other names or sizes"],
        ),
        (Split("test", {"cat": (4, "c")}), ["test split, ant: 0 examples, 3 before"]),
        (Split("val", PARTS), ["the test split came from 'test', and comes from 'val' now"]),
    ],
)
def test_splits_that_differ_are_named(split, told):
    assert record.of_measured(BEFORE, with_split("test", split)) == told
    assert record.of_training(BEFORE, with_split("test", split)) == []


def test_training_images_that_differ_are_told_apart():
    now = with_split("train", Split("train", {**PARTS, "cat": (5, "d")}))
    assert record.of_measured(BEFORE, now) == []
    assert record.of_training(BEFORE, now) == ["train split, cat: 5 examples, 4 before"]


def test_many_changes_are_counted():
    now = with_split("test", Split("test", {str(i): (1, "") for i in range(9)}))
    *first, last = record.of_measured(BEFORE, now)
    assert (len(first), last) == (5, "6 more such changes in the test split")


def test_a_refusal_is_one_sentence_with_all_that_differs():
    record.refuse([], "/images")
    with pytest.raises(ConfigError, match=r"the data in /images are not .*: one; two; restore"):
        record.refuse(["one", "two"], "/images")
