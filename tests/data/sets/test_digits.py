import collections
import itertools
import shutil
import subprocess
import sys

import numpy as np
import pytest
from sklearn import datasets

from dfs_jax import data
from dfs_jax.config import ConfigError
from dfs_jax.data import pipeline
from dfs_jax.data.augment import normalization
from dfs_jax.data.sets import digits


@pytest.fixture
def conf(conf, digits_dir):
    conf.data.dir = str(digits_dir)
    conf.train.eval_batch_size = 64
    return conf


@pytest.fixture
def own_dir(conf, digits_dir, tmp_path):
    """A copy of the prepared digits that a test may damage."""
    shutil.copytree(digits_dir, tmp_path / "tfds")
    conf.data.dir = str(tmp_path / "tfds")
    return tmp_path / "tfds" / "digits" / "1.0.0"


def examples(source):
    """(image bytes, label) of every example of an evaluation split, as grey levels 0-16."""
    (mean,), (std,) = normalization.STATISTICS["digits"]
    found = []
    for batch in source.batches():
        mask = np.asarray(batch["mask"])
        images = (np.asarray(batch["image"], np.float64)[mask] * std + mean) * 16
        found += [
            (np.round(image[..., 0]).astype(np.uint8).tobytes(), int(label))
            for image, label in zip(images, np.asarray(batch["label"])[mask], strict=True)
        ]
    return found


def training_examples(conf):
    """The same of the training split, one epoch."""
    conf.train.batch_size = data.create(conf).train.size
    batch = next(data.create(conf).train.batches(0))
    whole = {**batch, "mask": np.ones(len(batch["label"]), bool)}
    source = type("Once", (), {"batches": staticmethod(lambda: [whole])})
    return examples(source)


def test_the_splits_share_out_all_digits(conf):
    found = data.create(conf)
    spec = found.spec
    assert (spec.train_size, spec.validation_size, spec.test_size) == (1197, 240, 360)
    assert (spec.name, spec.inputs["image"].shape, spec.num_classes) == ("digits", (8, 8, 1), 10)
    assert spec.class_names == tuple("0123456789")
    parts = [training_examples(conf), examples(found.validation), examples(found.test)]
    assert [len(part) for part in parts] == [1197, 240, 360]
    source = datasets.load_digits()
    every = zip(source.images.astype(np.uint8), source.target, strict=True)
    assert collections.Counter(itertools.chain(*parts)) == collections.Counter(
        (image.tobytes(), int(label)) for image, label in every
    )


def test_the_splits_stay_as_they_are(conf):
    """A change of these needs a new version of the builder, or results stop being comparable."""
    found = data.create(conf)
    assert [label for _, label in examples(found.validation)[:12]] == [
        8,
        1,
        5,
        0,
        0,
        8,
        7,
        1,
        7,
        9,
        4,
        8,
    ]
    assert [label for _, label in examples(found.test)[:12]] == [9, 1, 0, 1, 0, 8, 4, 3, 6, 2, 4, 4]


def test_statistics_are_those_of_the_training_split(conf):
    conf.train.batch_size = 1197
    images = np.asarray(next(data.create(conf).train.batches(0))["image"], np.float64)
    assert abs(images.mean()) < 1e-5
    assert abs(images.std() - 1) < 1e-5


def test_validation_sizes(conf):
    stored = examples(data.create(conf).validation)
    conf.data.validation_size = 0
    everything = data.create(conf)
    assert everything.validation is None
    assert everything.train.size == 1437
    conf.data.validation_size = 100
    assert examples(data.create(conf).validation) == stored[-100:]
    conf.data.validation_size = 300
    larger = data.create(conf)
    assert examples(larger.validation)[-240:] == stored
    assert larger.train.size == larger.spec.train_size == 1137
    for size in (-1, 1437):
        conf.data.validation_size = size
        with pytest.raises(ConfigError, match=rf"data\.validation_size {size} .* to 1436"):
            data.create(conf)


def truncate(path):
    (record,) = path.glob("*train*")
    record.write_bytes(record.read_bytes()[:-20])


def flip_bytes(path):
    (record,) = path.glob("*train*")
    content = bytearray(record.read_bytes())
    content[5000:5016] = bytes(255 - b for b in content[5000:5016])
    record.write_bytes(content)


def drop_last_record(path):
    (record,) = path.glob("*test*")
    content, start = record.read_bytes(), 0
    while start < len(content):  # length, its checksum, the record, its checksum
        last, start = start, start + 16 + int.from_bytes(content[start : start + 8], "little")
    record.write_bytes(content[:last])


def empty(path):
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_bytes,
        drop_last_record,
        empty,
        lambda path: next(path.glob("*validation*")).unlink(),
        lambda path: (path / "dataset_info.json").write_text("{"),
        lambda path: (path / "dataset_info.json").unlink(),
    ],
)
def test_damaged_data_is_named(conf, own_dir, damage):
    damage(own_dir)
    with pytest.raises(pipeline.DataError, match="delete that directory and run again") as caught:
        data.create(conf)
    named = str(caught.value).split(" in ", 1)[1].split(" cannot be read")[0]
    assert named in (str(own_dir), str(own_dir.parent))
    shutil.rmtree(named)
    assert data.create(conf).train.size == 1197


def test_an_interrupted_preparation_is_done_again(conf, tmp_path, monkeypatch):
    conf.data.dir = str(tmp_path)
    generate = digits.Digits._generate_examples

    def interrupted(self, chosen):
        yield from list(generate(self, chosen))[:50]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(digits.Digits, "_generate_examples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.create(conf)
    killed = tmp_path / "digits" / "incomplete.ABCDEF_1.0.0"  # what kill -9 leaves
    killed.mkdir(parents=True, exist_ok=True)
    (killed / "digits-train.tfrecord-00000-of-00001").write_bytes(b"half")
    assert data.create(conf).train.size == 1197


def test_a_full_disk_is_named_and_nothing_stays(conf, tmp_path, monkeypatch):
    conf.data.dir = str(tmp_path)

    def full(self, chosen):
        raise RuntimeError("ResourceExhaustedError: digits-train: No space left on device")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(digits.Digits, "_generate_examples", full)
        with pytest.raises(pipeline.DataError, match=f"in {tmp_path}/digits/1.0.0: no space left"):
            data.create(conf)
    assert not list((tmp_path / "digits").iterdir())
    assert data.create(conf).train.size == 1197


def test_preparation_by_two_at_once(conf, tmp_path, monkeypatch):
    conf.data.dir = str(tmp_path)
    generate = digits.Digits._generate_examples
    others = []

    def overtaken(self, chosen):
        if not others:
            others.append(digits.Digits(data_dir=str(tmp_path)))
            others[0].download_and_prepare()
        return generate(self, chosen)

    monkeypatch.setattr(digits.Digits, "_generate_examples", overtaken)
    assert len(examples(data.create(conf).test)) == 360
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_other_failures_of_preparing_are_not_called_damage(conf, tmp_path):
    (tmp_path / "file").write_text("")
    conf.data.dir = str(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        data.create(conf)


def test_unknown_data_sets(conf):
    conf.data.name = "digit"
    with pytest.raises(ConfigError, match=r"config\.data\.name: .* 'digit'; known: .*digits"):
        data.create(conf)
    assert "digits" in data.names()


def test_tensorflow_is_loaded_for_those_who_use_it():
    program = (
        "import sys, dfs_jax.data, dfs_jax.data.input.in_memory, dfs_jax.data.sets.builders\n"
        "print({'tensorflow', 'tensorflow_datasets', 'sklearn'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.strip() == "set()", found.stderr
