"""What export puts into a bundle."""

import dataclasses
import io
import json
import zipfile

import bundles
import jax
import numpy as np
import pytest
from shapes import image

from dfs_jax.early_exit import export, stages
from dfs_jax.early_exit.bundle import EarlyExit
from dfs_jax.early_exit.router import Router
from dfs_jax.models import create_model
from dfs_jax.surgery import Surgery


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "dense.bundle"
    bundles.write(path)
    return path


def test_every_segment_and_exit_is_a_program_for_each_batch_size(bundle):
    with zipfile.ZipFile(bundle) as archive:
        names = set(archive.namelist())
        manifest = json.loads(archive.read("manifest.json"))
        weights = np.load(io.BytesIO(archive.read("weights.npz")))
    programs = {
        f"programs/{kind}{i}_batch{size}.stablehlo"
        for kind in ("segment", "exit")
        for i in (1, 2, 3)
        for size in bundles.SIZES
    }
    assert names == programs | {"manifest.json", "weights.npz"}
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
    assert manifest["made_by"]["jax"] == jax.__version__
    assert manifest["network"] == "dense"
    assert set(weights.files) == {f"layers/{i}/{k}" for i in range(3) for k in ("body", "head")}
    np.testing.assert_array_equal(
        weights["layers/1/body"], bundles.variables()["layers"][1]["body"]
    )
    segment = manifest["stages"][1]["segment"]
    assert segment["weights"] == ["layers/1/body"]
    assert segment["programs"]["4"]["inputs"] == [
        ["float32", [8, 8]],
        ["float32", [4, 8]],
        ["float32", [4, 30]],
    ]
    assert segment["programs"]["4"]["kept"] == [0, 1]  # what the first layer read is not used


def test_the_same_export_gives_the_same_bytes(bundle, tmp_path):
    bundles.write(tmp_path / "again.bundle")
    assert (tmp_path / "again.bundle").read_bytes() == bundle.read_bytes()


def test_nothing_of_the_exporting_machine_is_told(bundle):
    with zipfile.ZipFile(bundle) as archive:
        for name in archive.namelist():
            assert b".py" not in archive.read(name).replace(b".npy", b"")


def test_an_export_that_fails_leaves_the_old_file(bundle, tmp_path, monkeypatch):
    path = tmp_path / "old.bundle"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.replace", _full_disk)
    with pytest.raises(OSError, match="disk is full"):
        bundles.write(path)
    assert path.read_bytes() == b"old"


def _full_disk(*args):
    raise OSError(28, "disk is full")


def test_a_network_with_partitioned_features_gives_the_routers_answers(tmp_path):
    """MSDNet carries several scales, of which surgery cuts one."""
    network = create_model("msdnet_digits", num_classes=4, surgery=Surgery(), steps=(1, 1))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    variables = jax.tree.map(
        lambda leaf: rng.uniform(0.1, 1, leaf.shape).astype(leaf.dtype), shapes
    )
    parts = stages.from_network(network, variables, image(8, 8, 1))
    values = bundles.THRESHOLDS[1].values[1:]
    thresholds = bundles.Thresholds("max_softmax", values)
    preprocessing = bundles.Preprocessing((8, 8, 1), (0.5,), (0.5,))
    export.export(
        tmp_path / "b",
        parts,
        bundles.contents(
            costs=(1, 2), preprocessing=preprocessing, thresholds=thresholds, family=()
        ),
        (8,),
    )
    images = rng.standard_normal((8, 8, 8, 1)).astype(np.float32)
    given = np.stack([rng.random(8), np.ones(8)])
    router = Router(parts, (8, 8, 1), sizes=(8,))
    ours = EarlyExit.load(tmp_path / "b").router(images, thresholds, confidences=given)
    theirs = router(images, thresholds, confidences=given)
    assert set(ours.exits) == {0, 1}
    np.testing.assert_array_equal(ours.exits, theirs.exits)
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-5)


def test_the_command_refuses_before_it_reads_anything(capsys, tmp_path):
    assert export.main(["--workdir", str(tmp_path), "--out", "b", "--batch-size", "0"]) == 2
    assert "--batch-size must be at least 1, got 0" in capsys.readouterr().err
    assert export.main(["--workdir", str(tmp_path), "--out", "b"]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_thresholds_of_another_checkpoint_are_refused(tmp_path):
    chosen = bundles.THRESHOLDS[1]
    (tmp_path / "thresholds.json").write_text(json.dumps(chosen.to_json()))
    (tmp_path / "evaluation.json").write_text(json.dumps({"step": 10}))
    assert export._saved_thresholds(str(tmp_path), 10, 3) == chosen
    assert export._saved_thresholds(str(tmp_path / "none"), 10, 3) is None
    with pytest.raises(ValueError, match="belongs to step 10, but step 20 is exported"):
        export._saved_thresholds(str(tmp_path), 20, 3)
    (tmp_path / "thresholds.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be used"):
        export._saved_thresholds(str(tmp_path), 10, 3)


def test_thresholds_that_do_not_say_their_checkpoint(tmp_path):
    """As earlier versions wrote them: taken if they are those of the evaluation beside them."""
    chosen = bundles.THRESHOLDS[1]
    (tmp_path / "thresholds.json").write_text(json.dumps(chosen.to_json()))
    for evaluated, fine in (
        ({"step": 10, "chosen": {"thresholds": chosen.to_json()}}, True),
        ({"step": 10, "chosen": None}, False),
        ({"step": 10, "chosen": {"thresholds": bundles.THRESHOLDS[0].to_json()}}, False),
    ):
        (tmp_path / "evaluation.json").write_text(json.dumps(evaluated))
        if fine:
            assert export._saved_thresholds(str(tmp_path), 10, 3, "ab") == chosen
            continue
        with pytest.raises(ValueError, match="is of another evaluation; evaluate again: python -m"):
            export._saved_thresholds(str(tmp_path), 10, 3, "ab")
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(ValueError, match="cannot be used: "):
        export._saved_thresholds(str(tmp_path), 10, 3, "ab")
    # Those that say it need no evaluation.
    own = dataclasses.replace(chosen, step=10, weights="ab")
    (tmp_path / "thresholds.json").write_text(json.dumps(own.to_json()))
    assert export._saved_thresholds(str(tmp_path), 10, 3, "ab") == own
