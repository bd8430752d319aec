"""CIFAR from made archives of the published format, through the real TFDS builder."""

import hashlib
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums

from dfs_jax import config, data, main
from dfs_jax.config import ConfigError
from dfs_jax.data import pipeline, prepare
from dfs_jax.data.augment import normalization

SIZES = {"train": 90, "test": 30}
CONFIGS = Path(__file__).parents[3] / "configs"


def made_images(split):
    """Images (N, 32, 32, 3) and fine labels (N,): every image has a first pixel of its own."""
    size = SIZES[split]
    rng = np.random.default_rng(size)
    images = rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(size) + (0 if split == "train" else 128)
    return images, (np.arange(size) * 7 % 100).astype(np.uint8)


def write_archive(path):
    """A CIFAR-100 archive: records of a coarse label, a fine label and an image in planes."""
    names = {
        "coarse_label_names.txt": "\n".join(f"coarse {i}" for i in range(20)) + "\n",
        "fine_label_names.txt": "\n".join(f"fine {i}" for i in range(100)) + "\n",
    }
    members = {name: text.encode() for name, text in names.items()}
    for split in SIZES:
        images, fine = made_images(split)
        planes = images.transpose(0, 3, 1, 2).reshape(len(fine), -1)
        records = np.concatenate([(fine // 5)[:, None], fine[:, None], planes], axis=1)
        members[f"{split}.bin"] = records.astype(np.uint8).tobytes()
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(f"cifar-100-binary/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A made archive, which TFDS takes for the published one while this module runs."""
    path = tmp_path_factory.mktemp("archive") / "cifar-100-binary.tar.gz"
    write_archive(path)
    known = tfds.builder_cls("cifar100").url_infos
    (url,) = known
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(known, url, checksums.compute_url_info(path))
        yield path


@pytest.fixture(scope="module")
def prepared_dir(archive, tmp_path_factory):
    """A directory in which the archive was placed by hand and CIFAR-100 prepared from it."""
    path = tmp_path_factory.mktemp("tfds")
    manual = path / "downloads" / "manual"
    manual.mkdir(parents=True)
    shutil.copy(archive, manual)
    c = config.default()
    c.data.update(name="cifar100", dir=str(path), validation_size=20)
    data.create(c)
    return path


@pytest.fixture
def conf(conf, prepared_dir):
    conf.data.update(name="cifar100", dir=str(prepared_dir), validation_size=20)
    conf.train.update(batch_size=10, eval_batch_size=16)
    return conf


def examples(batches):
    """Grey levels and labels of all examples of `batches`, in order."""
    mean, std = (np.array(values) for values in normalization.STATISTICS["cifar100"])
    images, labels = [], []
    for batch in batches:
        mask = np.asarray(batch.get("mask", np.ones(len(batch["label"]), bool)))
        images.append(np.round((np.asarray(batch["image"])[mask] * std + mean) * 255))
        labels.append(np.asarray(batch["label"])[mask])
    return np.concatenate(images).astype(np.uint8), np.concatenate(labels)


def by_first_pixel(images, labels):
    return {
        int(image[0, 0, 0]): (image.tobytes(), int(label))
        for image, label in zip(images, labels, strict=True)
    }


def test_every_example_is_in_one_split_as_it_was_made(conf):
    conf.train.batch_size = 70
    found = data.create(conf)
    spec = found.spec
    assert (spec.train_size, spec.validation_size, spec.test_size) == (70, 20, 30)
    assert (spec.name, spec.inputs["image"].shape, spec.num_classes) == (
        "cifar100",
        (32, 32, 3),
        100,
    )
    assert spec.class_names[7] == "fine 7"
    train = by_first_pixel(*examples([next(found.train.batches(0))]))
    validation = by_first_pixel(*examples(found.validation.batches()))
    test = by_first_pixel(*examples(found.test.batches()))
    assert (len(train), len(validation), len(test)) == (70, 20, 30)
    assert not train.keys() & validation.keys()
    assert train | validation == by_first_pixel(*made_images("train"))
    assert test == by_first_pixel(*made_images("test"))


def test_validation_is_not_augmented_and_does_not_depend_on_the_augmentation(conf):
    plain = examples(data.create(conf).validation.batches())
    conf.data.update(crop_padding=4, flip=True, cutout=16, mixup=1.0)
    found = data.create(conf)
    for these, those in zip(examples(found.validation.batches()), plain, strict=True):
        np.testing.assert_array_equal(these, those)
    assert next(found.train.batches(0))["label"].shape == (10, 100)


def test_normalisation_is_its_own_or_that_of_cifar10(conf):
    own = next(data.create(conf).test.batches())
    conf.data.normalization = "cifar10"
    other = next(data.create(conf).test.batches())
    grey = examples([own])[0].astype(np.float64) / 255
    for batch, name in ((own, "cifar100"), (other, "cifar10")):
        mean, std = (np.array(values) for values in normalization.STATISTICS[name])
        shown = np.asarray(batch["image"])[np.asarray(batch["mask"])]
        np.testing.assert_allclose(shown, (grey - mean) / std, atol=1e-5)


def test_an_archive_that_is_not_the_published_one(conf, archive, tmp_path):
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    conf.data.dir = str(tmp_path)
    copy = manual / archive.name
    content = archive.read_bytes()
    damages = {
        content[:-1]: f"it has {len(content) - 1:,} bytes instead of {len(content):,}",
        content[:-1] + bytes([content[-1] ^ 1]): "its SHA-256 is another one",
    }
    for damaged, reason in damages.items():
        copy.write_bytes(damaged)
        with pytest.raises(pipeline.DataError) as caught:
            data.create(conf)
        assert str(caught.value).startswith(f"{copy} is not the published archive ({reason})")
        assert hashlib.sha256(content).hexdigest() in str(caught.value)
        assert list(tmp_path.iterdir()) == [tmp_path / "downloads"]
    copy.write_bytes(content)
    assert data.create(conf).train.size == 70


def test_the_command_that_prepares_takes_the_archive_from_any_place(
    archive, tmp_path, network, capsys
):
    network.raises = OSError("unreachable")
    command = ["cifar100", "--data_dir", str(tmp_path), "--manual_dir"]
    assert prepare.main([*command, str(tmp_path)]) == 2
    assert "no connection to www.cs.toronto.edu" in capsys.readouterr().err
    assert prepare.main([*command, str(archive.parent)]) == 0
    assert "cifar100/3.0.2 is prepared in" in capsys.readouterr().out
    assert (tmp_path / "cifar100" / "3.0.2").is_dir()


def test_what_was_downloaded_before_needs_no_network(
    conf, archive, prepared_dir, tmp_path, network
):
    """TFDS keeps downloads under names of its own."""
    builder = tfds.builder_cls("cifar100")(data_dir=tmp_path)
    ((url, info),) = builder.url_infos.items()
    from tensorflow_datasets.core.download import resource

    folder = tmp_path / "downloads" / "cifar100"
    folder.mkdir(parents=True)
    kept = folder / resource.get_dl_fname(url, info.checksum)
    shutil.copy(archive, kept)
    resource.write_info_file(
        url=url, path=kept, dataset_name="cifar100", original_fname=archive.name, url_info=info
    )
    conf.data.dir = str(tmp_path)
    network.raises = OSError("unreachable")
    assert data.create(conf).train.size == 70


@pytest.fixture
def network(monkeypatch):
    """A network whose name look-ups do what the test says, by `raises` and `hangs`."""

    class Network:
        raises, hangs = None, 0.0

        def look_up(self, *arguments, **options):
            time.sleep(self.hangs)
            raise self.raises

    network = Network()
    monkeypatch.setattr(socket, "getaddrinfo", network.look_up)
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    return network


@pytest.mark.parametrize("hangs", [0.0, 60.0])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_without_a_network_the_message_says_what_to_do(conf, tmp_path, network, name, hangs):
    network.raises, network.hangs = socket.gaierror("no such name"), hangs
    conf.data.update(name=name, dir=str(tmp_path / "tfds"))
    ((url, info),) = tfds.builder_cls(name).url_infos.items()
    started = time.perf_counter()
    with pytest.raises(pipeline.DataError) as caught:
        data.create(conf)
    assert time.perf_counter() - started < 5
    message = str(caught.value)
    facts = {
        f"{name}-binary.tar.gz".replace("cifar", "cifar-"),
        f"{int(info.size):,} bytes",
        info.checksum,
        url,
        str(tmp_path / "tfds" / "downloads" / "manual"),
        f"python -m dfs_jax.data.prepare {name} --data_dir={tmp_path / 'tfds'}",
    }
    assert {fact for fact in facts if fact not in message} == set()
    assert not (tmp_path / "tfds").exists()


def test_the_command_says_so_at_once_and_changes_nothing(tmp_path):
    program = (
        "import socket, sys\n"
        "def none(*a, **k): raise socket.gaierror('no such name')\n"
        "socket.getaddrinfo = none\n"
        "from dfs_jax import main\n"
        "status = main.main(sys.argv[1:])\n"
        "print('tensorflow' in sys.modules)\n"
        "sys.exit(status)\n"
    )
    command = ["--config", f"{CONFIGS}/cifar10.py", "--workdir", str(tmp_path / "run")]
    found = subprocess.run(
        [sys.executable, "-c", program, *command, f"--config.data.dir={tmp_path / 'tfds'}"],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and "proxy" not in k.lower()},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2
    assert found.stderr.strip().startswith("error: no connection to www.cs.toronto.edu (")
    assert len(found.stderr.strip().splitlines()) == 1
    assert found.stdout.strip() == "False"  # TensorFlow alone takes four seconds to load
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def own_dir(conf, prepared_dir, tmp_path):
    """A copy of the prepared data that a test may damage."""
    shutil.copytree(prepared_dir, tmp_path / "tfds")
    conf.data.dir = str(tmp_path / "tfds")
    return tmp_path / "tfds" / "cifar100" / "3.0.2"


def test_a_truncated_file_is_named(conf, own_dir):
    (record,) = own_dir.glob("*-train.tfrecord*")
    record.write_bytes(record.read_bytes()[:-20])
    with pytest.raises(pipeline.DataError, match="truncated record") as caught:
        data.create(conf)
    assert f"{record} is damaged" in str(caught.value)
    assert f"the prepared data in {own_dir} cannot be read" in str(caught.value)


def test_a_label_out_of_range_is_named(conf, own_dir):
    import tensorflow as tf

    (record,) = own_dir.glob("*-test.tfrecord*")
    examples = [
        tf.train.Example.FromString(r.numpy()) for r in tf.data.TFRecordDataset(str(record))
    ]
    examples[11].features.feature["label"].int64_list.value[0] = 100
    with tf.io.TFRecordWriter(str(record)) as writer:
        for example in examples:
            writer.write(example.SerializeToString())
    with pytest.raises(pipeline.DataError) as caught:
        data.create(conf)
    assert f"record 11 of {record} has label 100, but there are 100 classes" in str(caught.value)


PRESETS = {
    "": ("msdnet_cifar100", True, "own", (250, 280, 295), 5e-4, "", 0, 0.0, 0.0, False),
    "resnet18": (
        *("resnet18_cifar100", True, "own", (250, 280, 295), 5e-4),
        *("cifar10", 16, 0.3, 0.03, True),
    ),
    "joint,resnet18": (
        *("resnet18_cifar100", False, "own", (250, 280, 295), 5e-4),
        *("cifar10", 16, 0.0, 0.0, False),
    ),
    "vgg7,dfs_all": (
        *("vgg7_cifar100", True, "all", (270, 280, 295), 1e-4),
        *("cifar10", 16, 0.0, 0.0, False),
    ),
}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_published_recipes(name, preset):
    c = config.load(f"{CONFIGS}/{name}.py:{preset}")
    assert (
        c.model.name,
        c.surgery.partition,
        c.surgery.exit_gradient,
        c.optimizer.milestones,
        c.optimizer.weight_decay,
        c.data.autoaugment,
        c.data.cutout,
        c.objective.logit_weight,
        c.objective.feature_weight,
        c.model.options.adapters,
    ) == PRESETS[preset]
    assert (c.data.name, c.data.validation_size) == (name, 5000)
    assert (c.data.crop_padding, c.data.crop_fill, c.data.flip) == (4, 128, True)
    assert (c.optimizer.learning_rate, c.optimizer.momentum) == (0.1, 0.9)
    assert (c.train.epochs, c.train.batch_size, c.objective.temperature) == (300, 500, 3)


def test_an_unknown_preset_lists_the_known(tmp_path):
    with pytest.raises(ConfigError, match="networks: msdnet, resnet18, vgg7; methods: dfs, "):
        config.load(f"{CONFIGS}/cifar10.py:resnet")


def test_training_through_the_command(conf, tmp_path, capsys):
    status = main.main(
        [
            *("--config", f"{CONFIGS}/cifar100.py:vgg7,joint", "--workdir", str(tmp_path / "run")),
            f"--config.data.dir={conf.data.dir}",
            "--config.data.validation_size=20",
            "--config.data.mixup=0.2",
            "--config.data.cutmix=1.0",
            "--config.model.options.widths=((4, 4),)",
            "--config.train.batch_size=16",
            "--config.train.eval_batch_size=16",
            "--config.train.epochs=0",
            "--config.train.steps=3",
            "--config.train.log_every=1",
        ]
    )
    shown = capsys.readouterr()
    assert status == 0, shown.err
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("train/loss") == 3
    assert jax.device_count() == 8  # the batch was divided over all of them
