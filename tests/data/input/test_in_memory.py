import itertools
import os
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dfs_jax.config import ConfigError
from dfs_jax.data.augment import normalization
from dfs_jax.data.input import in_memory


def over(devices):
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    return NamedSharding(mesh, PartitionSpec("data"))


def create(conf, train, validation=None, test=None):
    conf.data.normalization = "cifar10"
    return in_memory.from_arrays(
        conf,
        name="numbered",
        train=train,
        validation=validation,
        test=test or train,
        class_names=[str(i) for i in range(len(train[1]))],
    )


def take(iterator, count):
    return [jax.tree.map(np.asarray, batch) for batch in itertools.islice(iterator, count)]


def pixels(images):
    """Normalised images (cifar10 statistics) back as grey levels."""
    mean, std = (np.array(s) for s in normalization.STATISTICS["cifar10"])
    return np.round((np.asarray(images, np.float64) * std + mean) * 255).astype(np.uint8)


def assert_equal(these, those):
    jax.tree.map(np.testing.assert_array_equal, these, those)


@pytest.fixture
def augmented(conf):
    conf.data.update(crop_padding=2, crop_fill=77, flip=True, cutout=2)
    conf.train.batch_size = 24
    return conf


def test_a_batch_depends_on_seed_and_step_alone(augmented, numbered):
    straight = take(create(augmented, numbered(20)).train.batches(0), 6)
    train = create(augmented, numbered(20)).train
    for start in (4, 1):
        assert_equal(take(train.batches(start), 2), straight[start : start + 2])
    augmented.data.seed = 1
    other = take(create(augmented, numbered(20)).train.batches(0), 1)[0]
    assert not np.array_equal(other["label"], straight[0]["label"])


def test_every_step_and_seed_draws_its_own_augmentation(augmented, numbered):
    first, second = take(create(augmented, numbered(1)).train.batches(0), 2)
    assert not np.array_equal(first["image"], second["image"])
    augmented.data.seed = 1
    other = take(create(augmented, numbered(1)).train.batches(0), 1)[0]
    assert not np.array_equal(first["image"], other["image"])


@pytest.mark.parametrize("devices", [3, 8])
def test_batches_do_not_depend_on_the_number_of_devices(augmented, numbered, devices):
    augmented.train.eval_batch_size = 24
    data, sharding = create(augmented, numbered(50)), over(devices)
    sharded = list(itertools.islice(data.train.batches(3, sharding), 3))
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(sharded))
    assert_equal(jax.tree.map(np.asarray, sharded), take(data.train.batches(3), 3))
    assert_equal(take(data.test.batches(sharding), 9), take(data.test.batches(), 9))


def test_an_epoch_has_every_example_once_with_its_label(conf, numbered):
    images, labels = numbered(20)
    conf.train.batch_size = 8
    batches = take(create(conf, (images, labels)).train.batches(0), 5)  # two epochs
    found = np.concatenate([batch["label"] for batch in batches])
    assert sorted(found[:20]) == sorted(found[20:]) == list(range(20))
    assert not np.array_equal(found[:20], found[20:])
    shown = np.concatenate([pixels(batch["image"]) for batch in batches])
    np.testing.assert_array_equal(shown, images[found])
    assert batches[0]["image"].dtype == np.float32
    assert batches[0]["label"].dtype == np.int32


def test_training_images_are_crops_and_mirrors_of_their_examples(conf, numbered):
    images, labels = numbered(10)
    conf.data.update(crop_padding=2, crop_fill=77, flip=True)
    conf.train.batch_size = 100
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=77)
    variants: list[dict[bytes, tuple]] = [{} for _ in labels]
    for label, top, left, side in itertools.product(labels, range(5), range(5), (1, -1)):
        window = padded[label, top : top + 5, left : left + 4][:, ::side]
        variants[label][window.tobytes()] = (top, left, side)
    seen = {number: set() for number in labels}
    for batch in take(create(conf, (images, labels)).train.batches(0), 3):
        for image, label in zip(pixels(batch["image"]), batch["label"], strict=True):
            seen[label].add(variants[label][image.tobytes()])  # KeyError: not a variant
    # 30 draws of each example from 50 variants: their own ones, of every epoch.
    assert all(len(drawn) > 10 for drawn in seen.values())
    assert len(set(map(frozenset, seen.values()))) == len(seen)


@pytest.mark.parametrize(
    ("size", "batch_size", "devices"), [(7, 8, 8), (8, 8, 8), (21, 8, 4), (50, 6, 3), (9, 2, 1)]
)
def test_evaluation_counts_every_example_once(conf, numbered, size, batch_size, devices):
    images, labels = numbered(size)
    conf.train.eval_batch_size = batch_size
    source = create(conf, numbered(3), validation=(images, labels)).validation
    batches = take(source.batches(over(devices)), 100)
    assert len(batches) == source.num_batches == -(-size // batch_size)
    assert all(batch["image"].shape == (batch_size, 5, 4, 3) for batch in batches)
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
    assert joined["mask"].tolist() == [i < size for i in range(len(joined["mask"]))]
    np.testing.assert_array_equal(joined["label"][:size], labels)
    np.testing.assert_array_equal(pixels(joined["image"])[:size], images)
    assert np.isfinite(joined["image"]).all()


def test_no_hidden_transfers(augmented, numbered):
    data = create(augmented, numbered(20))
    with jax.transfer_guard("disallow"):
        for sharding in (None, over(2)):
            for batch in itertools.islice(data.train.batches(0, sharding), 3):
                jax.block_until_ready(batch)
            jax.block_until_ready(list(data.test.batches(sharding)))


def test_the_next_batch_is_under_way(conf, numbered, monkeypatch):
    train = create(conf, numbered(20)).train
    asked = []
    indices = in_memory.order.train_indices

    def record(size, batch_size, seed, step):
        asked.append(step)
        return indices(size, batch_size, seed, step)

    monkeypatch.setattr(in_memory.order, "train_indices", record)
    iterator = train.batches(5)
    next(iterator)
    assert asked == [5, 6]
    next(iterator)
    assert asked == [5, 6, 7]


def test_spec(conf, numbered):
    data = create(conf, numbered(20), numbered(5), numbered(7))
    assert (data.spec.train_size, data.spec.validation_size, data.spec.test_size) == (20, 5, 7)
    assert (data.train.size, data.validation.size, data.test.size) == (20, 5, 7)
    assert data.spec.inputs["image"].shape == (5, 4, 3)
    assert data.spec.num_classes == len(data.spec.class_names) == 20
    data = create(conf, numbered(20))
    assert data.validation is None
    assert data.spec.validation_size == 0


def test_what_cannot_be_served(conf, numbered):
    images, labels = numbered(5)
    with pytest.raises(ConfigError, match="test split is empty"):
        create(conf, numbered(5), test=(images[:0], labels[:0]))
    with pytest.raises(ValueError, match=r"train: images must be .* uint8"):
        create(conf, (images.astype(np.float32), labels))
    conf.data.image_size = -1
    with pytest.raises(ConfigError, match=r"data\.image_size -1"):
        create(conf, numbered(5))
    conf.data.image_size = 10**6
    with pytest.raises(
        ConfigError, match=r"image_size \(1000000, 1000000\): 5 images take .* there are .*B$"
    ):
        create(conf, numbered(5))
    conf.data.image_size = 3
    conf.data.cutout = 4
    with pytest.raises(ConfigError, match=r"data\.cutout 4 does not fit images of 3x3"):
        create(conf, numbered(5))
    conf.train.batch_size = 0
    with pytest.raises(ConfigError, match=r"train\.batch_size 0"):
        create(conf, numbered(5))


def test_hold_out_takes_the_last(numbered):
    arrays = numbered(10)
    train, validation = in_memory.hold_out(arrays, 3)
    assert (train[1].tolist(), validation[1].tolist()) == ([*range(7)], [7, 8, 9])
    np.testing.assert_array_equal(validation[0], arrays[0][7:])
    assert in_memory.hold_out(arrays, 0) == (arrays, None)
    for size in (-1, 10):
        with pytest.raises(ConfigError, match=rf"data\.validation_size {size} is out of range"):
            in_memory.hold_out(arrays, size)


def test_resize_is_bilinear_and_rounded(conf, numbered):
    images, labels = numbered(1030)  # more than one chunk
    assert in_memory.resize(images, None) is images
    side = 10
    weights = []
    for pixel_count in images.shape[1:3]:
        centres = (np.arange(side) + 0.5) * pixel_count / side - 0.5
        distance = np.abs(np.clip(centres, 0, pixel_count - 1)[:, None] - np.arange(pixel_count))
        weights.append(np.maximum(0, 1 - distance))
    expected = np.einsum("yh,xw,nhwc->nyxc", *weights, images.astype(np.float64))
    found = in_memory.resize(images, (side, side))
    assert found.dtype == np.uint8
    assert np.abs(found - expected).max() < 0.501
    conf.data.image_size = side
    data = create(conf, (images, labels))
    assert data.spec.inputs["image"].shape == (10, 10, 3)
    np.testing.assert_array_equal(pixels(next(data.test.batches())["image"]), found[:256])


@pytest.mark.slow
def test_two_processes_make_the_batches_of_one(augmented, numbered, tmp_path):
    program = textwrap.dedent("""
        import sys, numpy as np, jax
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from dfs_jax import config
        from dfs_jax.data.input import in_memory
        rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
        jax.distributed.initialize(f"localhost:{port}", 2, rank)
        conf = config.default()
        conf.data.update(crop_padding=2, crop_fill=77, flip=True, cutout=2, normalization="cifar10")
        conf.train.batch_size, conf.train.eval_batch_size = 24, 16
        images = np.random.default_rng(20).integers(0, 256, (20, 5, 4, 3), dtype=np.uint8)
        arrays = images, np.arange(20)
        data = in_memory.from_arrays(conf, name="numbered", train=arrays, validation=None,
                                     test=arrays, class_names=[str(i) for i in range(20)])
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        with jax.transfer_guard("disallow"):
            batches = {"train": next(data.train.batches(2, sharding))}
            batches["last"] = list(data.test.batches(sharding))[-1]
        shown = {}
        for name, batch in batches.items():
            for field, leaf in batch.items():
                for shard in leaf.addressable_shards:
                    shown[f"{name}/{field}/{shard.index[0].start}"] = np.asarray(shard.data)
        np.savez(f"{out}/{rank}.npz", **shown)
    """)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    chosen = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    flags = {"XLA_FLAGS": chosen, "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), port, str(tmp_path)],
            env={**os.environ, **flags},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    augmented.train.eval_batch_size = 16
    data = create(augmented, numbered(20))
    expected = {"train": take(data.train.batches(2), 1)[0], "last": take(data.test.batches(), 2)[1]}
    shards = {}
    for rank in range(2):
        found = dict(np.load(tmp_path / f"{rank}.npz"))
        assert not shards.keys() & found.keys()
        shards |= found
    assert len(shards) == 5 * 4
    for name, value in shards.items():
        batch, field, start = name.split("/")
        whole = expected[batch][field]
        np.testing.assert_array_equal(value, whole[int(start) : int(start) + len(value)])
