import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax import config
from dfs_jax.config import ConfigError
from dfs_jax.distributed import placement


def mesh_of(data):
    c = config.default()
    c.mesh.data = data
    return placement.create_mesh(c)


@pytest.mark.parametrize(("data", "devices"), [(-1, 8), (8, 8), (2, 2), (1, 1)])
def test_mesh_has_the_devices_asked_for(data, devices):
    mesh = mesh_of(data)
    assert dict(mesh.shape) == {"data": devices, "fsdp": 1}
    assert placement.describe(mesh) == f"process 0 of 1, 8 cpu devices, mesh data={devices} fsdp=1"


@pytest.mark.parametrize("data", [0, -2, 9])
def test_impossible_number_of_devices_is_refused(data):
    with pytest.raises(ConfigError, match=rf"config.mesh.data = {data}.*there are 8 cpu devices"):
        mesh_of(data)


def test_batch_is_cut_and_parameters_are_whole():
    mesh = mesh_of(4)
    x = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
    on_batch = jax.device_put(x, placement.batch(mesh))
    whole = jax.device_put(x, placement.replicated(mesh))
    assert {s.data.shape for s in on_batch.addressable_shards} == {(2, 3)}
    assert {s.data.shape for s in whole.addressable_shards} == {(8, 3)}
    # Auto axes: the compiler places the result; explicit ones would refuse this product.
    product = jax.jit(lambda a, b: a @ b.T, out_shardings=placement.replicated(mesh))
    np.testing.assert_array_equal(product(on_batch, whole), jnp.asarray(x) @ x.T)
