"""Whether weights may know what is held out: the runs that a run descends from."""

import shutil

import pytest

from dfs_jax import config as configuration
from dfs_jax.data.record import Record
from dfs_jax.training import lineage
from dfs_jax.training import workdir as workdirs


@pytest.fixture
def run(tmp_path):
    """Makes a workdir of the data fields given, started from another one or not."""

    def make(folder, *, init_from=None, held_out=None, **data):
        config = configuration.default()
        config.train.init_from = init_from and str(tmp_path / init_from)
        config.data.update(data)
        noted = None if held_out is None else Record(held_out=held_out)
        workdirs.create(config, str(tmp_path / folder), noted)
        return config, str(tmp_path / folder)

    return make


def test_a_run_of_its_own_is_honest(run):
    assert lineage.warning(*run("own", validation_size=240)) == ""


@pytest.mark.parametrize(
    ("theirs", "ours", "doubtful"),
    [
        ({"validation_size": 0}, {"validation_size": 240}, True),
        ({"validation_size": 100}, {"validation_size": 240}, True),
        ({"validation_size": -1}, {"validation_size": 240}, True),
        ({"validation_size": 240}, {"validation_size": 240}, False),
        ({"validation_size": 500}, {"validation_size": 240}, False),
        ({"validation_size": 0}, {"validation_size": -1}, False),
        ({"validation_size": 0, "name": "cifar10"}, {"validation_size": 240}, False),
        ({"validation_size": 240, "seed": 3}, {"validation_size": 240}, False),  # of the order only
    ],
)
def test_a_run_that_another_began(run, theirs, ours, doubtful):
    run("first", **theirs)
    found = lineage.warning(*run("second", init_from="first", **ours))
    assert bool(found) == doubtful
    if doubtful:
        assert "first, which held out other images" in found
        assert f"data.validation_size={theirs['validation_size']}" in found


def test_held_out_files_are_compared_by_name(run):
    first = {"test": ["cat/1.png"], "validation": ["cat/2.png", "dog/1.png"]}
    run("first", validation_size=2, held_out=first)
    for folder, names, doubtful in (
        ("same", ["cat/1.png", "dog/1.png"], False),
        ("other", ["cat/2.png", "cat/9.png"], True),
    ):
        own = {"test": [], "validation": names}
        second = run(folder, init_from="first", validation_size=2, held_out=own)
        assert bool(lineage.warning(*second)) == doubtful
    run("before", validation_size=2)  # which noted none, and chose them by another rule
    assert lineage.warning(*run("third", init_from="before", validation_size=2, held_out=first))


def test_every_ancestor_counts(run, tmp_path):
    run("first", validation_size=0)
    run("second", init_from="first")
    assert "first, which held out" in lineage.warning(*run("third", init_from="second"))
    shutil.rmtree(tmp_path / "first")
    told = lineage.warning(*run("third", init_from="second"))
    assert "first, which cannot be read, so it is not known whether they were trained" in told


def test_a_circle_of_runs_ends(run):
    run("first", init_from="second")
    assert lineage.warning(*run("second", init_from="first")) == ""


def test_weights_from_elsewhere_are_unknown(run, tmp_path):
    _, workdir = run("imported")
    lineage.record_origin(workdir, "official.pth")
    told = lineage.warning(*run("imported"))
    assert "weights of official.pth, which were trained elsewhere, so it is not known" in told
    assert "official.pth" in lineage.warning(*run("second", init_from="imported"))
    (tmp_path / "imported" / "origin.json").write_text("{")
    assert "an unknown file" in lineage.warning(*run("imported"))


def test_what_was_imported_before_it_was_noted(run, tmp_path):
    """Training never saves step 0."""
    found = run("imported")
    (tmp_path / "imported" / "checkpoints" / "0").mkdir(parents=True)
    assert "an unknown file, which were trained elsewhere" in lineage.warning(*found)
