"""Image folders: which files count, which are held out, and what is said of the others."""

import itertools
import os

import numpy as np
import pytest
import stored
from etils.epath import backend
from PIL import Image

from dfs_jax import config, data
from dfs_jax.config import ConfigError
from dfs_jax.data.input import order
from dfs_jax.data.pipeline import DataError
from dfs_jax.data.record import OF_BEFORE
from dfs_jax.data.sets import image_files

PNG = stored.encoded(stored.photo(1, 8, 8), "PNG")


def configured(root, **fields):
    c = config.default()
    c.data.update(name="folder", dir=str(root), image_size=8, streams=4, validation_size=0)
    c.data.update({"normalization": "imagenet", **fields})
    c.train.batch_size = c.train.eval_batch_size = 8
    return c


def tree(root, *names, content=PNG):
    """Files below `root`, all with the same pixels."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def numbered(split, label, count):
    return [f"{split}/{label}/{i}.png" for i in range(count)]


def trained(made):
    """Names CLASS/…/FILE of the images that are trained on."""
    rows = made.train._rows.records
    return [rows.where(i).split("/train/")[1] for i in range(made.train.size)]


@pytest.fixture
def sixty(tmp_path):
    return tree(tmp_path, *numbered("train", "ant", 30), *numbered("train", "bee", 30))


def test_one_more_image_moves_one_held_out_image_at_most(sixty):
    c = configured(sixty, validation_size=12)
    before = data.create(c).record.held_out
    assert {split: len(names) for split, names in before.items()} == {"test": 12, "validation": 12}
    for i in range(30, 40):
        tree(sixty, f"train/ant/{i}.png")
        now = data.create(c)
        for split, names in now.record.held_out.items():
            assert len(set(names) & set(before[split])) >= 11
            assert not set(names) & set(trained(now))
        assert not set(now.record.held_out["test"]) & set(now.record.held_out["validation"])
        before = now.record.held_out


def test_a_run_holds_out_the_same_images_and_trains_on_later_ones(sixty):
    c = configured(sixty, validation_size=12)
    known = data.create(c).record
    later = [f"ant/later{i}.png" for i in range(20)]
    tree(sixty, *(f"train/{name}" for name in later))
    now = data.create(c, known)
    assert now.record.held_out == known.held_out
    assert set(later) <= set(trained(now))
    assert len(trained(now)) == len(set(trained(now))) == 60 + 20 - 24
    assert now.record.splits["test"] == known.splits["test"]
    without = data.create(c)  # another run may well hold out some of them
    assert set(itertools.chain(*without.record.held_out.values())) & set(later)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_held_out_image_that_is_gone_is_named(sixty, split):
    c = configured(sixty, validation_size=12)
    known = data.create(c).record
    gone = known.held_out[split][3]
    (sixty / "train" / gone).unlink()
    with pytest.raises(DataError, match=rf"train lacks '{gone}', held out as {split} images"):
        data.create(c, known)


def test_a_run_of_before_keeps_its_hold_out_and_its_order(tmp_path):
    names = [*numbered("train", "ant", 13), *numbered("train", "bee", 14)]
    tree(tmp_path, *names, "train/ant/inner/1.png", "train/bee/1.webp", "validation/ant/1.png")
    made = data.create(configured(tmp_path, validation_size=5), OF_BEFORE)
    files = sorted(name.removeprefix("train/") for name in names)
    drawn = [files[i] for i in order.permutation(27, 0, 0)]  # the rule of that time
    assert trained(made) == drawn[:17]
    assert made.record.held_out == {"validation": tuple(drawn[17:22]), "test": tuple(drawn[22:])}
    # From then on they are kept by name.
    tree(tmp_path, "train/ant/99.png")
    again = data.create(configured(tmp_path, validation_size=5), made.record)
    assert again.record.held_out == made.record.held_out
    assert set(trained(again)) == {*drawn[:17], "ant/99.png"}


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_has_three_names(tmp_path, name):
    names = [*numbered("train", "ant", 8), *numbered("train", "bee", 8)]
    tree(tmp_path, *names, *numbered(name, "ant", 3))
    made = data.create(configured(tmp_path))
    assert (made.train.size, made.test.size) == (16, 3)
    tree(tmp_path, *numbered("test", "bee", 5))
    made = data.create(configured(tmp_path, validation_size=-1))
    assert (made.validation.size, made.test.size) == (3, 5)
    assert made.record.held_out == {}
    other = "val" if name == "validation" else "validation"
    tree(tmp_path, f"{other}/ant/1.png")
    with pytest.raises(DataError, match=r"has val.* and val.*, which mean the same; keep one"):
        data.create(configured(tmp_path))


def test_an_empty_class_folder_beside_images_is_told(tmp_path, caplog):
    tree(tmp_path, *numbered("train", "ant", 8), "train/bee/1.png", "val/ant/1.png")
    (tmp_path / "val" / "bee").mkdir()
    assert data.create(configured(tmp_path)).test.size == 1
    assert "val has no images of class 'bee'" in caplog.text
    (tmp_path / "val" / "ant" / "1.png").unlink()
    with pytest.raises(DataError, match=r"the class folders of .*val have no images \(\.jpg, "):
        data.create(configured(tmp_path))


def test_files_of_all_kinds_and_in_inner_folders_count_and_others_are_told(tmp_path, caplog):
    used = [
        "ant/a.webp",
        "ant/b.BMP",
        "ant/in/c.tif",
        "ant/in/ner/d.gif",
        "bee/e.JPEG",
        "bee/f.png",
    ]
    tree(tmp_path, *(f"train/{name}" for name in used), "test/ant/1.png")
    for name in ("ant/notes.txt", "ant/in/x.heic", "bee/.x.png", "bee/Thumbs", "y.png"):
        tree(tmp_path, f"train/{name}")
    tree(tmp_path, "train/__MACOSX/ant/1.png", "train/.cache/1.png", "train/ant/.old/1.png")
    tree(tmp_path, "tset/ant/1.png", "__MACOSX/train/ant/1.png")
    made = data.create(configured(tmp_path, streams=2))
    assert made.spec.class_names == ("ant", "bee")
    assert sorted(trained(made)) == sorted(used)
    assert (
        "5 files are not used: 1 .heic, 1 .txt, 1 hidden, 1 in no class folder, 1 no ending"
        in caplog.text
    )
    assert "folders that are not used: 'tset'" in caplog.text


def test_images_of_val_that_are_not_used_are_told(tmp_path, caplog):
    tree(tmp_path, *numbered("train", "ant", 9), *numbered("train", "bee", 9))
    tree(tmp_path, *numbered("val", "ant", 3), *numbered("test", "ant", 2))
    data.create(configured(tmp_path, validation_size=4))
    assert "val: its 3 images are not used; data.validation_size=-1 takes them" in caplog.text
    caplog.clear()
    data.create(configured(tmp_path, validation_size=-1))
    assert not caplog.text.replace("no images of class 'bee'", "").count("not used")


def test_a_class_that_is_held_out_whole_is_told(sixty, caplog):
    first = data.create(configured(sixty, validation_size=1)).record.held_out["test"][0]
    for path in (sixty / "train" / first).parent.iterdir():
        if path.name != first.split("/")[1]:
            path.unlink()
    data.create(configured(sixty, validation_size=1))
    assert f"no image of class '{first.split('/')[0]}' is trained on" in caplog.text


def test_links_are_followed_but_not_in_circles(tmp_path):
    tree(tmp_path / "real", "1.png", "in/2.png")
    tree(tmp_path / "images", *numbered("train", "bee", 4), "test/bee/1.png")
    (tmp_path / "images" / "train" / "ant").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "in" / "again").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "broken.png").symlink_to(tmp_path / "nowhere")
    made = data.create(configured(tmp_path / "images"))
    names = {name for name in trained(made) if name.startswith("ant")}
    assert names == {"ant/1.png", "ant/in/2.png", "ant/broken.png"}


def test_a_folder_that_cannot_be_read_is_named(sixty, monkeypatch):
    scandir = os.scandir

    def refusing(path="."):
        if os.fspath(path).endswith("train/bee"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"train/bee cannot be read: Permission denied"):
        data.create(configured(sixty, validation_size=5))


def test_a_remote_folder_is_read_alike(tmp_path, monkeypatch):
    tree(
        tmp_path,
        *numbered("train", "ant", 5),
        "train/bee/in/1.png",
        "test/ant/.x",
        "test/ant/1.gif",
    )
    (tmp_path / "train" / "ant" / "7.jpg").write_bytes(b"1234567")
    c = configured(tmp_path)
    local = data.create(c).record
    monkeypatch.setattr(image_files, "_remote", lambda path: True)
    path = type(image_files.epath.Path(tmp_path))
    monkeypatch.setattr(path, "_backend", backend.tf_backend)  # what gs:// is read by
    assert data.create(c).record == local


def test_grey_images_stay_one_channel_with_statistics_of_their_own(tmp_path):
    rng = np.random.default_rng(0)
    pixels = {}
    for split, label, i in itertools.product(("train", "test"), ("a", "b"), range(6)):
        image = rng.integers(0, 100, (8, 8), np.uint8)
        pixels[split] = [*pixels.get(split, []), image]
        tree(tmp_path, f"{split}/{label}/{i}.png")
        Image.fromarray(image).save(tmp_path / split / label / f"{i}.png")
    c = configured(tmp_path, channels=1, normalization="own")
    made = data.create(c)
    assert made.spec.inputs["image"].shape == (8, 8, 1)
    assert next(made.train.examples(0, np.arange(8)))["image"].shape == (8, 8, 8, 1)
    (mean,), (std,) = made.spec.statistics
    assert mean == pytest.approx(np.mean(pixels["train"]) / 255, abs=0.02)  # resized and cropped
    assert std > 0
    (batch,) = itertools.islice(made.test.batches(), 1)
    assert batch["image"].shape == (8, 8, 8, 1)
    assert data.create(c).spec.statistics == made.spec.statistics
    with pytest.raises(ConfigError, match=r"'imagenet' is for 3 channels, .* have 1; take 'own'"):
        data.create(configured(tmp_path, channels=1))
    with pytest.raises(ConfigError, match=r"data\.channels must be 1 .* got 2"):
        data.create(configured(tmp_path, channels=2))


def test_channels_of_a_set_in_memory_are_as_they_are(digits_dir):
    c = config.default()
    c.data.dir = str(digits_dir)
    c.data.channels = 1
    assert data.create(c).record.splits["train"].size == 1197
    c.data.channels = 3
    with pytest.raises(ConfigError, match=r"data\.channels 3: the images of digits have 1; 0"):
        data.create(c)
