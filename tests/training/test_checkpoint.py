import json
import logging
import re
import shutil
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from dfs_jax.training.checkpoint import Checkpointer, CheckpointError, newest_step

# TensorStore leaves futures behind when it meets a damaged file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any
    method_state: Any = ()
    ema: Any = None


def make_state(step: int, **params) -> State:
    rng = np.random.default_rng(step)
    params = {
        "kernel": jnp.asarray(rng.normal(size=(16, 24)).astype("f")),
        "bias": jnp.asarray(rng.normal(size=(24,)).astype("f")),
    } | params
    tx = optax.chain(optax.trace(0.9), optax.scale_by_schedule(lambda count: 0.1))
    return State(jnp.int32(step), params, tx.init(params))


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert getattr(x, "dtype", type(x)) == getattr(y, "dtype", type(y))
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def saved(folder):
    """Two good checkpoints, of steps 4 and 8; the folder's path."""
    with Checkpointer(folder, best_metric=None) as c:
        for step in (4, 8):
            assert c.save(step, make_state(step), {"epoch": step / 4}, {})
    return folder


def data_file(step_folder):
    """The file with the array data: the largest one."""
    return max((p for p in step_folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path, *, at=0.5, count=16):
    content = bytearray(path.read_bytes())
    start = int(len(content) * at)
    for i in range(start, start + count):
        content[i] ^= 0xFF
    path.write_bytes(bytes(content))


def test_state_of_every_kind_of_leaf_comes_back_bit_for_bit(folder):
    nan_with_payload = np.array([0x7FC00001, 0x80000000], np.uint32).view(np.float32)
    state = make_state(
        3,
        half=jnp.arange(7, dtype=jnp.bfloat16),
        odd=jnp.asarray(nan_with_payload),
        flags=jnp.array([True, False, True]),
        unsigned=jnp.array([0, 2**32 - 1], jnp.uint32),
        empty=jnp.zeros((0, 5), jnp.bfloat16),
        scalar=jnp.float32(0.1),
    ).replace(
        method_state=((), {"none": None}, np.arange(4, dtype=np.float64) / 3),
        ema={"key": jax.random.key(7), "count": 5, "rate": 0.1},
    )
    meta = {"seed": 1, "list": [1, 2.5, None], "data": {"name": "digits"}}
    with Checkpointer(folder, best_metric=None) as c:
        assert c.restore(state) is None
        assert c.save(3, state, meta, {})
        restored = c.restore(state)
        assert restored.step == 3
        assert restored.meta == meta
        assert_identical(restored.state, state)
        assert c.metadata(3)["params"]["half"] == jax.ShapeDtypeStruct((7,), jnp.bfloat16)


def test_float64_state_comes_back(folder):
    with jax.enable_x64(True), Checkpointer(folder, best_metric=None) as c:
        state = {"w": jnp.linspace(0, 1, 11, dtype=jnp.float64), "n": jnp.int64(2**40)}
        c.save(1, state, {}, {})
        assert_identical(c.restore(abstract(state)).state, state)


def test_arrays_may_be_donated_while_the_save_runs(folder):
    state = {"w": jnp.arange(2.0**20)}
    before = np.array(state["w"])
    update = jax.jit(lambda t: jax.tree.map(lambda x: -x, t), donate_argnums=0)
    like = abstract(state)
    with Checkpointer(folder, best_metric=None) as c:
        c.save(1, state, {}, {})
        for _ in range(3):
            state = update(state)
        np.testing.assert_array_equal(c.restore(like).state["w"], before)


def test_newest_two_and_the_old_best_are_kept_also_over_restarts(folder):
    scores = {1: 0.3, 2: 0.9, 3: float("nan"), 4: None, 5: 0.7, 6: 0.8}
    for steps in ((1, 2, 3), (4, 5), (6,)):
        with Checkpointer(folder, best_metric="eval/mean/top1") as c:
            for step in steps:
                score = scores[step]
                metrics = {} if score is None else {"eval/mean/top1": score, "eval/loss": 9.0}
                assert c.save(step, make_state(step), {}, metrics)
                assert not c.save(step, make_state(step), {}, metrics)
            assert c.best_step() == 2
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"2", "5", "6"}
    with Checkpointer(folder, best_metric="eval/mean/top1", read_only=True) as c:
        assert c.all_steps() == [2, 5, 6]
        assert_identical(c.restore(make_state(0), step=c.best_step()).state, make_state(2))


def test_scores_that_come_late_are_remembered_by_the_next_save(folder):
    with Checkpointer(folder, best_metric="eval/mean/top1") as c:
        c.save(1, make_state(1), {}, {})
        assert c.best_step() is None
        c.scored(1, {"eval/mean/top1": 0.7})
        for step in (2, 3, 4):
            c.save(step, make_state(step), {}, {"eval/mean/top1": 0.5})
    with Checkpointer(folder, best_metric="eval/mean/top1", read_only=True) as c:
        assert c.all_steps() == [1, 3, 4]
        assert c.best_step() == 1


def test_checkpoints_without_metrics_are_never_best(folder, caplog):
    with Checkpointer(folder, best_metric="eval/mean/top1") as c:
        for step in (1, 2, 3):
            c.save(step, make_state(step), {}, {"eval/maen/top1": 0.5})
        assert c.best_step() is None
        c.wait()
        assert c.all_steps() == [2, 3]
    assert caplog.text.count("lack 'eval/mean/top1'") == 1


def flip_array_bytes(step_folder):
    flip(data_file(step_folder))


def truncate(step_folder):
    path = data_file(step_folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(step_folder):
    shutil.rmtree(step_folder)
    step_folder.mkdir()


def remove_meta(step_folder):
    shutil.rmtree(step_folder / "meta")


def remove_state(step_folder):
    shutil.rmtree(step_folder / "state")


def edit_meta(step_folder):
    path = step_folder / "meta" / "metadata"
    record = json.loads(path.read_text())
    record["epoch"] = 3
    path.write_text(json.dumps(record))


def garble_meta(step_folder):
    (step_folder / "meta" / "metadata").write_bytes(b"\x00" * 40)


@pytest.mark.parametrize(
    "damage",
    [flip_array_bytes, truncate, empty, remove_meta, remove_state, edit_meta, garble_meta],
)
def test_damaged_checkpoint_is_replaced_by_the_one_before(saved, caplog, damage):
    damage(saved / "8")
    with Checkpointer(saved, best_metric="eval/mean/top1") as c:
        with pytest.raises(CheckpointError, match="step 8"):
            c.restore(make_state(0), step=8)
        with caplog.at_level(logging.WARNING, logger="dfs_jax.training.checkpoint"):
            restored = c.restore(make_state(0))
        assert restored.step == 4
        assert restored.meta == {"epoch": 1.0}
        assert_identical(restored.state, make_state(4))
        ours = [r for r in caplog.records if r.name == "dfs_jax.training.checkpoint"]
        first = ours[0].getMessage()
        assert "step 8" in first
        assert "step 4" in first
        # The run goes on and saves step 8 once more.
        assert c.all_steps() == [4]
        assert c.save(8, make_state(8), {"epoch": 2.0}, {"eval/mean/top1": 0.5})
        assert c.restore(make_state(0)).step == 8
    assert (saved.parent / "checkpoints.damaged" / "8").is_dir()
    with Checkpointer(saved, best_metric="eval/mean/top1") as c:
        assert c.restore(make_state(0)).meta == {"epoch": 2.0}
        assert c.best_step() == 8


def test_deleted_checkpoint(saved):
    shutil.rmtree(saved / "8")
    with Checkpointer(saved, best_metric=None) as c:
        assert c.restore(make_state(0)).step == 4
        shutil.rmtree(saved / "4")
        assert c.restore(make_state(0)) is None
        with pytest.raises(CheckpointError, match="no checkpoint of step 4"):
            c.restore(make_state(0), step=4)


def test_every_checkpoint_damaged_is_an_error_and_nothing_is_touched(saved):
    flip_array_bytes(saved / "8")
    truncate(saved / "4")
    before = sorted(p for p in saved.rglob("*"))
    with (
        Checkpointer(saved, best_metric=None) as c,
        pytest.raises(CheckpointError, match=r"step 8.*step 4"),
    ):
        c.restore(make_state(0))
    assert sorted(p for p in saved.rglob("*")) == before


def test_read_only_leaves_a_damaged_checkpoint_where_it_is(saved):
    flip_array_bytes(saved / "8")
    stale = saved / "12.orbax-checkpoint-tmp"
    stale.mkdir()
    with Checkpointer(saved, best_metric=None, read_only=True) as c:
        assert c.restore(make_state(0)).step == 4
        assert not c.save(12, make_state(12), {}, {})
    assert (saved / "8").is_dir()
    assert stale.is_dir()
    with Checkpointer(saved.parent / "none", best_metric="x", read_only=True) as c:
        assert c.restore(make_state(0)) is None
    assert not (saved.parent / "none").exists()


def test_leftovers_of_a_killed_save_do_not_block_that_step(saved):
    shutil.copytree(saved / "8", saved / "12.orbax-checkpoint-tmp")
    with Checkpointer(saved, best_metric=None) as c:
        assert c.restore(make_state(0)).step == 8
        assert c.save(12, make_state(12), {}, {})
        assert_identical(c.restore(make_state(0)).state, make_state(12))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (make_state(0, extra=jnp.ones(1)), "lacks 'opt_state/0/trace/extra' and 1 others"),
        (make_state(0, bias=jnp.ones(25)), "another shape or dtype"),
        (make_state(0, bias=jnp.ones(24, jnp.bfloat16)), "another shape or dtype"),
        (make_state(0).replace(opt_state=()), "unasked for"),
    ],
)
def test_another_structure_is_not_taken_for_damage(saved, like, message):
    with Checkpointer(saved, best_metric=None) as c:
        with pytest.raises(CheckpointError, match=message):
            c.restore(like)
        assert c.all_steps() == [4, 8]


def test_reserved_meta_field_is_refused(folder):
    with (
        Checkpointer(folder, best_metric=None) as c,
        pytest.raises(ValueError, match="'digest'"),
    ):
        c.save(1, make_state(1), {"digest": 1}, {})


def one_device():
    return SingleDeviceSharding(jax.devices()[0])


def eight_devices(*spec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*spec))


@pytest.mark.parametrize("direction", ["8 to 1", "1 to 8"])
def test_restores_onto_another_number_of_devices(folder, direction):
    few = jax.tree.map(lambda x: jax.device_put(x, one_device()), make_state(1))
    many = jax.tree.map(lambda x: jax.device_put(x, eight_devices()), make_state(1))
    many.params["kernel"] = jax.device_put(many.params["kernel"], eight_devices(None, "data"))
    source, target = (many, few) if direction == "8 to 1" else (few, many)
    with Checkpointer(folder, best_metric=None) as c:
        c.save(1, source, {}, {})
        restored = c.restore(abstract(target)).state
    assert_identical(restored, target)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_shapes_without_shardings_go_to_one_device(folder):
    with Checkpointer(folder, best_metric=None) as c:
        c.save(1, jax.device_put(make_state(1), eight_devices()), {}, {})
        restored = c.restore(jax.eval_shape(lambda: make_state(1))).state
    assert_identical(restored, make_state(1))
    assert restored.params["bias"].sharding == one_device()


class TestStrangers:
    """What has the name of a step and is no checkpoint of it."""

    @pytest.mark.parametrize(
        ("make", "told"),
        [
            (lambda place: place.mkdir(), "step 90 .* is damaged .it is empty.; step 8 is used"),
            (lambda place: (place / "x").mkdir(parents=True), "it is empty"),
            (lambda place: place.write_text("notes"), "step 90 is now"),
            (lambda place: shutil.copytree(place.parent / "8", place), "it is a copy of step 8"),
        ],
        ids=["empty", "foreign", "file", "copy"],
    )
    def test_it_is_passed_over_and_makes_room(self, folder, make, told, caplog):
        state = make_state(8)
        with Checkpointer(folder, best_metric=None) as c:
            c.save(8, state, {"step": 8}, {})
        make(folder / "90")
        with Checkpointer(folder, best_metric=None, read_only=True) as c:
            assert c.restore(state).step == 8
        assert (folder / "90").exists()
        with Checkpointer(folder, best_metric=None) as c:
            assert c.restore(state).step == 8
            assert c.save(90, state, {"step": 90}, {})
            assert c.restore(state).step == 90
        assert re.search(told, caplog.text)
        assert (folder.parent / "checkpoints.damaged" / "90").exists()

    @pytest.mark.parametrize("name", ["90", "007", "٩", "90 (copy)", "notes"])
    def test_it_is_no_newest_step(self, saved, name):
        (saved / name).mkdir()
        (saved / "91").write_text("")
        assert newest_step(saved) == 8

    def test_where_there_is_nothing_else_a_run_begins(self, folder, caplog):
        (folder / "90").mkdir(parents=True)
        with Checkpointer(folder, best_metric=None, read_only=True) as c:
            assert c.restore(make_state(4)) is None
        with Checkpointer(folder, best_metric=None) as c:
            assert c.restore(make_state(4)) is None
            assert c.save(4, make_state(4), {}, {})
        assert "step 90 in" in caplog.text
        assert "is damaged (it is empty); none is used instead" in caplog.text
