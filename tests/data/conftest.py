"""What the tests of the data sets share."""

import numpy as np
import pytest

from dfs_jax import config, data


@pytest.fixture
def conf():
    return config.default()


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A directory in which the digits have been prepared; not to be changed."""
    path = tmp_path_factory.mktemp("tfds")
    c = config.default()
    c.data.dir = str(path)
    data.create(c)
    return path


@pytest.fixture(scope="session")
def numbered():
    """Makes `size` images (5, 4, 3) with different pixels, and the numbers 0... as labels."""

    def make(size):
        images = np.random.default_rng(size).integers(0, 256, (size, 5, 4, 3), dtype=np.uint8)
        return images, np.arange(size)

    return make
