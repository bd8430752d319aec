"""Image files as the network takes them."""

import bundles
import numpy as np
from PIL import Image

from dfs_jax.early_exit import serving
from dfs_jax.early_exit.preprocessing import Preprocessing


def test_images_of_any_size_and_colour(tmp_path):
    """Reduced to the network's size and channels; a photo's orientation is respected."""
    preprocessing = Preprocessing(bundles.IMAGE, (0.4,), (0.3,))
    grey = np.random.default_rng(0).integers(0, 256, (12, 10), dtype=np.uint8)
    upright = Image.fromarray(grey)
    upright.save(tmp_path / "grey.png")
    upright.convert("RGB").save(tmp_path / "colour.png")
    upright.convert("P").save(tmp_path / "palette.gif")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    expected = preprocessing.fit(grey[..., None])
    for name in ("grey.png", "colour.png", "palette.gif", "turned.png"):
        np.testing.assert_array_equal(
            serving.read_image(str(tmp_path / name), preprocessing), expected
        )
    colour = Preprocessing((6, 5, 3), (0.4,) * 3, (0.3,) * 3)
    found = serving.read_image(str(tmp_path / "grey.png"), colour)
    np.testing.assert_array_equal(found, np.repeat(expected, 3, axis=-1))
