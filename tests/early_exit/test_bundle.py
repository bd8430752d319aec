"""Bundles: the answers they give, on how little, and which files are refused with what words."""

import json
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import bundles
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dfs_jax
from dfs_jax.early_exit import bundle as format_
from dfs_jax.early_exit.bundle import BundleError, EarlyExit


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "dense.bundle"
    bundles.write(path)
    return path


@pytest.fixture(scope="module")
def early_exit(path):
    bundles.compiled_here()
    loaded = EarlyExit.load(path)
    loaded.warmup()
    return loaded


def test_answers_are_those_of_the_masked_network(early_exit):
    images = bundles.pixels(30)
    answers = early_exit(images)
    logits, exits = bundles.expected(images, bundles.THRESHOLDS[1].values)
    assert set(exits) == {0, 1, 2}
    np.testing.assert_array_equal(answers.exits, exits)
    np.testing.assert_allclose(answers.logits, logits, atol=1e-5, rtol=0)
    normalised = early_exit(early_exit.preprocessing.normalise(images))
    np.testing.assert_array_equal(normalised.logits, answers.logits)


def test_a_budget_chooses_the_thresholds(early_exit):
    images = bundles.pixels(9)
    assert set(early_exit(images, budget=120.0).exits) == {0}
    assert set(early_exit(images, budget=1e6).exits) == {2}
    with pytest.raises(ValueError, match="the cheapest cost 100"):
        early_exit(images, budget=50.0)


def test_serving_shares_batches(early_exit):
    requests = [bundles.pixels(count, seed=count) for count in (3, 0, 7, 1)]
    for images, answers in zip(requests, early_exit.serve(requests, budget=200.0), strict=True):
        logits, exits = bundles.expected(images, bundles.THRESHOLDS[1].values)
        np.testing.assert_array_equal(answers.exits, exits)
        np.testing.assert_allclose(answers.logits, logits, atol=1e-5, rtol=0)


def test_nothing_is_compiled_after_warmup(early_exit):
    before = bundles.compiled_here()
    assert before > 0
    for count in (0, 1, 2, 4, 5, 11):
        early_exit(bundles.pixels(count))
    assert bundles.compiled_here() == before


def test_images_of_another_type_are_refused(early_exit):
    with pytest.raises(ValueError, match="uint8"):
        early_exit(bundles.pixels(2).astype(np.float64))


def test_jax_and_numpy_are_enough(path, tmp_path):
    """In a Python that has nothing else to import: jax, what it requires, and this package."""
    import jax

    installed = Path(jax.__file__).parents[1]
    for name in ("jax", "jaxlib", "numpy", "numpy.libs", "ml_dtypes", "opt_einsum", "scipy"):
        if (installed / name).exists():
            (tmp_path / name).symlink_to(installed / name)
    if (installed / "scipy.libs").exists():
        (tmp_path / "scipy.libs").symlink_to(installed / "scipy.libs")
    (tmp_path / "dfs_jax").symlink_to(Path(dfs_jax.__file__).parent)
    images = bundles.pixels(6)
    np.save(tmp_path / "images.npy", images)
    script = f"""
        import sys
        sys.path.append({str(tmp_path)!r})
        import numpy as np
        from dfs_jax.early_exit.bundle import EarlyExit
        answers = EarlyExit.load({str(path)!r})(np.load({str(tmp_path / "images.npy")!r}))
        np.savez({str(tmp_path / "answers.npz")!r}, logits=answers.logits, exits=answers.exits)
        print(*sorted({{name.split(".")[0] for name in sys.modules}}))
    """
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not {"flax", "tensorflow", "flatbuffers", "ml_collections"} & set(result.stdout.split())
    with np.load(tmp_path / "answers.npz") as answers:
        logits, exits = bundles.expected(images, bundles.THRESHOLDS[1].values)
        np.testing.assert_array_equal(answers["exits"], exits)
        np.testing.assert_allclose(answers["logits"], logits, atol=1e-5, rtol=0)


# Damaged and foreign files.


def refusal(path) -> str:
    with pytest.raises(BundleError) as error:
        EarlyExit.load(path)
    assert str(error.value).startswith(f"{path} ")
    return str(error.value).removeprefix(f"{path} ")


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(path, tmp_path_factory, place, bit):
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    damaged = tmp_path_factory.getbasetemp() / "flipped"
    damaged.write_bytes(data)
    refusal(damaged)


@settings(max_examples=30, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_noticed(path, tmp_path_factory, place):
    data = path.read_bytes()
    damaged = tmp_path_factory.getbasetemp() / "truncated"
    damaged.write_bytes(data[: int(place * len(data))])
    # The weights are a zip file of their own, and zipfile puts up with half a comment.
    assert re.search("not the whole of|cut off", refusal(damaged))


def test_the_damaged_member_is_named(path, tmp_path):
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        for name in ("weights.npz", "programs/exit2_batch4.stablehlo", "manifest.json"):
            info = archive.getinfo(name)
            flipped = data.copy()
            flipped[info.header_offset + 30 + len(name) + info.compress_size // 2] ^= 1
            (tmp_path / "b").write_bytes(flipped)
            assert f"has a damaged member {name}" in refusal(tmp_path / "b")


def repacked(path, target, *, without=(), changes=None, comment=True):
    """The bundle with members left out or changed, under a whole seal if `comment`."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members = {name: c for name, c in members.items() if name not in without} | (changes or {})
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.comment = bytes(71) if comment else b""
    if comment:
        body = target.read_bytes()[:-71]
        target.write_bytes(body + format_._seal(body))
    return target


def manifest_of(path) -> dict:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("manifest.json"))


def with_manifest(path, target, **fields):
    text = json.dumps({**manifest_of(path), **fields})
    return repacked(path, target, changes={"manifest.json": text})


def test_members_must_be_those_of_the_manifest(path, tmp_path):
    target, program = tmp_path / "b", "programs/segment1_batch1.stablehlo"
    assert refusal(repacked(path, target, without=[program])) == f"lacks its member {program}"
    assert "has a member x.txt that" in refusal(repacked(path, target, changes={"x.txt": "x"}))
    assert refusal(repacked(path, target, changes={program: b"other"})) == (
        f"has a damaged member {program}: its SHA-256 differs"
    )
    assert "no manifest.json" in refusal(repacked(path, target, without=["manifest.json"]))
    assert "packed anew" in refusal(repacked(path, target, comment=False))
    EarlyExit.load(repacked(path, target))  # the helper itself harms nothing


def test_foreign_files_are_refused(path, tmp_path):
    target = tmp_path / "b"
    assert "cannot be read: No such file" in refusal(tmp_path / "none")
    target.write_text("no zip file at all")
    assert "is not a zip file" in refusal(target)
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("a.txt", "a")
    assert "it has no manifest.json" in refusal(target)
    assert "format 'other'" in refusal(with_manifest(path, target, format="other"))
    assert refusal(with_manifest(path, target, version=2)) == (
        "has format version 2; this dfs_jax reads 1"
    )
    assert "damaged manifest.json" in refusal(
        repacked(path, target, changes={"manifest.json": "[]"})
    )
    convention = with_manifest(path, target, calling_convention_version=99)
    assert "calling convention 99; jax" in refusal(convention)
    assert "JAX_ENABLE_X64=1" in refusal(with_manifest(path, target, x64=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("labels", None),
        ("thresholds", {"confidence": "max_softmax"}),
        ("batch_sizes", [1, 2]),
        ("stages", [{}]),
        ("preprocessing", {"side": 3}),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(path, tmp_path, field, value):
    assert "manifest.json that cannot be used" in refusal(
        with_manifest(path, tmp_path / "b", **{field: value})
    )
