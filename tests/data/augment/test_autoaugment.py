"""The image operations against Pillow's pixels, and what the policies draw."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance, ImageOps

from dfs_jax.config import ConfigError
from dfs_jax.data.augment import autoaugment, image_ops
from dfs_jax.data.augment.augmentation import Augmentation
from dfs_jax.data.input import in_memory

GOLDEN = Path(__file__).parents[2] / "golden"
SHEARS = ("shearX", "shearY")
ENHANCEMENTS = {
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
    "brightness": ImageEnhance.Brightness,
}


@pytest.fixture(scope="module")
def published():
    return json.loads((GOLDEN / "autoaugment_policy.json").read_text())


def operate(actions, images):
    """(A, N, H, W, 3): every action on every image."""
    table = image_ops.tabulate(actions, *images.shape[1:3])
    on_images = jax.vmap(lambda row, image: image_ops.operate(table, row, image), (None, 0))
    every = jax.jit(jax.vmap(on_images, (0, None)))
    return np.asarray(every(np.arange(len(actions), dtype=np.int32), images))


def assert_same_pixels(operation, found, expected):
    if operation not in SHEARS:
        np.testing.assert_array_equal(found, expected, err_msg=operation)
        return
    apart = np.abs(found.astype(int) - expected)
    assert apart.max() <= 1
    assert np.mean(apart > 0) < 0.01


def test_operations_give_the_recorded_pixels(published):
    recorded = np.load(GOLDEN / "autoaugment_ops.npz")
    actions = []
    for name in recorded["names"]:
        operation, level, sign = name.split(":")
        magnitude = published["magnitudes"][operation][int(level)]
        actions.append((operation, -magnitude if sign == "-" else magnitude))
    found = operate(actions, recorded["image"][None])[:, 0]
    assert len(actions) == 193
    for (operation, _), mine, expected in zip(actions, found, recorded["outputs"], strict=True):
        assert_same_pixels(operation, mine, expected)


def pillow(operation, magnitude, array):
    """An independent account of the operations in terms of Pillow's."""
    image = Image.fromarray(array)
    width, height = image.size

    def mapped(*matrix, resample=Image.Resampling.NEAREST):
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=(128, 128, 128)
        )

    bicubic = Image.Resampling.BICUBIC
    if operation in ENHANCEMENTS:
        result = ENHANCEMENTS[operation](image).enhance(1 + magnitude)
    elif operation == "rotate":
        turned = image.convert("RGBA").rotate(magnitude)
        ground = Image.new("RGBA", image.size, (128,) * 4)
        result = Image.composite(turned, ground, turned).convert("RGB")
    else:
        result = {
            "identity": lambda: image,
            "shearX": lambda: mapped(1, magnitude, 0, 0, 1, 0, resample=bicubic),
            "shearY": lambda: mapped(1, 0, 0, magnitude, 1, 0, resample=bicubic),
            "translateX": lambda: mapped(1, 0, magnitude * width, 0, 1, 0),
            "translateY": lambda: mapped(1, 0, 0, 0, 1, magnitude * height),
            "posterize": lambda: ImageOps.posterize(image, int(magnitude)),
            "solarize": lambda: ImageOps.solarize(image, magnitude),
            "autocontrast": lambda: ImageOps.autocontrast(image),
            "equalize": lambda: ImageOps.equalize(image),
            "invert": lambda: ImageOps.invert(image),
        }[operation]()
    return np.asarray(result)


def pictures(height, width):
    """Noise within several ranges, blocks, and images of one and of two levels."""
    rng = np.random.default_rng(height)
    shape = (height, width, 3)
    images = [rng.integers(low, high, shape) for low, high in ((0, 256), (60, 90), (200, 206))]
    blocks = np.kron(rng.integers(0, 256, (height // 4, width // 4, 3)), np.ones((4, 4, 1)))
    two = np.zeros(shape)
    two[0, 0] = 255
    return np.stack([*images, blocks, two, np.full(shape, 77)]).astype(np.uint8)


def test_operations_give_pillows_pixels_for_other_images_and_magnitudes():
    rng = np.random.default_rng(0)
    ranges = {
        **dict.fromkeys((*SHEARS, "translateX", "translateY"), (-0.5, 0.5)),
        **dict.fromkeys(ENHANCEMENTS, (-1, 1)),
        "rotate": (-45, 45),
        "posterize": (1, 9),
        "solarize": (0, 257),
    }
    actions = [("identity", 0.0), ("autocontrast", 0.0), ("equalize", 0.0), ("invert", 0.0)]
    for operation, (low, high) in ranges.items():
        magnitudes = [0 if low < 0 else low, *rng.uniform(low, high, 5)]
        actions += [(operation, float(magnitude)) for magnitude in magnitudes]
    images = pictures(20, 28)
    found = operate(actions, images)
    for (operation, magnitude), results in zip(actions, found, strict=True):
        expected = np.stack([pillow(operation, magnitude, image) for image in images])
        assert_same_pixels(operation, results, expected)


def test_autocontrast_rounds_as_double_precision_does():
    """Of the levels that should become whole numbers, a third falls short by one."""
    pairs = [(low, high) for high in range(1, 256) for low in range(0, high, 3)]
    lows, highs = np.array(pairs).T
    images = np.linspace(lows, highs, 256).round().astype(np.uint8).T.reshape(-1, 16, 16, 1)
    table = image_ops.tabulate([("autocontrast", 0.0)], 16, 16)
    stretch = jax.jit(jax.vmap(lambda image: image_ops.operate(table, jnp.int32(0), image)))
    found = np.asarray(stretch(np.repeat(images, 3, axis=3)))[..., 0]
    scale = 255.0 / (highs - lows)[:, None, None]
    expected = (images[..., 0] * scale + -lows[:, None, None] * scale).astype(int)
    np.testing.assert_array_equal(found, expected)
    exact = (
        255 * (images[..., 0].astype(int) - lows[:, None, None]) // (highs - lows)[:, None, None]
    )
    assert np.any(expected < exact)


def test_an_unknown_operation():
    with pytest.raises(ValueError, match="unknown operation 'shear'; known: identity, shearX"):
        image_ops.tabulate([("shear", 0.1)], 32, 32)


def test_the_policy_and_its_magnitudes_are_the_published_ones(published):
    assert [list(row) for row in autoaugment.POLICIES["cifar10"]] == published["CIFAR10Policy"]
    assert autoaugment.MAGNITUDES.keys() == published["magnitudes"].keys()
    for operation, values in published["magnitudes"].items():
        np.testing.assert_allclose(autoaugment.MAGNITUDES[operation], values, atol=1e-12)


DRAWS = 100_000


def near(count, probability):
    """Whether counts out of DRAWS are within five standard deviations of what is expected."""
    return np.abs(count - DRAWS * probability) <= 5 * np.sqrt(DRAWS * probability)


def test_draws_of_the_policy():
    keys = jax.random.split(jax.random.key(0), DRAWS)
    rows = np.asarray(jax.jit(jax.vmap(lambda key: autoaugment.draw_policy(key, "cifar10")))(keys))
    actions = autoaugment.policy_actions("cifar10")
    assert actions[0] == ("identity", 0.0)
    drawn = np.zeros((2, len(actions)), int)
    for slot in range(2):
        np.add.at(drawn[slot], rows[:, slot], 1)
    both = rows[(rows > 0).all(axis=1)]
    assert ((both[:, 0] - 1) // 4 == (both[:, 1] - 1) // 4).all()  # of one sub-policy
    signed = {"shearX", "shearY", "translateX", "translateY", *ENHANCEMENTS}
    for number, (p1, op1, level1, p2, op2, level2) in enumerate(autoaugment.POLICIES["cifar10"]):
        first = 1 + 4 * number
        for slot, p, operation, level in ((0, p1, op1, level1), (1, p2, op2, level2)):
            positive, negative = first + 2 * slot, first + 2 * slot + 1
            magnitude = autoaugment.MAGNITUDES[operation][level]
            assert actions[positive] == (operation, magnitude)
            assert actions[negative] == (
                operation,
                -magnitude if operation in signed else magnitude,
            )
            assert near(drawn[slot, positive], p / 25 / 2)
            assert near(drawn[slot, negative], p / 25 / 2)
        assert near(np.sum((both[:, 0] - 1) // 4 == number), p1 * p2 / 25)
    assert drawn[0, 1::4].sum() + drawn[0, 2::4].sum() + drawn[0, 0] == DRAWS
    assert drawn[1, 3::4].sum() + drawn[1, 4::4].sum() + drawn[1, 0] == DRAWS


def test_randaugment_draws_its_operations_uniformly():
    keys = jax.random.split(jax.random.key(1), DRAWS)
    rows = np.asarray(jax.jit(jax.vmap(lambda key: autoaugment.draw_randaugment(key, 2)))(keys))
    counts = np.zeros((28, 28), int)
    np.add.at(counts, tuple(rows.T), 1)
    assert near(counts.sum(axis=1), 1 / 28).all()
    assert near(counts, 1 / 28**2).all()


def test_magnitudes_of_randaugment():
    strongest = dict(autoaugment.randaugment_actions(10.0)[::2])
    assert strongest == {
        operation: values[-1]
        for operation, values in {"identity": [0], **autoaugment.MAGNITUDES}.items()
        if operation != "invert"
    }
    weakest = autoaugment.randaugment_actions(0.0)
    assert {magnitude for name, magnitude in weakest if name == "solarize"} == {256}
    assert {magnitude for name, magnitude in weakest if name == "posterize"} == {8}
    half = autoaugment.randaugment_actions(5.0)
    assert [m for name, m in half if name == "rotate"] == [15, -15]
    assert [m for name, m in half if name == "posterize"] == [6, 6]
    assert [m for name, m in half if name == "solarize"] == [128, 128]


def test_operations_come_between_flip_and_cutout():
    """The chain equals its links, and a link draws the same whatever the others do."""
    image = jnp.asarray(pictures(8, 8)[0])
    several = jax.random.split(jax.random.key(5), 24)

    def only(images, **choice):
        apply = jax.jit(jax.vmap(lambda key, value: Augmentation(**choice).apply(key, value)))
        return np.asarray(apply(several, images))

    images = np.stack([image] * len(several))
    chosen = [{"crop_padding": 2, "flip": True}, {"autoaugment": "cifar10"}, {"cutout": 4}]
    step_by_step = images
    for choice in chosen:
        step_by_step = only(step_by_step, **choice)
    together = only(images, **{k: v for choice in chosen for k, v in choice.items()})
    np.testing.assert_array_equal(together, step_by_step)
    assert len({found.tobytes() for found in together}) == len(several)


def test_batches_do_not_depend_on_the_number_of_devices(conf):
    conf.data.update(autoaugment="cifar10", normalization="cifar10")
    conf.train.batch_size = 16
    arrays = pictures(8, 8), np.arange(6)
    found = in_memory.from_arrays(
        conf, name="made", train=arrays, validation=None, test=arrays, class_names=list("abcdef")
    )
    batches = []
    for devices in (1, 8):
        mesh = jax.make_mesh(
            (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
        )
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        batches.append(jax.tree.map(np.asarray, next(found.train.batches(3, sharding))))
    jax.tree.map(np.testing.assert_array_equal, *batches)


def test_devices_do_not_exchange_images():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    over = NamedSharding(mesh, PartitionSpec("data"))
    table = image_ops.tabulate(autoaugment.policy_actions("cifar10"), 8, 8)
    operations = jax.jit(
        jax.vmap(lambda row, image: image_ops.operate(table, row, image)), out_shardings=over
    )
    arguments = np.zeros(16, np.int32), np.zeros((16, 8, 8, 3), np.uint8)
    compiled = operations.lower(*jax.device_put(arguments, over)).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in compiled


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"autoaugment": "cifar100"}, "no policy 'cifar100'; known: cifar10, or '' for none"),
        ({"randaugment_layers": -1}, r"data\.randaugment_layers -1 is negative"),
        ({"randaugment_magnitude": 11.0}, r"data\.randaugment_magnitude 11\.0 is not between 0"),
        ({"autoaugment": "cifar10", "randaugment_layers": 2}, "both set; choose one"),
    ],
)
def test_choices_that_make_no_sense(conf, fields, message):
    conf.data.update(fields)
    with pytest.raises(ConfigError, match=message):
        Augmentation.from_config(conf, (32, 32, 3))


@pytest.mark.parametrize("fields", [{"autoaugment": "cifar10"}, {"randaugment_layers": 1}])
def test_operations_are_for_colour_images(conf, fields):
    conf.data.update(fields)
    with pytest.raises(ConfigError, match=f"data.{next(iter(fields))} .* these have 1"):
        Augmentation.from_config(conf, (8, 8, 1))
