"""Exact evaluation: every example counts once, on any number of devices."""

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import few_digits  # noqa: F401

from dfs_jax.distributed import placement
from dfs_jax.training.counts import batch_counter, count_batch, count_split
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
