"""Exact counts: every example once, on any number of devices, in batches of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny_run import few_digits  # noqa: F401

from dfs_jax.distributed import placement
from dfs_jax.training.counts import (
    ExitCounts,
    batch_counter,
    count_batch,
    count_split,
    summarise,
    total_counts,
)
from dfs_jax.training.run import prepare
from dfs_jax.training.state import initial_state


def counts_on(devices, batch_size, split="validation"):
    """Counts of a split with fresh weights, and the run."""
    run = prepare(tiny_run.config(f"mesh.data={devices}", f"train.eval_batch_size={batch_size}"))
    variables = initial_state(run).variables
    count = batch_counter(run.network, placement.replicated(run.mesh))
    source = getattr(run.data, split)
    return count_split(count, variables, source, placement.batch(run.mesh)), run, variables


def expected(run, variables, images, labels):
    """The counts, one image after the other, in NumPy."""
    logits = np.stack(
        jax.jit(lambda v, x: run.network.apply(v, x, train=False).logits)(variables, images)
    ).astype(np.float64)
    order = np.argsort(-logits, axis=-1, kind="stable")
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return {
        "top1": (order[..., 0] == labels).sum(1),
        "top5": (order[..., :5] == labels[:, None]).any(-1).sum(1),
        "ensemble": (probabilities.mean(0).argmax(-1) == labels).sum(),
        "loss": -np.log(probabilities[:, np.arange(len(labels)), labels]).sum(1),
        "count": len(labels),
    }


def whole_split(run, split):
    """All images and labels of a split, normalised, in order, without padding."""
    parts = []
    for batch in getattr(run.data, split).batches():
        mask = np.asarray(batch["mask"])
        parts.append([np.asarray(batch[name])[mask] for name in ("image", "label")])
    return (np.concatenate(part) for part in zip(*parts, strict=True))


@pytest.mark.parametrize(("split", "size"), [("validation", 37), ("test", 53)])
def test_every_example_counts_once_on_eight_devices_and_on_one(split, size):
    # 16 and 8 divide neither 37 nor 53: the last batch is padded, and some devices get nothing
    # but padding.
    one, run, variables = counts_on(1, 16, split)
    eight, *_ = counts_on(8, 16, split)
    images, labels = whole_split(run, split)
    want = expected(run, variables, images, labels)
    assert len(labels) == size == one.count == eight.count
    for name in ("top1", "top5", "ensemble", "count"):
        found = getattr(one, name)
        np.testing.assert_array_equal(found, want[name])
        np.testing.assert_array_equal(found, getattr(eight, name))
        assert found.dtype == np.int64
    np.testing.assert_allclose(one.loss, want["loss"], rtol=1e-5)
    np.testing.assert_allclose(eight.loss, want["loss"], rtol=1e-5)


@pytest.mark.parametrize("batch_size", [8, 40, 64])
def test_counts_do_not_depend_on_the_batch_size(batch_size):
    # 64 is more than there is: one batch, mostly padding.
    few, many = counts_on(8, batch_size)[0], counts_on(1, 16)[0]
    for name in ("top1", "top5", "ensemble", "count"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name))


def test_an_answer_that_is_right_only_for_padding_adds_nothing():
    counts, run, _ = counts_on(8, 16)
    batches = list(run.data.validation.batches(placement.batch(run.mesh)))
    assert [int(batch["mask"].sum()) for batch in batches] == [16, 16, 5]
    logits = 50.0 * jax.nn.one_hot(batches[-1]["label"], 10)  # right everywhere
    last = count_batch((logits,), batches[-1]["label"], batches[-1]["mask"])
    assert (int(last.top1[0]), int(last.ensemble), int(last.count)) == (5, 5, 5)
    assert counts.count == 37


def reference_counts(logits, labels, mask):
    """The same counts, one example at a time in float64."""
    n = len(logits)
    top1, top5, loss = np.zeros(n, int), np.zeros(n, int), np.zeros(n)
    ensemble = 0
    for b in np.flatnonzero(mask):
        softmax = np.exp([z[b].astype(np.float64) for z in logits])
        softmax /= softmax.sum(axis=1, keepdims=True)
        for i in range(n):
            order = sorted(range(softmax.shape[1]), key=lambda c: (-logits[i][b, c], c))
            top1[i] += order[0] == labels[b]
            top5[i] += labels[b] in order[:5]
            loss[i] -= np.log(softmax[i, labels[b]])
        ensemble += int(np.argmax(softmax.mean(axis=0)) == labels[b])
    return top1, top5, loss, ensemble


def example_batch(size, classes, seed=0):
    rng = np.random.default_rng(seed)
    # Coarse values, so that there are ties; no -0.0, which top_k places below 0.0.
    logits = tuple(
        (np.round(rng.normal(size=(size, classes)) * 2) + 0.0).astype(np.float32) for _ in range(3)
    )
    labels = rng.integers(0, classes, size)
    return logits, labels, rng.random(size) < 0.8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_counts_equal_counting_one_by_one(dtype):
    logits, labels, mask = example_batch(200, 12)
    labels[~mask] = -1
    padded = tuple(np.where(mask[:, None], z, np.nan) for z in logits)
    got = jax.jit(count_batch)(
        tuple(jnp.asarray(z, dtype) for z in padded), jnp.asarray(labels), jnp.asarray(mask)
    )
    top1, top5, loss, ensemble = reference_counts(logits, labels, mask)
    np.testing.assert_array_equal(got.top1, top1)
    np.testing.assert_array_equal(got.top5, top5)
    np.testing.assert_allclose(got.loss, loss, rtol=1e-5)
    assert int(got.ensemble) == ensemble
    assert int(got.count) == mask.sum()
    assert got.top1.dtype == got.count.dtype == jnp.int32
    assert got.loss.dtype == jnp.float32


def test_counts_do_not_depend_on_batches_or_devices():
    logits, labels, mask = example_batch(64, 12)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    cut = NamedSharding(mesh, PartitionSpec("data"))
    whole = total_counts([count_batch(logits, labels, jnp.asarray(mask))])
    batches = []
    for start in range(0, 64, 16):
        part = jax.tree.map(lambda x, s=start: x[s : s + 16], (logits, labels, mask))
        batches.append(jax.jit(count_batch)(*jax.device_put(part, cut)))
    total = total_counts(batches)
    assert total.top1.dtype == np.int64
    assert total.loss.dtype == np.float64
    np.testing.assert_allclose(total.loss, whole.loss, rtol=1e-6)
    for field in ("top1", "top5", "ensemble", "count"):
        np.testing.assert_array_equal(getattr(total, field), getattr(whole, field))


def test_counts_beyond_32_bits():
    batch = ExitCounts(np.int32([2**30]), None, np.float32([1]), np.int32(2**30), np.int32(2**30))
    total = total_counts([batch] * 6)
    assert total.count == 6 * 2**30
    assert summarise(total, "eval")["eval/exit1/top1"] == 1.0


def test_summary_has_exactly_the_documented_names():
    counts = ExitCounts(np.array([1, 3]), np.array([2, 4]), np.array([8.0, 4.0]), 2, 4)
    assert summarise(counts, "test") == {
        "test/exit1/top1": 0.25,
        "test/exit1/top5": 0.5,
        "test/exit1/loss": 2.0,
        "test/exit2/top1": 0.75,
        "test/exit2/top5": 1.0,
        "test/exit2/loss": 1.0,
        "test/ensemble/top1": 0.5,
        "test/mean/top1": 0.5,
    }


def test_five_classes_have_no_top5_and_an_empty_evaluation_is_an_error():
    logits, labels, mask = example_batch(8, 5)
    counts = count_batch(logits, labels, jnp.asarray(mask))
    assert not [name for name in summarise(counts, "eval") if "top5" in name]
    empty = count_batch(logits, labels, jnp.zeros(8, bool))
    with pytest.raises(ValueError, match="eval: no examples"):
        summarise(empty, "eval")
