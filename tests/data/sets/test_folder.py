"""Own images: folders of files, and TFDS sets by name."""

import itertools

import numpy as np
import pytest
import stored
import tensorflow_datasets as tfds

from dfs_jax import config, data
from dfs_jax.config import ConfigError
from dfs_jax.data.input import order
from dfs_jax.data.pipeline import DataError

SIZES = {"train": {"cat": 12, "ant": 9, "bee": 11}, "test": {"ant": 3, "cat": 5}, "val": {"bee": 4}}


def configured(root, **fields):
    c = config.default()
    c.data.update(name="folder", dir=str(root), image_size=16, streams=4, validation_size=0)
    c.data.update(normalization="imagenet", **fields)
    c.train.batch_size = c.train.eval_batch_size = 8
    return c


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = stored.image_folder(tmp_path_factory.mktemp("own") / "insects", SIZES)
    (root / "train" / "ant" / "notes.txt").write_text("not an image")
    (root / "train" / "ant" / ".hidden.jpg").write_text("not an image")
    (root / "train" / ".cache").mkdir()
    png = stored.encoded(stored.photo(99), "PNG")
    (root / "train" / "bee" / "one.PNG").write_bytes(png)
    return root


def labels(source, hosts=1):
    parts = [batch for h in range(hosts) for batch in source.examples(h, hosts)]
    return np.concatenate([batch["label"][batch["mask"]] for batch in parts])


def test_splits_classes_and_counts(tree):
    d = data.create(configured(tree))
    assert d.spec.name == "insects"
    assert d.spec.class_names == ("ant", "bee", "cat")
    assert (d.spec.train_size, d.spec.validation_size, d.spec.test_size) == (33, 0, 8)
    assert d.validation is None
    assert sorted(labels(d.test)) == [0] * 3 + [2] * 5
    (batch,) = itertools.islice(d.train.batches(0), 1)
    assert batch["image"].shape == (8, 16, 16, 3)


def test_an_epoch_has_every_image_once_with_its_label(tree):
    d = data.create(configured(tree, streams=1))
    rows = np.arange(8)
    seen = np.concatenate([b["label"] for b in itertools.islice(d.train.examples(0, rows), 5)])[:33]
    assert np.bincount(seen).tolist() == [9, 12, 12]
    indices = np.concatenate([d.train._plan.indices(s, rows) for s in range(5)])[:33]
    assert sorted(indices) == list(range(33))


def test_the_same_batches_on_two_hosts_and_after_a_resume(tree):
    source = data.create(configured(tree)).train
    whole = list(itertools.islice(source.examples(0, np.arange(8)), 7))
    parts = [
        list(itertools.islice(source.examples(5, order.host_rows(8, h, 2)), 2)) for h in (0, 1)
    ]
    for step in range(2):
        joined = np.concatenate([part[step]["image"] for part in parts])
        np.testing.assert_array_equal(joined, whole[5 + step]["image"])


def test_held_out_images_are_of_all_classes_and_the_same_every_time(tree):
    one, two = (data.create(configured(tree, validation_size=12)) for _ in range(2))
    assert (one.train.size, one.validation.size) == (21, 12)
    assert set(labels(one.validation)) == {0, 1, 2}
    np.testing.assert_array_equal(labels(one.validation), labels(two.validation, hosts=2))


def test_own_validation_split(tree):
    d = data.create(configured(tree, validation_size=-1))
    assert (d.train.size, d.validation.size, d.test.size) == (33, 4, 8)
    assert labels(d.validation).tolist() == [1] * 4


def test_without_test_images_val_is_the_test_split(tmp_path):
    root = stored.image_folder(tmp_path, {"train": {"a": 8}, "val": {"a": 3}})
    d = data.create(configured(root))
    assert (d.train.size, d.test.size) == (8, 3)
    with pytest.raises(ConfigError, match="no validation split beside its test split"):
        data.create(configured(root, validation_size=-1))


def test_train_alone_is_divided_in_three(tmp_path):
    root = stored.image_folder(tmp_path, {"train": {"a": 10, "b": 10}})
    d = data.create(configured(root, validation_size=5))
    assert (d.train.size, d.validation.size, d.test.size) == (10, 5, 5)
    parts = [
        {image.tobytes() for b in source.examples(0, 1) for image in b["image"][b["mask"]]}
        for source in (d.validation, d.test)
    ]
    assert [len(part) for part in parts] == [5, 5]
    assert not parts[0] & parts[1]
    for size in (0, 10):
        with pytest.raises(
            ConfigError, match=f"neither test nor val.*{size} does not fit.* 1 to 9"
        ):
            data.create(configured(root, validation_size=size))


def test_folders_that_are_wrong_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.dir: give the folder"):
        data.create(configured(tmp_path, dir=None))
    with pytest.raises(DataError, match=r"there is no folder .*train; it should hold"):
        data.create(configured(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"train has no folders"):
        data.create(configured(tmp_path))
    stored.image_folder(tmp_path, {"train": {"full": 8, "empty": 0}, "test": {"full": 1}})
    with pytest.raises(DataError, match=r"the class folder .*train/empty has no images \(\.jpg"):
        data.create(configured(tmp_path))
    (tmp_path / "train" / "empty").rmdir()
    stored.image_folder(tmp_path, {"test": {"other": 1}})
    with pytest.raises(DataError, match=r"test/other: train has no class 'other'"):
        data.create(configured(tmp_path))


def test_files_that_do_not_decode_are_named(tmp_path):
    root = stored.image_folder(tmp_path, {"train": {"a": 8}, "test": {"a": 2}})
    bad = root / "train" / "a" / "5.jpg"
    bad.write_bytes(b"")
    with pytest.raises(DataError, match=rf"{bad} cannot be read as an image: it is empty"):
        next(data.create(configured(root)).train.batches(0))
    bad.write_bytes(stored.encoded(stored.photo(0)))
    d = data.create(configured(root, on_error="skip"))
    bad.unlink()  # between listing and reading
    next(d.train.examples(0, np.arange(8)))
    assert d.train.skipped == 1


class TinyOwnSet(tfds.core.GeneratorBasedBuilder):
    """Registers itself with TFDS by being defined."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["x", "y"]),
                "other": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {
            name: self._generate_examples(first, size)
            for name, first, size in (("train", 0, 20), ("validation", 20, 5), ("test", 30, 9))
        }

    def _generate_examples(self, first, size):
        for i in range(first, first + size):
            yield i, {"image": stored.photo(i), "label": i % 2, "other": str(i)}


class TinyNoLabels(TinyOwnSet):
    def _info(self):
        features = tfds.features.FeaturesDict({"image": tfds.features.Image()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _generate_examples(self, first, size):
        for i in range(first, first + size):
            yield i, {"image": stored.photo(i)}


def test_tfds_sets_by_name(tmp_path):
    c = configured(tmp_path, name="tfds:tiny_own_set", validation_size=-1)
    with pytest.raises(
        DataError, match=r"tiny_own_set is not prepared in .*; run python -m dfs_jax"
    ):
        data.create(c)
    TinyOwnSet(data_dir=tmp_path).download_and_prepare()
    d = data.create(c)
    assert d.spec.class_names == ("x", "y")
    assert (d.train.size, d.validation.size, d.test.size) == (20, 5, 9)
    assert sorted(labels(d.test)) == [0] * 5 + [1] * 4
    assert next(d.train.batches(0))["image"].shape == (8, 16, 16, 3)
    c.data.validation_size = 4
    c.data.update(normalization="own", channels=1)
    d = data.create(c)
    assert d.train.size == 16
    assert {k: split.size for k, split in d.record.splits.items()} == {
        "train": 16,
        "validation": 4,
        "test": 9,
    }
    assert d.record.statistics == d.spec.statistics
    assert len(d.spec.statistics[0]) == 1
    assert data.create(c, d.record).record == d.record
    c.data.backend = "grain"
    with pytest.raises(
        DataError, match=r"'grain' reads array_record files, but .* as tfrecord; take"
    ):
        data.create(c)


def test_tfds_sets_that_do_not_fit(tmp_path):
    TinyNoLabels(data_dir=tmp_path).download_and_prepare()
    with pytest.raises(ConfigError, match=r"has no feature 'label' of type ClassLabel.*: image"):
        data.create(configured(tmp_path, name="tfds:tiny_no_labels"))
    with pytest.raises(
        DataError, match=r"no data set 'oxford_flower'; did you mean oxford_flowers"
    ):
        data.create(configured(tmp_path, name="tfds:oxford_flower"))
    (folder,) = (tmp_path / "tiny_no_labels").iterdir()
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(
        DataError, match=r"the prepared data of tiny_no_labels in .* cannot be read"
    ):
        data.create(configured(tmp_path, name="tfds:tiny_no_labels"))
