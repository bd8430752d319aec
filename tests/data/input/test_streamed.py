"""Batches of streamed sets: the same on any hosts and after a resume, exact counts, damage."""

import itertools
import logging
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
import stored
from jax.sharding import NamedSharding, PartitionSpec

from dfs_jax import config
from dfs_jax.config import ConfigError
from dfs_jax.data.augment import normalization
from dfs_jax.data.input import order, pictures, streamed
from dfs_jax.data.input.records import Files, TFRecords
from dfs_jax.data.pipeline import DataError
from dfs_jax.data.record import Record

TRAIN, TEST, CLASSES = 50, 37, 5


def configured(**fields):
    c = config.default()
    c.data.update(
        name="imagenet2012", image_size=16, streams=8, shuffle_buffer=3, validation_size=0
    )
    c.train.batch_size = c.train.eval_batch_size = 16
    for field, value in fields.items():
        (c.train if "batch_size" in field else c.data)[field] = value
    return c


def label_of(i):
    return i % CLASSES


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Writes the images `numbers` into files of seven; `edit` changes (image, label) of some."""

    def write(numbers, edit=lambda i, image, label: (image, label)):
        folder = tmp_path_factory.mktemp("split")
        payloads = []
        for i in numbers:
            payloads.append(stored.example(*edit(i, stored.encoded(stored.photo(i)), label_of(i))))
        chunks = [payloads[i : i + 7] for i in range(0, len(payloads), 7)]
        paths = [stored.tfrecord(folder / f"{i}", chunk) for i, chunk in enumerate(chunks)]
        return TFRecords(Files(tuple(paths), tuple(map(len, chunks))), shuffle_buffer=3)

    return write


@pytest.fixture(scope="module")
def served(split):
    """Serves whole splits by a configuration."""
    train, test = split(range(TRAIN)), split(range(1000, 1000 + TEST))

    def serve(c, train=train, test=test):
        streamed.check_config(c)
        names = [str(i) for i in range(CLASSES)]
        return streamed.from_records(
            c, name="small", train=train, test=test, class_names=names, statistics="imagenet"
        )

    return serve


def take(source, count):
    return list(itertools.islice(source, count))


def test_the_same_batches_on_two_hosts_and_after_a_resume(served):
    source = served(configured()).train
    whole = take(source.examples(0, np.arange(16)), 8)  # beyond two epochs
    assert len({batch["image"].tobytes() for batch in whole}) == 8
    parts = [take(source.examples(5, order.host_rows(16, h, 2)), 2) for h in range(2)]
    for step in range(2):
        for key in ("image", "label"):
            joined = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(joined, whole[5 + step][key])


def test_device_batches_are_the_host_batches_augmented_and_normalised(served):
    c = configured(normalization="cifar10")
    source = served(c).train
    (host,) = take(source.examples(3, np.arange(16)), 1)
    mean, std = (np.array(s) for s in normalization.STATISTICS["cifar10"])
    (plain,) = take(source.batches(3), 1)
    assert plain["image"].dtype == np.float32
    np.testing.assert_allclose(plain["image"], (host["image"] / 255 - mean) / std, atol=1e-5)
    np.testing.assert_array_equal(plain["label"], host["label"])
    assert plain["label"].dtype == np.int32

    flipped = np.asarray(
        take(served(configured(flip=True, normalization="cifar10")).train.batches(3), 1)[0]["image"]
    )
    same = [bool((a == b).all()) for a, b in zip(flipped, plain["image"], strict=True)]
    mirrored = [bool((a == b[:, ::-1]).all()) for a, b in zip(flipped, plain["image"], strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 0 < sum(mirrored) < 16


def test_eight_devices_have_the_batches_of_one_without_a_hidden_transfer(served):
    d = served(configured(flip=True))
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    for source in (d.train.batches, d.test.batches):
        arguments = (2,) if source == d.train.batches else ()
        with jax.transfer_guard("disallow"):
            spread = take(source(*arguments, sharding), 2)
        for one, many in zip(take(source(*arguments), 2), spread, strict=True):
            for key, value in many.items():
                assert value.sharding.is_equivalent_to(sharding, value.ndim)
                np.testing.assert_allclose(value, one[key], atol=1e-6)
    assert spread[0]["mask"].dtype == bool


def test_batches_are_mixed_where_the_configuration_says_so(served, monkeypatch):
    def compiled(mixed, seed, num_classes, sharding):
        assert (mixed.mixup, seed, num_classes, sharding) == (0.5, 7, CLASSES, None)
        return lambda batch, step: {**batch, "step": step}

    monkeypatch.setattr(streamed.Mixing, "compiled", compiled)
    batches = take(served(configured(mixup=0.5, seed=7)).train.batches(4), 2)
    assert [int(batch["step"]) for batch in batches] == [4, 5]


@pytest.mark.parametrize(("hosts", "batch_size"), [(2, 16), (4, 64)])
def test_every_example_is_evaluated_once_on_any_number_of_hosts(served, hosts, batch_size):
    source = served(configured(eval_batch_size=batch_size, validation_size=7)).test
    parts = [list(source.examples(h, hosts)) for h in range(hosts)]
    assert len({len(part) for part in parts}) == 1
    seen = []
    for batch in itertools.chain(*parts):
        assert batch["image"].shape == (batch_size // hosts, 16, 16, 3)
        seen += [image.tobytes() for image in batch["image"][batch["mask"]]]
    in_order = [b["image"][b["mask"]] for b in source.examples(0, 1)]
    assert seen == [image.tobytes() for image in np.concatenate(in_order)]
    assert len(set(seen)) == len(seen) == TEST


def test_a_host_without_examples_of_its_own_takes_part_with_masked_ones(served, split):
    source = served(configured(), test=split(range(3))).test
    parts = [list(source.examples(h, 4)) for h in range(4)]
    assert [[int(b["mask"].sum()) for b in part] for part in parts] == [[0], [1], [1], [1]]
    assert source.num_batches == 1


def test_held_out_examples_are_the_last_ones_read_clean_and_never_trained_on(served):
    d = served(configured(validation_size=10, crop_area=1.0))
    assert (d.train.size, d.validation.size, d.test.size) == (40, 10, TEST)
    assert (d.spec.train_size, d.spec.validation_size, d.spec.test_size) == (40, 10, TEST)
    clean = np.concatenate([b["image"][b["mask"]] for b in d.validation.examples(0, 1)])
    whole = served(configured(), test=d.train._rows.records).test
    every = np.concatenate([b["image"][b["mask"]] for b in whole.examples(0, 1)])
    np.testing.assert_array_equal(clean, every[40:])
    records = d.train._rows.records.shuffled(d.train._plan, 0, np.arange(16))
    trained = {int(i) for _, i in take(records.as_numpy_iterator(), 200)}
    assert trained == set(range(40))
    assert served(configured()).validation is None


def damage(i, image, label):
    return {3: (image[:200], label), 11: (image, CLASSES), 1005: (b"", label)}.get(
        i, (image, label)
    )


def test_damage_is_an_error_that_names_the_record(served, split):
    d = served(
        configured(), train=split(range(TRAIN), damage), test=split(range(1000, 1010), damage)
    )
    wrong = r"record (3 of .*/0 cannot be read as an image: it is truncated|4 of .*/1 has a label)"
    with pytest.raises(DataError, match=wrong):
        take(d.train.examples(2, np.arange(16)), 5)
    with pytest.raises(
        DataError, match=r"record 5 of .*/0 cannot be read as an image: it is empty"
    ):
        list(d.test.batches())


def test_skipped_damage_is_replaced_counted_and_told(served, split, caplog):
    c = configured(on_error="skip", streams=4)
    whole = served(c).train
    d = served(c, train=split(range(TRAIN), damage), test=split(range(1000, 1010), damage))
    plan, rows = d.train._plan, np.arange(16)
    numbers = [
        int(i)
        for _, i in take(d.train._rows.records.shuffled(plan, 0, rows).as_numpy_iterator(), 96)
    ]
    with caplog.at_level(logging.WARNING):
        batches = take(d.train.examples(0, rows), 6)
    bad = [i for i, number in enumerate(numbers) if number in (3, 11)]
    assert d.train.skipped == len(bad) >= 3
    assert "record 3 of" in caplog.text
    assert f"{len(bad)} skipped so far" in caplog.text
    images = np.concatenate([b["image"] for b in batches])
    labels = np.concatenate([b["label"] for b in batches])
    intact = np.concatenate([b["image"] for b in take(whole.examples(0, rows), 6)])
    for i, number in enumerate(numbers):
        if i not in bad:
            np.testing.assert_array_equal(images[i], intact[i])
            assert labels[i] == label_of(number)
            continue
        step, row = divmod(i, 16)
        same_stream = [step * 16 + row // 4 * 4 + (row + k) % 4 for k in (1, 2, 3)]
        stand_ins = [j for j in same_stream if j not in bad]
        assert any((images[i] == images[j]).all() for j in stand_ins)
    halves = [take(d.train.examples(0, order.host_rows(16, h, 2)), 6) for h in range(2)]
    for step, batch in enumerate(batches):
        joined = np.concatenate([half[step]["image"] for half in halves])
        np.testing.assert_array_equal(joined, batch["image"])
    counted = sum(int(b["mask"].sum()) for b in d.test.batches())
    assert (counted, d.test.size) == (9, 10)
    assert "evaluation: 1 of 10 examples skipped" in caplog.text


def test_a_batch_of_which_nothing_can_be_used_ends_the_run(served, split):
    c = configured(on_error="skip")
    d = served(c, train=split(range(TRAIN), lambda i, image, label: (b"", label)))
    with pytest.raises(DataError, match="none of the 16 records of a batch can be used"):
        next(d.train.batches(0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 0}, "data.image_size 0.*needs the pixels"),
        ({"image_size": (16, 0)}, r"data.image_size \(16, 0\) is neither a positive number"),
        ({"on_error": "ignore"}, "data.on_error must be 'raise' or 'skip'"),
        ({"backend": "pytorch"}, "data.backend must be 'tf' or 'grain'"),
        ({"shuffle_buffer": 0}, "data.shuffle_buffer 0"),
        ({"crop_area": 0.0}, "data.crop_area 0.0 is not in"),
        ({"validation_size": -2}, "data.validation_size -2 is negative"),
        ({"validation_size": -1}, "small has no validation split"),
        ({"validation_size": TRAIN}, "validation_size 50 leaves none of the 50.*give 0 .* to 49"),
        ({"streams": 5}, "batch_size 16 is not a multiple of data.streams 5"),
        ({"batch_size": 64, "streams": 64}, "streams 64 is more than the 50 training examples"),
        ({"normalization": "cifar"}, "there are no statistics 'cifar'"),
    ],
)
def test_values_that_do_not_fit_are_refused(served, fields, message):
    with pytest.raises(ConfigError, match=message):
        served(configured(**fields))


def test_own_statistics_that_are_not_known_are_measured_on_images_all_over(split, monkeypatch):
    monkeypatch.setattr(normalization, "MEASURED", 20)
    monkeypatch.setattr(streamed, "_BLOCKS", 3)
    given = {"train": split(range(TRAIN)), "test": split(range(2)), "class_names": "abcde"}
    made = streamed.from_records(configured(validation_size=5), name="mine", **given)
    # Records 0, 15 and 30 on, of the 45 that are trained on.
    measured = [*range(6), *range(15, 22), *range(30, 37)]
    seen = streamed.from_records(
        configured(normalization="imagenet"), name="mine", **{**given, "test": split(measured)}
    )
    pixels = np.concatenate([b["image"][b["mask"]] for b in seen.test.examples(0, 1)]) / 255
    mean, std = made.spec.statistics
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), atol=6e-5)
    np.testing.assert_allclose(std, pixels.std((0, 1, 2)), atol=6e-5)
    assert made.record.statistics == made.spec.statistics
    assert seen.record.statistics is None

    known = Record(statistics=((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))  # then nothing is measured
    again = streamed.from_records(configured(), name="mine", known=known, **given)
    assert again.spec.statistics == again.record.statistics == known.statistics


def test_images_of_another_height_than_width_and_of_one_channel(split):
    c = configured(image_size=(12, 20), normalization="digits", crop_padding=1, channels=1)
    given = {"train": split(range(16)), "test": split(range(3)), "class_names": "abcde"}
    d = streamed.from_records(c, name="grey", **given)
    assert d.spec.inputs["image"].shape == (12, 20, 1)
    batch = next(d.train.batches(0))
    assert (batch["image"].shape, batch["image"].dtype) == ((16, 12, 20, 1), np.float32)
    rows = next(d.test.examples(0, 1))
    assert (rows["image"].shape, int(rows["mask"].sum())) == ((16, 12, 20, 1), 3)
    from dfs_jax.early_exit.preprocessing import Preprocessing

    fitting = Preprocessing((12, 20, 1), (0.0,), (1.0,), short_side=(14, 23), antialias=False)
    for i, image in enumerate(rows["image"][:3]):
        colours = pictures.decode(stored.encoded(stored.photo(i)), 1)
        assert np.abs(image.astype(int) - fitting.fit(colours)).max() <= 3
    c.data.normalization = "imagenet"
    with pytest.raises(ConfigError, match="'imagenet' is for 3 channels, but the images have 1"):
        streamed.from_records(c, name="grey", **given)


@pytest.mark.slow
def test_two_processes_share_the_batches_of_one(tmp_path):
    root = stored.image_folder(tmp_path / "tree", {"train": {"a": 30, "b": 20}, "test": {"a": 19}})
    program = textwrap.dedent("""
        import sys
        import jax, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from dfs_jax import config, data
        rank, port, out, root = int(sys.argv[1]), *sys.argv[2:]
        if rank < 2:
            jax.distributed.initialize(f"localhost:{port}", 2, rank)
        c = config.default()
        c.data.update(name="folder", dir=root, image_size=16, streams=8, validation_size=0,
                      flip=True, normalization="imagenet")
        c.train.batch_size = c.train.eval_batch_size = 16
        d = data.create(c)
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        with jax.transfer_guard("disallow"):
            batches = {"train": next(d.train.batches(5, sharding))}
            for i, batch in enumerate(d.test.batches(sharding)):
                batches[f"test{i}"] = batch
        np.savez(f"{out}/{rank}.npz", **{
            f"{name}/{field}/{shard.index[0].start or 0}": np.asarray(shard.data)
            for name, batch in batches.items() for field, leaf in batch.items()
            for shard in leaf.addressable_shards})
    """)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    chosen = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    flags = {"XLA_FLAGS": chosen, "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), port, str(tmp_path), str(root)],
            env={**os.environ, **flags},
        )
        for rank in range(3)  # the last one is alone
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0, 0]
    first, second, alone = (dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(3))
    assert not first.keys() & second.keys()
    shared = first | second

    def joined(parts, name):
        own = {int(k.rsplit("/", 1)[1]): v for k, v in parts.items() if k.startswith(name + "/")}
        return np.concatenate([own[start] for start in sorted(own)])

    for field in ("image", "label"):
        both, one = (joined(parts, f"train/{field}") for parts in (shared, alone))
        np.testing.assert_allclose(both, one, atol=1e-6)
    masks = [joined(shared, f"test{i}/mask") for i in range(2)]
    assert sum(int(mask.sum()) for mask in masks) == 19


@pytest.mark.slow
def test_memory_stays_flat_over_epochs(tmp_path):
    payloads = []
    for i in range(800):
        noise = np.random.default_rng(i).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        payloads.append(stored.example(stored.encoded(noise), 0))
    paths = tuple(
        stored.tfrecord(tmp_path / str(i), payloads[100 * i : 100 * i + 100]) for i in range(8)
    )
    c = configured(image_size=128, streams=8, shuffle_buffer=4)
    c.train.batch_size = 32
    source = TFRecords(Files(paths, (100,) * 8), shuffle_buffer=4)
    d = streamed.from_records(
        c, name="noise", train=source, test=source, class_names="a", statistics="imagenet"
    )
    batches, used = d.train.batches(0), []
    for _ in range(12):
        for _ in range(25):
            next(batches)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        used.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    # The allocator's level wanders by tens of MB for a hundred batches; 200 that are kept, as the
    # bytes that were decoded, would be 300.
    assert min(used[8:]) - min(used[:4]) < 100, used
