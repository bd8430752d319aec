"""Pixels: what the crops of training and evaluation show, against Pillow and a coordinate image."""

import numpy as np
import pytest
import stored
from PIL import Image

from dfs_jax.data.input import decode
from dfs_jax.data.input.records import parse_example

SIZE = 224


def rows(images, *, seed=None, positions=None, labels=None, size=SIZE, area=0.08, antialias=True):
    import tensorflow as tf

    labels = labels or [0] * len(images)
    raw = [stored.example(image, label) for image, label in zip(images, labels, strict=True)]
    positions = np.arange(len(raw)) if positions is None else np.asarray(positions)
    records = tf.data.Dataset.from_tensor_slices((raw, np.arange(len(raw)), positions))
    decoder = decode.Decoder(parse_example, (size, size, 3), 10, area, antialias)
    (batch,) = decoder.batches(records.batch(len(raw)), seed)
    return batch


@pytest.mark.parametrize("shape", [(375, 500), (333, 256), (90, 90)])
def test_evaluation_resizes_to_256_and_cuts_out_the_centre_as_pillow_does(shape):
    image = Image.fromarray(stored.photo(1, *shape))
    scale = 256 / min(shape)
    height, width = round(shape[0] * scale), round(shape[1] * scale)
    resized = image.resize((width, height), Image.BILINEAR)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    expected = np.asarray(resized.crop((left, top, left + SIZE, top + SIZE)), np.int32)
    batch = rows([stored.encoded(np.asarray(image), "PNG")])
    assert batch["image"].shape == (1, SIZE, SIZE, 3)
    assert np.abs(batch["image"][0] - expected).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_random_crops_show_windows_of_the_allowed_area_and_shape(kind):
    height, width, area = 240, 200, 0.3
    y, x = np.mgrid[:height, :width]
    # Red is the column, green the row: pixels of the result say where they come from.
    image = np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)
    batch = rows([stored.encoded(image, kind)] * 60, seed=3, area=area, antialias=False)
    assert (batch["wrong"] == b"").all()
    crops = batch["image"].astype(float)
    widths = (crops[:, 112, -1, 0] - crops[:, 112, 0, 0] + 1)[:, None]
    heights = (crops[:, -1, 112, 1] - crops[:, 0, 112, 1] + 1)[:, None]
    shares, ratios = widths * heights / (height * width), widths / heights
    assert shares.min() > area - 0.04
    assert shares.max() > 0.75
    assert ratios.min() > 0.70
    assert ratios.max() < 1.40
    assert ratios.std() > 0.1
    lefts, tops = crops[:, 112, 0, 0], crops[:, 0, 112, 1]
    assert lefts.std() > 10
    assert tops.std() > 10


def test_a_crop_depends_on_seed_and_position_alone():
    image = stored.encoded(stored.photo(2))
    one = rows([image] * 5, seed=1, positions=[7, 8, 7, 10**12, 9], size=32)["image"]
    two = rows([image] * 2, seed=1, positions=[10**12, 7], size=32)["image"]
    other = rows([image], seed=2, positions=[7], size=32)["image"]
    np.testing.assert_array_equal(one[0], one[2])
    np.testing.assert_array_equal(one[3], two[0])
    np.testing.assert_array_equal(one[0], two[1])
    assert len({crop.tobytes() for crop in [*one, *other]}) == 5


def test_rows_stay_in_order_and_say_what_is_wrong_with_them():
    good = stored.encoded(stored.photo(3))
    images = [good] * 40
    images[5], images[6], images[20] = good[: len(good) // 2], b"no image", b""
    labels = [i % 10 for i in range(40)]
    labels[7], labels[8] = 10, -1
    batch = rows(images, labels=labels, seed=0, area=1.0, size=32)
    np.testing.assert_array_equal(batch["index"], np.arange(40))
    expected = {5: "truncated", 6: "it is no JPEG", 20: "it is empty", 7: "label", 8: "label"}
    for i, wrong in enumerate(batch["wrong"].astype(str)):
        assert expected[i] in wrong if i in expected else wrong == ""
    usable = np.array([i not in expected for i in range(40)])
    np.testing.assert_array_equal(batch["label"][usable], np.array(labels)[usable])
    assert not batch["image"][[5, 6, 20]].any()


def test_grey_images_and_tiny_ones():
    grey = np.asarray(Image.fromarray(stored.photo(4)).convert("L"))
    batch = rows([stored.encoded(grey), stored.encoded(stored.photo(5, 3, 2), "PNG")], size=32)
    assert (batch["wrong"] == b"").all()
    colours = batch["image"][0].astype(int)
    assert np.abs(colours - colours[..., :1]).max() == 0
