"""The real ImageNet builder on archives made here: prepare, read by both backends, train."""

import itertools
import json
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import stored

from dfs_jax import config, data, main
from dfs_jax.data import prepare
from dfs_jax.data.input import order
from dfs_jax.data.input.order import Streams
from dfs_jax.data.pipeline import DataError
from dfs_jax.data.sets import imagenet

HELD = 12
BACKENDS = {"tf": "tfrecord", "grain": "array_record"}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    directory = tmp_path_factory.mktemp("archives")
    stored.imagenet_archives(directory)
    return directory


@pytest.fixture(scope="module")
def prepared(archives, tmp_path_factory):
    """A directory of prepared data for each backend."""
    directories = {}
    for backend, file_format in BACKENDS.items():
        directories[backend] = tmp_path_factory.mktemp(file_format)
        flags = [f"--data_dir={directories[backend]}", f"--manual_dir={archives}"]
        flags += [f"--file_format={file_format}", "--partial"]
        assert prepare.main(["imagenet2012", *flags]) == 0
    return directories


@pytest.fixture(params=BACKENDS)
def conf(request, prepared):
    c = config.default()
    c.data.update(name="imagenet2012", backend=request.param, dir=str(prepared[request.param]))
    c.data.update(image_size=16, streams=8, shuffle_buffer=4, validation_size=HELD)
    c.train.batch_size = c.train.eval_batch_size = 16
    return c


def test_splits_and_labels(conf):
    d = data.create(conf)
    spec = d.spec
    assert (spec.train_size, spec.validation_size) == (stored.TRAIN - HELD, HELD)
    assert (spec.test_size, spec.num_classes) == (stored.VALIDATION, 1000)
    assert spec.class_names[0] == "n01440764"
    conf.data.validation_size = 0
    rows, source = np.arange(16), data.create(conf).train
    seen = np.concatenate([b["label"] for b in itertools.islice(source.examples(0, rows), 15)])
    # Four epochs of 15 images of every class, as far as streams of 7 and 8 keep in step.
    assert np.abs(np.bincount(seen) - 4 * stored.PER_CLASS).max() <= 8
    assert len(np.bincount(seen)) == stored.CLASSES


def test_what_a_run_notes_does_not_depend_on_the_format(prepared):
    noted = []
    for backend, directory in prepared.items():
        c = config.default()
        c.data.update(name="imagenet2012", backend=backend, dir=str(directory))
        c.data.update(image_size=16, streams=8, validation_size=HELD)
        c.train.batch_size = c.train.eval_batch_size = 16
        noted.append(data.create(c).record)
    assert noted[0] == noted[1]
    assert {name: split.size for name, split in noted[0].splits.items()} == {
        "train": stored.TRAIN - HELD,
        "validation": HELD,
        "test": stored.VALIDATION,
    }


def test_the_same_batches_on_hosts_and_after_a_resume_in_mid_epoch(conf):
    source = data.create(conf).train
    whole = list(itertools.islice(source.examples(0, np.arange(16)), 9))
    parts = [
        list(itertools.islice(source.examples(7, order.host_rows(16, h, 2)), 2)) for h in range(2)
    ]
    for step in range(2):
        for key in ("image", "label"):
            joined = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(joined, whole[7 + step][key])


def test_exact_counts_on_hosts(conf):
    d = data.create(conf)
    for source, size in ((d.validation, HELD), (d.test, stored.VALIDATION)):
        whole = None
        for hosts in (1, 2):
            parts = [list(source.examples(h, hosts)) for h in range(hosts)]
            seen = [
                (image.tobytes(), int(label))
                for batch in itertools.chain(*parts)
                for image, label, mask in zip(*batch.values(), strict=True)
                if mask
            ]
            whole = whole or seen
            assert seen == whole
            assert len(set(seen)) == size


def test_every_record_once_per_epoch(conf):
    records = data.create(conf).train._rows.records
    plan = Streams(count=3, size=stored.TRAIN - HELD, batch_size=6, seed=1)
    read = itertools.islice(records.shuffled(plan, 0, np.arange(6)).as_numpy_iterator(), 2 * 48)
    numbers = np.array([int(i) for raw, i in read if raw]).reshape(-1, 3, 2)
    for v in range(3):
        one, two = np.split(numbers[:, v].ravel(), 2)
        assert sorted(one) == sorted(two) == list(range(*plan.bounds(v)))
        assert list(one) != list(two)


def test_both_backends_store_the_same_images(prepared, conf):
    conf.data.validation_size = 0
    tests = []
    for backend in BACKENDS:
        conf.data.update(backend=backend, dir=str(prepared[backend]))
        (batch, *_) = data.create(conf).test.examples(0, 1)
        tests.append(batch["image"])
    np.testing.assert_array_equal(*tests)


def test_damaged_files_are_named(conf, prepared, tmp_path):
    import shutil

    shutil.copytree(prepared[conf.data.backend], tmp_path / "copy")
    conf.data.dir = str(tmp_path / "copy")
    (path,) = (tmp_path / "copy").glob("imagenet2012/*/imagenet2012-validation*")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"record \d+ of {path} cannot be read"):
        list(data.create(conf).test.batches())
    path.unlink()
    with pytest.raises(DataError, match=rf"{path} is missing"):
        data.create(conf)


def test_training_goes_through_the_command_and_counts_every_test_image(prepared, tmp_path):
    flags = {
        "data.dir": prepared["tf"],
        "data.image_size": 16,
        "data.validation_size": HELD,
        "data.streams": 8,
        "model.name": "vgg7_cifar100",
        "model.options.widths": "((4,), (4,))",
        "train.epochs": 0.0,
        "train.steps": 2,
        "train.batch_size": 16,
        "train.eval_batch_size": 16,
        "train.compilation_cache": "",
    }
    arguments = [f"--config.{field}={value}" for field, value in flags.items()]
    command = ["--config", "configs/imagenet.py", "--workdir", str(tmp_path), *arguments]
    assert main.main(command) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    merged = {key: value for line in lines for key, value in line.items()}
    assert np.isfinite(merged["train/loss"])
    for split, size in (("eval", HELD), ("test", stored.VALIDATION)):
        correct = merged[f"{split}/exit1/top1"] * size
        assert abs(correct - round(correct)) < 1e-5


def test_where_nothing_is_prepared_the_message_says_what_to_do(tmp_path):
    c = config.default()
    c.data.update(name="imagenet2012", dir=str(tmp_path), image_size=224)
    began = time.perf_counter()
    with pytest.raises(DataError) as raised:
        data.create(c)
    assert time.perf_counter() - began < 5
    message = str(raised.value)
    for part in (
        "ILSVRC2012_img_train.tar (147,897,477,120 bytes, SHA-256 b08200a27a8e34218a0e58fde36b0fe8",
        "ILSVRC2012_img_val.tar (6,744,924,160 bytes, SHA-256 c7e06a6c0baccf06d8dbeb6577d71eff",
        f"put them in {tmp_path}/downloads/manual",
        f"python -m dfs_jax.data.prepare imagenet2012 --data_dir={tmp_path}",
    ):
        assert part in message
    assert "\n" not in message


def test_saying_so_needs_no_tensorflow(tmp_path):
    program = (
        "import sys\nfrom dfs_jax import config, data\nc = config.default()\n"
        f"c.data.update(name='imagenet2012', dir={str(tmp_path)!r}, image_size=224)\n"
        "try:\n    data.create(c)\nexcept data.pipeline.DataError:\n"
        "    print('tensorflow' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.strip() == "False", found.stderr


def test_the_checksums_are_those_of_tfds():
    import tensorflow_datasets as tfds

    registered = {
        url.rsplit("/", 1)[1]: (int(info.size), info.checksum)
        for url, info in tfds.builder("imagenet2012", try_gcs=False).url_infos.items()
    }
    assert registered == imagenet.ARCHIVES


def test_archives_are_verified_byte_for_byte(archives, tmp_path, monkeypatch, capsys):
    import hashlib

    with pytest.raises(DataError, match=r"img_train.tar has [\d,]+ bytes instead of 147,897,477,1"):
        imagenet.verify(str(archives), partial=False)
    published = {}
    for name in imagenet.ARCHIVES:
        content = (archives / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        published[name] = (len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(imagenet, "ARCHIVES", published)
    imagenet.verify(str(tmp_path), partial=False)
    assert "verifying" in capsys.readouterr().out
    with open(tmp_path / "ILSVRC2012_img_val.tar", "r+b") as file:
        file.seek(700)
        file.write(b"?")
    with pytest.raises(DataError, match=r"img_val.tar has another SHA-256 than"):
        imagenet.verify(str(tmp_path), partial=False)
    (tmp_path / "ILSVRC2012_img_val.tar").unlink()
    flags = [f"--data_dir={tmp_path}", f"--manual_dir={tmp_path}"]
    assert prepare.main(["imagenet2012", *flags]) == 2
    assert "img_val.tar is missing; download it (" in capsys.readouterr().err


def test_parts_of_the_archives_must_be_whole_and_without_gaps(tmp_path):
    stored.imagenet_archives(tmp_path, validation_numbers=[1, 2, 4])
    with pytest.raises(DataError, match=r"val_00000004.JPEG where image 3 .* wrong labels"):
        imagenet.verify(str(tmp_path), partial=True)
    train = tmp_path / "ILSVRC2012_img_train.tar"
    whole = train.read_bytes()
    with tarfile.open(train) as archive:
        last = archive.getmembers()[-1]
    for end in (last.offset, last.offset + 100, last.offset_data + last.size // 2, 0):
        train.write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"img_train.tar is (damaged|not complete)"):
            imagenet.verify(str(tmp_path), partial=True)


def test_a_prepared_copy_is_not_prepared_again(prepared, capsys):
    assert prepare.main(["imagenet2012", f"--data_dir={prepared['tf']}"]) == 0
    assert "is prepared in" in capsys.readouterr().out
    flags = [f"--data_dir={prepared['tf']}", "--file_format=array_record"]
    assert prepare.main(["imagenet2012", *flags]) == 2
    assert "give another --data_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "recipe"),
    [
        ("msdnet", ("msdnet_imagenet", 90, 256, "sgd", 0.1, (70, 80, 85), 0.0, 0.0)),
        ("vgg16", ("vgg16_imagenet", 90, 256, "sgd", 0.1, (70, 80, 85), 1e-4, 0.0)),
        ("vit_tiny", ("vit_tiny_patch16", 60, 1024, "adamw", 5e-5, None, 0.0, 1.0)),
    ],
)
@pytest.mark.parametrize(
    ("method", "surgery"),
    [("", (True, "own")), (",dfs_all", (True, "all")), (",joint", (False, None))],
)
def test_presets_are_the_published_recipes(preset, recipe, method, surgery):
    c = config.load(f"configs/imagenet.py:{preset}{method}")
    o = c.optimizer
    name, epochs, batch_size, optimizer, rate, milestones, decay, clip = recipe
    assert (c.model.name, c.train.epochs, c.train.batch_size) == (name, epochs, batch_size)
    assert (o.name, o.learning_rate, o.weight_decay, o.clip_norm) == (optimizer, rate, decay, clip)
    if milestones:
        assert (o.schedule, tuple(o.milestones), o.decay_rate) == ("multistep", milestones, 0.1)
    else:
        assert o.schedule == "constant"
    assert c.surgery.partition == surgery[0]
    assert surgery[1] in (None, c.surgery.exit_gradient)
    assert (c.data.image_size, c.data.validation_size, c.data.flip) == (224, 50_000, True)
    assert c.train.batch_size % c.data.streams == 0
