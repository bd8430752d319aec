"""IDX files made here: what they hold, in which order, and what is refused."""

import gzip
import hashlib
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dfs_jax import config, data
from dfs_jax.config import ConfigError
from dfs_jax.data.input import in_memory
from dfs_jax.data.pipeline import DataError
from dfs_jax.data.sets import fashion_mnist, idx
from dfs_jax.training import workdir as workdirs

TRAIN, TEST = 60, 24
NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
NAME = "train-images-idx3-ubyte.gz"


def made(size, first_label=0, shape=(6, 5)):
    """Images (N, H, W) stored class by class, three classes, and labels (N,)."""
    rng = np.random.default_rng(size)
    labels = np.sort(np.arange(size) % 3 + first_label).astype(np.uint8)
    return rng.integers(0, 256, (size, *shape), dtype=np.uint8), labels


def packed(array):
    head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return head + array.tobytes()


def write(folder, zipped=True, splits=None):
    """The four files in `folder`; their contents by split."""
    folder.mkdir(exist_ok=True)
    splits = splits or {"train": made(TRAIN), "test": made(TEST)}
    contents = {}
    for split, arrays in splits.items():
        contents[split] = tuple(map(packed, arrays))
        for name, content in zip(NAMES[split], contents[split], strict=True):
            path = folder / (name + ".gz" * zipped)
            path.write_bytes(gzip.compress(content) if zipped else content)
    return contents


def configured(name, **of_data):
    c = config.default()
    c.data.update(name=str(name), validation_size=9, **of_data)
    c.train.update(batch_size=6, eval_batch_size=6)
    return c


@pytest.fixture
def served(monkeypatch):
    """Creates data; returns them, and for each split its examples: pixels and label, in order."""
    handed = {}

    def keep(c, **given):
        handed.update(given)
        return from_arrays(c, **given)

    from_arrays = in_memory.from_arrays
    monkeypatch.setattr(in_memory, "from_arrays", keep)

    def create(*name, **of_data):
        found = data.create(configured(*name, **of_data))
        splits = (zip(*handed[split], strict=True) for split in ("train", "validation", "test"))
        return found, *([(x.tobytes(), int(y)) for x, y in split] for split in splits)

    return create


@pytest.mark.parametrize("zipped", [True, False])
def test_every_example_is_served_once_in_an_order_of_its_own(tmp_path, served, zipped):
    write(tmp_path / "a", zipped)
    found, train, validation, test = served(f"idx:{tmp_path / 'a'}")
    assert (len(train), len(validation), len(test)) == (TRAIN - 9, 9, TEST)
    for got, size in ((train + validation, TRAIN), (test, TEST)):
        images, labels = made(size)
        wanted = [(x.tobytes(), int(y)) for x, y in zip(images, labels, strict=True)]
        assert sorted(got) == sorted(wanted)
    assert len({label for _, label in train[:12]}) == 3  # not class by class
    assert found.spec.class_names == ("0", "1", "2")
    assert found.spec.inputs["image"].shape == (6, 5, 1)
    levels = made(TRAIN)[0] / 255
    np.testing.assert_allclose(found.spec.statistics, [[levels.mean()], [levels.std()]], atol=1e-4)


def test_labels_may_begin_anywhere(tmp_path, served):
    write(tmp_path, splits={"train": made(TRAIN, 5), "test": made(TEST, 5)})
    found, *_, test = served(f"idx:{tmp_path}")
    assert found.spec.class_names == ("5", "6", "7")
    assert {label for _, label in test} == {0, 1, 2}


def test_another_set_of_the_same_size_is_another_set(tmp_path):
    write(tmp_path / "a")
    before = data.create(configured(f"idx:{tmp_path / 'a'}")).record
    images, labels = made(TEST)
    write(tmp_path / "b", splits={"train": made(TRAIN), "test": (255 - images, labels)})
    moved = data.create(configured(f"idx:{tmp_path / 'a'}", dir=str(tmp_path / "b"))).record
    assert moved.splits["test"] != before.splits["test"]
    assert moved.splits["train"] == before.splits["train"]


def test_the_place_of_a_folder_in_the_name_is_kept_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data.place(configured("idx:here")) == "here"
    assert data.place(configured("idx:here", dir="there")) == "there"
    assert data.place(configured("digits")) is None
    workdirs.create(configured("idx:here"), str(tmp_path / "run"))
    saved = workdirs.load(str(tmp_path / "run"))
    assert (saved.data.name, saved.data.dir) == ("idx:here", str(tmp_path / "here"))


def damaged(folder):
    """Each kind of damage to the files in `folder`, by what is then said."""
    path = folder / NAME

    def replaced(content):
        return lambda: path.write_bytes(gzip.compress(content))

    whole = gzip.decompress(path.read_bytes())
    return {
        "has no file train-images-idx3-ubyte or train-images-idx3-ubyte.gz": path.unlink,
        "holds several data sets, kmnist-train-images-idx3-ubyte.gz, train": lambda: shutil.copy(
            path, folder / f"kmnist-{NAME}"
        ),
        "ubyte.gz cannot be read": lambda: path.write_bytes(path.read_bytes()[:-20]),
        "train images in .* are no IDX file of 3": replaced(b"\0\0\x0d\3" + whole[4:]),
        r"train images in .* are damaged: 1,715 bytes do not hold \(60, 6, 5\)": replaced(
            whole[:-101]
        ),
        "train images in .* are damaged: 9 bytes": replaced(whole[:9]),
        "60 train images, but 24 labels": lambda: shutil.copy(
            folder / f"{NAMES['test'][1]}.gz", folder / f"{NAMES['train'][1]}.gz"
        ),
        "label 7 is in the test files alone": lambda: write(
            folder, splits={"train": made(TRAIN), "test": made(TEST, 7)}
        ),
        "there is no folder": lambda: shutil.rmtree(folder),
    }


def test_damage_is_told_in_a_sentence(tmp_path):
    write(tmp_path / "a")
    for number, message in enumerate(damaged(tmp_path / "a")):
        folder = tmp_path / str(number)
        write(folder)
        damaged(folder)[message]()
        with pytest.raises(DataError, match=message) as caught:
            data.create(configured(f"idx:{folder}"))
        assert "\n" not in str(caught.value)


class TestFashionMNIST:
    """The same examples, wherever they come from."""

    SPLITS = {split: made(n, shape=(28, 28)) for split, n in (("train", TRAIN), ("test", TEST))}  # noqa: RUF012

    @pytest.fixture
    def published(self, tmp_path, monkeypatch):
        """A folder of files that are taken for the published ones; no package, nothing prepared."""
        contents = write(tmp_path / "files", splits=self.SPLITS)
        sums = {k: tuple(hashlib.sha256(x).hexdigest() for x in v) for k, v in contents.items()}
        monkeypatch.setattr(fashion_mnist, "_CHECKSUMS", sums)
        monkeypatch.setattr(fashion_mnist, "_SIZES", {"train": TRAIN, "test": TEST})
        monkeypatch.setattr(fashion_mnist, "PACKAGE", str(tmp_path / "package"))
        monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
        return tmp_path / "files"

    def prepare(self, directory):
        """Has TFDS prepare it in `directory`, in another order."""

        def examples(images, labels):
            for i in reversed(range(len(labels))):
                yield i, {"image": images[i, ..., None], "label": int(labels[i])}

        builder = tfds.builder_cls("fashion_mnist")
        tfds.dataset_builders.store_as_tfds_dataset(
            name=builder.name,
            version=str(builder.VERSION),
            features=builder(data_dir=str(directory)).info.features,
            split_datasets={split: examples(*arrays) for split, arrays in self.SPLITS.items()},
            data_dir=str(directory),
        )

    def test_files_package_and_tfds_give_the_same(self, published, tmp_path, served):
        found, *of_files = served("fashion_mnist", dir=str(published))
        assert found.spec.class_names == fashion_mnist.CLASSES
        assert found.spec.statistics == ((0.2860,), (0.3530,))
        shutil.copytree(published, tmp_path / "package")
        _, *of_package = served("fashion_mnist")
        shutil.rmtree(tmp_path / "package")
        self.prepare(tmp_path / "tfds")
        _, *of_tfds = served("fashion_mnist")
        assert of_files == of_package == of_tfds

    def test_other_files_are_refused(self, published):
        images, labels = self.SPLITS["test"]
        write(published, splits={**self.SPLITS, "test": (255 - images, labels)})
        with pytest.raises(
            DataError, match=r"the test images in .* are not those of Fashion-MNIST"
        ):
            data.create(configured("fashion_mnist", dir=str(published)))

    def test_nowhere_names_package_and_files(self, published, tmp_path):
        message = f"neither in {tmp_path} nor in .*package.*apt-get install dataset-fashion-mnist"
        with pytest.raises(DataError, match=f"{message}.*t10k-labels-idx1-ubyte.gz"):
            data.create(configured("fashion_mnist", dir=str(tmp_path)))


def test_images_have_one_channel(tmp_path):
    write(tmp_path)
    with pytest.raises(ConfigError, match=r"data.channels 3: the images of idx:.* have 1"):
        data.create(configured(f"idx:{tmp_path}", channels=3))


def test_the_order_is_by_a_hash_of_image_and_label():
    images, labels = made(TRAIN)
    ordered, of = idx.in_order(images[..., None], labels)
    digests = [
        hashlib.sha256(x.tobytes() + bytes([y])).digest() for x, y in zip(ordered, of, strict=True)
    ]
    assert digests == sorted(digests)
