"""A bundle as ONNX files: refusals, what is rewritten for the converter, and the files themselves.

The last test converts for real. jax2onnx has an environment of its own (docs/early_exit.md), whose
python the variable DFS_JAX_ONNX_PYTHON names; without it that test is skipped.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import bundles
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax import lax
from shapes import image

from dfs_jax.early_exit import export, onnx, stages
from dfs_jax.early_exit.budget import ALWAYS
from dfs_jax.early_exit.bundle import EarlyExit
from dfs_jax.models import create_model
from dfs_jax.surgery import Surgery
from dfs_jax.training.run import create_network

ROOT = Path(__file__).parents[2]
IMAGE = (8, 8, 1)
VGG = ("vgg7_cifar100", {"widths": ((4, 3),), "collaboration": True}, {"referencing": False})
BOOSTED = ("vgg7_cifar100", {"widths": ((4, 3),), "boosting": 0.5}, {"referencing": False})


def network(name, options, surgery):
    """The module and variables of random values, statistics included."""
    module = create_model(name, num_classes=4, surgery=Surgery(**surgery), **options)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, *IMAGE), np.float32))
    rng = np.random.default_rng(0)
    values = lambda leaf: rng.uniform(0.1, 0.6, leaf.shape).astype(leaf.dtype)  # noqa: E731
    return module, jax.tree.map(values, shapes)


def write(path, name, options, surgery, about=None):
    """A bundle of this network, for batches of 1 and 4; returns the module and its variables."""
    module, variables = network(name, options, surgery)
    parts = stages.from_network(module, variables, image(*IMAGE))
    told = {"network": name, "options": options, "surgery": surgery, "precision": "float32"}
    contents = bundles.contents(
        costs=tuple(range(1, len(parts) + 1)),
        preprocessing=bundles.Preprocessing(IMAGE, (0.5,), (0.5,)),
        thresholds=bundles.Thresholds("max_softmax", (0.5,) * (len(parts) - 1) + (ALWAYS,)),
        family=(),
        about={**told, **(about or {})},
    )
    export.export(path, parts, contents, (1, 4))
    return module, variables


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "vgg.bundle"
    write(path, *VGG)
    return path


@pytest.fixture(scope="module", params=[VGG, BOOSTED], ids=["collaboration", "boosting"])
def loaded(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("loaded") / "vgg.bundle"
    write(path, *request.param)
    return EarlyExit.load(path)


def images(count):
    return np.random.default_rng(1).standard_normal((count, *IMAGE)).astype(np.float32)


# Refusals.


@pytest.fixture
def with_tools(monkeypatch):
    """As if the converter were there: what is refused before it is used can be tested."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def refusal(capsys, tmp_path, bundle, *words):
    """What the command says, given that it refuses and writes nothing."""
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--bundle", str(bundle), "--out", str(tmp_path / "new"), *words]
    assert onnx.main(arguments) == 2
    assert sorted(tmp_path.rglob("*")) == before
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_without_the_converter_it_says_how_to_install_it_apart(capsys, tmp_path, vgg, monkeypatch):
    there = lambda name: None if name == "jax2onnx" else object()  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", there)
    told = refusal(capsys, tmp_path, vgg)
    assert f"jax2onnx cannot be imported by {sys.executable}" in told
    assert "python -m venv onnx-env" in told
    assert "onnx-env/bin/pip install jax2onnx onnxruntime" in told
    assert "--no-deps" in told


@pytest.mark.usefixtures("with_tools")
def test_a_bundle_that_cannot_be_converted_is_refused(capsys, tmp_path, vgg):
    path = tmp_path / "other.bundle"
    path.write_bytes(vgg.read_bytes()[:-9])
    assert "other.bundle is damaged, cut off" in refusal(capsys, tmp_path, path)
    bundles.write(path)
    told = refusal(capsys, tmp_path, path)
    assert "does not say how its network was built (it has no 'precision'); export it" in told
    assert "must be a positive number" in refusal(capsys, tmp_path, vgg, "--tolerance", "nan")


@pytest.mark.usefixtures("with_tools")
@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"precision": "bfloat16"}, "computes in bfloat16; ONNX files are made of float32"),
        ({"network": "vgg8"}, "unknown network 'vgg8'"),
        ({"options": {"widths": ((4, 5),)}}, "norms_1/mean of shape (3,), not (5,)"),
        ({"options": {"widths": ((4,),)}}, "which the network it names does not have"),
    ],
)
def test_another_network_than_the_bundles_is_refused(capsys, tmp_path, about, reason):
    path = tmp_path / "other.bundle"
    write(path, "vgg7_cifar100", {"widths": ((4, 3),)}, {}, about)
    told = refusal(capsys, tmp_path, path)
    assert told.startswith(f"error: --bundle: {path} ")
    assert reason in told


def test_a_directory_with_something_in_it_is_left_alone(capsys, tmp_path, vgg):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").write_text("precious")
    assert "is there already; name a new directory" in refusal(capsys, tmp_path, vgg)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "disk is full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk is full"):
        onnx._write(str(tmp_path / "new"), {"segment1": b"model"}, {})
    assert not list(tmp_path.iterdir())


# What the converter is given.


@pytest.mark.parametrize("config", [tiny_run.config(), tiny_run.config(network=())])
def test_the_export_tells_all_that_makes_the_network(config):
    told = json.loads(json.dumps({"labels": ["a", "b"], **export._network(config)}))
    assert onnx.network(told) == create_network(config, num_classes=2)


def test_the_network_built_anew_answers_like_the_bundle(loaded):
    anew = onnx.rebuilt(loaded)
    assert len(anew) == 2
    ours = theirs = (jnp.asarray(images(4)),)
    for a, b in zip(anew, loaded.stages, strict=True):
        ours, our_logits = a.run(a.weights, ours)
        theirs, their_logits = b.run(b.weights, theirs)
        assert np.ptp(their_logits) > 0.1
        np.testing.assert_allclose(our_logits, their_logits, rtol=1e-5, atol=1e-5)


def operations(closed):
    """Names of all operations of a traced function, with the rank of their first operand."""
    found = set()
    for equation in closed.jaxpr.eqns:
        found.add((equation.primitive.name, len(equation.outvars[0].aval.shape)))
        for value in equation.params.values():
            inner = value if isinstance(value, tuple | list) else [value]
            for each in inner:
                if hasattr(each, "jaxpr"):
                    found |= operations(each)
    return found


def test_no_calls_pads_and_wide_windows_are_left_for_any_batch_size(loaded):
    (batch,) = jax.export.symbolic_shape("batch")
    aval = jax.ShapeDtypeStruct((batch, *IMAGE), jnp.float32)
    segment = onnx.rebuilt(loaded)[0].segment
    last = onnx.rebuilt(loaded)[1].segment
    before, after = set(), set()
    given = (aval,)
    for program in (segment, last):
        call = lambda *a, p=program: p.call(p.weights, a)  # noqa: E731
        closed, results = jax.make_jaxpr(call, return_shape=True)(*given)
        before |= operations(closed)
        after |= operations(jax.make_jaxpr(onnx.plain(closed))(*given))
        given = (results[0], jax.ShapeDtypeStruct((batch, 4), jnp.float32))
    unwanted = {"jit", "custom_vjp_call", "custom_jvp_call", "cond", "platform_index", "pad"}
    assert {"jit", "pad"} <= {name for name, _ in before}
    assert not unwanted & {name for name, _ in after}
    assert ("reduce_window_max", 4) in before
    assert {rank for name, rank in after if name == "reduce_window_max"} == {3}


def pooled(window, strides, padding):
    def pool(x):
        sizes = [(1, *pair, 1) for pair in (window, strides)]
        edges = ((0, 0), *padding, (0, 0))
        return lax.reduce_window(x, -jnp.inf, lax.max, *sizes, edges)

    return pool


@pytest.mark.parametrize(
    "function",
    [
        pooled((3, 2), (2, 1), ((1, 1), (0, 1))),
        pooled((2, 2), (2, 2), ((0, 0), (0, 0))),
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 1, 1, 1), (1, 1, 1, 1), "VALID"),
        lambda x: lax.pad(x, 2.0, [(0, 0, 0), (1, 0, 0), (0, 3, 0), (2, 1, 0)]),
        lambda x: lax.pad(x, 2.0, [(0, 0, 0), (-1, 0, 0), (0, 0, 1), (0, 0, 0)]),
        lambda x: lax.platform_dependent(x, tpu=jnp.sin, default=jnp.cos),
        lambda x: (jax.nn.relu(x), jax.jit(lambda y: (y, y + 1.0))(x)),
        lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
    ],
)
def test_what_is_rewritten_gives_the_same(function):
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 6, 5, 3)), jnp.float32)
    ours = onnx.plain(jax.make_jaxpr(function)(x))(x)
    for a, b in zip(ours, jax.tree.leaves(function(x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# The check of what was converted.


def functions(loaded):
    """What a faithful converter would make."""
    return {
        f"{kind}{i}": lambda *a, p=program: [np.asarray(x) for x in p.call(p.weights, a)]
        for i, stage in enumerate(loaded.stages, 1)
        for kind, program in (("segment", stage.segment), ("exit", stage.head))
    }


def test_differences_are_told_where_they_arise(loaded):
    found = onnx.differences(loaded.stages, functions(loaded), images(4))
    assert [(d.file, d.greatest) for d in found] == [
        (f"{kind}{i}", 0.0) for i in (1, 2) for kind in ("segment", "exit")
    ]
    others = functions(loaded)
    honest = others["exit1"]
    others["exit1"] = lambda *a: [honest(*a)[0] + np.float32(0.25)]
    told = {d.file: d for d in onnx.differences(loaded.stages, others, images(4))}
    assert told["segment1"].greatest == 0
    assert told["exit1"].greatest == pytest.approx(0.25, abs=1e-5)
    logits = honest(*functions(loaded)["segment1"](images(4))[loaded.stages[0].carried :])[0]
    largest = max(1, np.abs(logits).max())
    assert told["exit1"].relative == pytest.approx(0.25 / largest, rel=1e-4)
    assert told["exit2"].greatest > 0  # which sees what exit 1 answered


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x + 0.01,
        lambda x: x * np.nan,
        lambda x: x[:, :1],
        lambda x: x.astype(np.float64),
    ],
)
def test_a_file_that_answers_differently_is_refused(loaded, monkeypatch, spoil):
    others = functions(loaded)
    honest = others["exit2"]
    names = dict.fromkeys(others, b"model")
    monkeypatch.setattr(onnx, "session", lambda name, model: others[name])
    assert onnx._checked(loaded, names, 1e-4) == dict.fromkeys(names, 0.0)
    others["exit2"] = lambda *a: [spoil(honest(*a)[0])]
    with pytest.raises(ValueError, match=r"and its exit2\.onnx answer differently"):
        onnx._checked(loaded, names, 1e-4)


class Runtime:
    """onnxruntime, for which no model is good enough."""

    __version__ = "1.0"

    @staticmethod
    def InferenceSession(model, providers):
        raise RuntimeError("no such operation: Fold\nin node 3")


def test_a_file_that_does_not_run_is_refused(loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", Runtime)
    told = r"^and onnxruntime 1\.0 fails at its segment1\.onnx: no such operation: Fold$"
    with pytest.raises(ValueError, match=told):
        onnx._checked(loaded, dict.fromkeys(functions(loaded), b"model"), 1e-4)


# For real.

RUN = """
import json, sys
import numpy as np, onnxruntime
folder, images, answers = sys.argv[1:]
manifest = json.load(open(f"{folder}/manifest.json"))
arrays, logits = [np.load(images)], []
for stage in manifest["stages"]:
    def run(entry, arrays):
        names = [value["name"] for value in entry["inputs"]]
        session = onnxruntime.InferenceSession(f"{folder}/{entry['file']}")
        assert [x.name for x in session.get_outputs()] == [x["name"] for x in entry["outputs"]]
        return session.run(None, dict(zip(names, arrays, strict=True)))
    arrays = run(stage["segment"], arrays)
    logits += run(stage["exit"], arrays[stage["carried"]:])
    arrays = arrays[:stage["carried"]] + logits[-1:] * stage["tells"]
np.save(answers, np.stack(logits))
"""

PYTHON = (
    sys.executable
    if importlib.util.find_spec("jax2onnx")
    else os.environ.get("DFS_JAX_ONNX_PYTHON")
)


@pytest.mark.skipif(
    PYTHON is None,
    reason="needs jax2onnx: DFS_JAX_ONNX_PYTHON names the python of an environment that has it",
)
@pytest.mark.parametrize(
    "chosen",
    [
        VGG,
        BOOSTED,
        ("msdnet_digits", {"steps": (1, 1)}, {"exit_gradient": "all"}),
        ("resnet18_cifar100", {"width": 4}, {}),
        ("vit_tiny_patch16", {"depth": 2, "patch_size": 4, "first_exit": 1}, {}),
    ],
    ids=lambda chosen: chosen[0],
)
def test_the_files_answer_like_the_network(tmp_path, chosen):
    """For batches that neither the bundle nor the check of the command has seen."""
    module, variables = write(tmp_path / "bundle", *chosen)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}

    def run(*words):
        done = subprocess.run([PYTHON, *map(str, words)], env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    command = ("-m", "dfs_jax.early_exit.onnx", "--bundle", tmp_path / "bundle")
    table = run(*command, "--out", tmp_path / "onnx")
    manifest = json.loads((tmp_path / "onnx" / "manifest.json").read_text())
    assert manifest["labels"] == ["bat", "cat", "cow", "dog"]
    files = {s[kind]["file"] for s in manifest["stages"] for kind in ("segment", "exit")}
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == files | {"manifest.json"}
    assert all(f"{file} " in table for file in files)
    for count in (3, 5):
        np.save(tmp_path / "images.npy", images(count))
        run("-c", RUN, tmp_path / "onnx", tmp_path / "images.npy", tmp_path / "answers.npy")
        expected = np.stack(module.apply(variables, images(count), train=False).logits)
        answers = np.load(tmp_path / "answers.npy")
        np.testing.assert_allclose(answers, expected, rtol=1e-4, atol=1e-4)
