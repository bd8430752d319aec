"""An exported bundle as ONNX files, one per segment and one per exit; own command.

    python -m dfs_jax.early_exit.onnx --bundle BUNDLE --out DIR [--tolerance T]

DIR gets segment1.onnx, exit1.onnx, … and manifest.json: thresholds, labels, costs, preprocessing,
and for each file its inputs and outputs, its SHA-256 and how far its answers are from the bundle's.
A file takes and returns the arrays of the bundle's program in their order, float32, channels last
as JAX has them, for any batch size. Before anything is written every file has been run by
onnxruntime, segment after segment, against the programs of the bundle.

jax2onnx, which converts, cannot be installed beside what trains here (docs/early_exit.md says why
and how else). So this module needs neither Orbax nor TensorFlow: it builds the network anew
from the bundle's manifest and takes the weights from the bundle.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jax_core
import jax.numpy as jnp
import numpy as np

from dfs_jax.early_exit import bundle
from dfs_jax.early_exit.stages import Arrays, Program, Stage, from_network, named_weights

FORMAT, VERSION = "dfs_jax early exit onnx", 1
TOOLS = ("jax2onnx", "onnx", "onnxruntime")

Function = Callable[..., Sequence[Any]]  # arrays -> arrays


class Difference(NamedTuple):
    """How far the answers of one file are from those of the bundle."""

    file: str  # without its ending
    greatest: float  # absolute difference
    relative: float  # the greatest over max(1, largest value of that array)


def network(manifest: Mapping[str, Any]) -> Any:
    """The network that a bundle with this manifest was exported from.

    Raises ValueError if the manifest does not say, or if it does not compute in float32.
    """
    from dfs_jax import models
    from dfs_jax.surgery import Surgery

    try:
        name, precision = manifest["network"], manifest["precision"]
        options = {key: bundle.tupled(value) for key, value in manifest["options"].items()}
        surgery = Surgery(**manifest["surgery"])
    except KeyError as error:
        raise ValueError(
            f"does not say how its network was built (it has no {error}); export it again"
        ) from error
    if precision != "float32":
        raise ValueError(f"computes in {precision}; ONNX files are made of float32 networks only")
    classes = len(manifest["labels"])
    return models.create_model(name, num_classes=classes, surgery=surgery, **options)


def rebuilt(early_exit: bundle.EarlyExit) -> tuple[Stage, ...]:
    """The bundle's stages traced anew: its programs are StableHLO, which jax2onnx does not take.

    Raises ValueError as `network` does, and for weights that are not that network's.
    """
    module = network(early_exit.manifest)
    images = jax.ShapeDtypeStruct((1, *early_exit.preprocessing.image_shape), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    variables = _filled(shapes, named_weights(early_exit.stages))
    return from_network(module, variables, images)


def _filled(shapes: Any, weights: Mapping[str, np.ndarray]) -> Any:
    """The tree `shapes` with `weights` at their names; a bundle lacks those that nothing reads."""
    missing = dict(weights)

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        weight = missing.pop(name, None)
        if weight is None:
            return np.zeros(leaf.shape, leaf.dtype)
        if weight.shape != leaf.shape:
            raise ValueError(f"has a weight {name} of shape {weight.shape}, not {leaf.shape}")
        return weight

    variables = jax.tree_util.tree_map_with_path(fill, shapes)
    if missing:
        raise ValueError(f"has a weight {min(missing)}, which the network it names does not have")
    return variables


def plain(closed: jax_core.ClosedJaxpr) -> Function:
    """The traced function `closed` in operations that jax2onnx converts, of equal results.

    Calls are inlined, so that nothing is left of derivatives and of names on layers; where
    platforms differ, the default is taken. Two operations are written otherwise, for what
    jax2onnx 0.17 makes of them: a `pad` fails for an open batch size, and a pooling over
    (B, H, W, C) becomes a MaxPool in four dimensions, which onnxruntime does not have.
    """

    def run(*arguments: Any) -> list[Any]:
        values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        values.update(zip(closed.jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jax_core.Literal) else values[atom]

        for equation in closed.jaxpr.eqns:
            name, inputs = equation.primitive.name, list(map(read, equation.invars))
            if name in _CALLS:
                results = plain(equation.params[_CALLS[name]])(*inputs)
            elif name == "cond" and equation.params.get("branches_platforms"):
                results = plain(equation.params["branches"][-1])(*inputs[1:])
            elif name in _REWRITTEN:
                results = [_REWRITTEN[name](*inputs, **equation.params)]
            else:
                results = equation.primitive.bind(*inputs, **equation.params)
                results = results if equation.primitive.multiple_results else [results]
            values.update(zip(equation.outvars, results, strict=True))
        return list(map(read, closed.jaxpr.outvars))

    return run


def _pad(x: jax.Array, value: jax.Array, *, padding_config: Any) -> jax.Array:
    for axis, (low, high, inner) in enumerate(padding_config):
        if inner or min(low, high) < 0:
            return jax.lax.pad(x, value, padding_config)
        before, after = (
            [jnp.broadcast_to(value, (*x.shape[:axis], width, *x.shape[axis + 1 :]))] * bool(width)
            for width in (low, high)
        )
        x = jnp.concatenate([*before, x, *after], axis) if low or high else x
    return x


def _max_pool(x: jax.Array, **window: Any) -> jax.Array:
    """A pooling over (B, H, W, C) as one over (B·C, H, W); any other as it is."""
    dilations = (*window["base_dilation"], *window["window_dilation"])
    outer = [window[k][i] for k in ("window_dimensions", "window_strides") for i in (0, -1)]
    if x.ndim != 4 or set(dilations) != {1} or set(outer) != {1}:
        return jax.lax.reduce_window_max_p.bind(x, **window)
    batch, height, width, channels = x.shape
    x = jnp.transpose(x, (0, 3, 1, 2)).reshape(batch * channels, height, width)
    fewer = {name: tuple(values[:3]) for name, values in window.items()}
    x = jax.lax.reduce_window_max_p.bind(x, **fewer)
    return jnp.transpose(x.reshape(batch, channels, *x.shape[1:]), (0, 2, 3, 1))


_CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
_REWRITTEN = {
    "pad": _pad,
    "platform_index": lambda **platforms: 0,  # nothing reads it any more
    "reduce_window_max": _max_pool,
}


def convert(stages: Sequence[Stage], image_shape: tuple[int, int, int]) -> dict[str, bytes]:
    """The ONNX model of every segment and exit by name (segment1, exit1, …), any batch size.

    Inputs are called input0, input1, …, outputs output0, output1, …. Raises ValueError for an
    operation that jax2onnx does not convert.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    avals: Sequence[Any] = (jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32),)
    models = {}
    for i, stage in enumerate(stages, 1):
        models[f"segment{i}"], results = _converted(f"segment{i}", stage.segment, avals)
        models[f"exit{i}"], logits = _converted(f"exit{i}", stage.head, results[stage.carried :])
        avals = stage.onwards(results, logits)
    return models


def _converted(name: str, program: Program, avals: Sequence[Any]) -> tuple[bytes, Sequence[Any]]:
    """The model of `program`, and the shapes that it returns."""
    import jax2onnx
    import onnx

    def call(*arguments: jax.Array) -> Arrays:
        return program.call(program.weights, arguments)

    closed, results = jax.make_jaxpr(call, return_shape=True)(*avals)
    tool = f"jax2onnx {importlib.metadata.version('jax2onnx')}"
    with _told(f"cannot be converted: {tool} fails at {name}"):
        model = jax2onnx.to_onnx(
            plain(closed),
            avals,
            model_name=name,
            input_names=[f"input{k}" for k in range(len(avals))],
        )
        _name_outputs(model)
        onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(), results


def _name_outputs(model: Any) -> None:
    """Give every output a name of its own: an array may be returned twice, or be an input."""
    import onnx

    for k, output in enumerate(model.graph.output):
        name = f"output{k}"
        model.graph.node.append(onnx.helper.make_node("Identity", [output.name], [name]))
        output.name = name


def session(name: str, model: bytes) -> Function:
    """`model` run by onnxruntime on the CPU. Raises ValueError, now or when called, if it fails."""
    import onnxruntime

    told = f"and onnxruntime {onnxruntime.__version__} fails at its {name}.onnx"
    with _told(told):
        runtime = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [given.name for given in runtime.get_inputs()]

    def run(*arguments: Any) -> Sequence[np.ndarray]:
        given = dict(zip(names, map(np.asarray, arguments), strict=True))
        with _told(told):
            return runtime.run(None, given)

    return run


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Whatever a tool raises, as a ValueError with `what` and the first line of the tool's."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{what}: {reason}") from error


def differences(
    stages: Sequence[Stage], functions: Mapping[str, Function], images: np.ndarray
) -> list[Difference]:
    """How far `functions`, by the names of `convert`, are from `stages` on images (B, H, W, C).

    Each chain goes on from what it computed itself, as in service: what a file gets wrong is
    seen there and may be seen in the deeper ones.
    """
    found = []
    ours: Arrays = (jnp.asarray(images),)
    theirs: Sequence[Any] = (images,)
    for i, stage in enumerate(stages, 1):
        expected = stage.segment.call(stage.segment.weights, ours)
        results = functions[f"segment{i}"](*theirs)
        found.append(_difference(f"segment{i}", expected, results))
        expected_logits = stage.head.call(stage.head.weights, expected[stage.carried :])
        logits = functions[f"exit{i}"](*results[stage.carried :])
        found.append(_difference(f"exit{i}", expected_logits, logits))
        ours = stage.onwards(expected, expected_logits)
        theirs = stage.onwards(results, logits)
    return found


def _difference(file: str, expected: Sequence[Any], given: Sequence[Any]) -> Difference:
    greatest, relative = 0.0, 0.0
    for ours, theirs in zip(map(np.asarray, expected), given, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return Difference(file, np.inf, np.inf)
        apart = np.max(np.abs(ours - theirs), initial=0.0)
        # np.maximum, not max: a NaN has to stay.
        greatest = float(np.maximum(greatest, apart))
        scale = np.maximum(1.0, np.max(np.abs(ours), initial=0.0))
        relative = float(np.maximum(relative, apart / scale))
    return Difference(file, greatest, relative)


def _checked(
    early_exit: bundle.EarlyExit, models: Mapping[str, bytes], tolerance: float
) -> dict[str, float]:
    """The greatest difference of each file on random images, at the bundle's extreme batch sizes.

    Raises ValueError naming the first file that is off by more than `tolerance`.
    """
    functions = {name: session(name, model) for name, model in models.items()}
    rng, greatest = np.random.default_rng(0), dict.fromkeys(models, 0.0)
    for size in sorted({early_exit.router.sizes[0], early_exit.router.sizes[-1]}):
        shape = (size, *early_exit.preprocessing.image_shape)
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        images = early_exit.preprocessing.normalise(pixels)
        for difference in differences(early_exit.stages, functions, images):
            if not difference.relative <= tolerance:
                raise ValueError(
                    f"and its {difference.file}.onnx answer differently, by "
                    f"{difference.greatest:.1e} in a batch of {size}; --tolerance is "
                    f"{tolerance:g} of the largest value"
                )
            greatest[difference.file] = max(greatest[difference.file], difference.greatest)
    return greatest


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command with arguments `argv`."""
    from dfs_jax.config import command

    parser = command.parser(__doc__)
    parser.add_argument("--bundle", required=True, metavar="BUNDLE", help="an exported network")
    parser.add_argument("--out", required=True, metavar="DIR", help="new directory for the files")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="T",
        help="difference from the bundle's answers, over an array's largest value (at least 1), "
        "from which on a file is refused; default: 1e-4",
    )
    return command.run(parser, argv, lambda arguments, _: _convert_bundle(arguments))


def _convert_bundle(arguments: argparse.Namespace) -> None:
    from dfs_jax.config import ConfigError, refusals
    from dfs_jax.writing.tables import format_table

    out = os.path.abspath(arguments.out)
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise ConfigError(f"--out: {arguments.out} is there already; name a new directory")
    if not arguments.tolerance > 0:
        raise ConfigError(f"--tolerance must be a positive number, got {arguments.tolerance}")
    lacking = [tool for tool in TOOLS if importlib.util.find_spec(tool) is None]
    if lacking:
        raise ConfigError(
            f"{', '.join(lacking)} cannot be imported by {sys.executable}: make an environment of "
            "their own with `python -m venv onnx-env`, then `onnx-env/bin/pip install jax2onnx "
            "onnxruntime ml-collections` and `onnx-env/bin/pip install --no-deps .`, and run this "
            "with onnx-env/bin/python"
        )
    for noisy in ("jax2onnx", "onnx_ir"):  # of every file, of every shape that is not inferred
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with refusals("--bundle"):
        early_exit = bundle.EarlyExit.load(arguments.bundle)
    try:
        models = convert(rebuilt(early_exit), early_exit.preprocessing.image_shape)
        found = _checked(early_exit, models, arguments.tolerance)
    except ValueError as error:
        raise ConfigError(f"--bundle: {arguments.bundle} {error}") from error
    _write(out, models, _manifest(early_exit, models, found))
    rows = [
        (f"{name}.onnx", f"{len(model) / 1e3:.1f}", f"{found[name]:.1e}")
        for name, model in models.items()
    ]
    print(format_table(rows, ("file", "kB", "difference")))
    print(f"{arguments.out}: {len(models)} files, checked with onnxruntime")


def _manifest(
    early_exit: bundle.EarlyExit, models: Mapping[str, bytes], found: Mapping[str, float]
) -> dict[str, Any]:
    def entry(name: str) -> dict[str, Any]:
        return {
            "file": f"{name}.onnx",
            **_signature(models[name]),
            "sha256": hashlib.sha256(models[name]).hexdigest(),
            "greatest_difference": found[name],
        }

    kept = ("network", "labels", "costs", "preprocessing", "thresholds", "family")
    return {
        "format": FORMAT,
        "version": VERSION,
        "made_by": {name: importlib.metadata.version(name) for name in ("jax", *TOOLS)},
        **{name: early_exit.manifest[name] for name in kept},
        "stages": [
            {
                "carried": stage.carried,
                "tells": stage.tells,
                "segment": entry(f"segment{i}"),
                "exit": entry(f"exit{i}"),
            }
            for i, stage in enumerate(early_exit.stages, 1)
        ],
    }


def _signature(model: bytes) -> dict[str, Any]:
    """Names and shapes that go in and come out; the batch axis is called batch."""
    import onnx

    graph = onnx.load_from_string(model).graph

    def described(value: Any) -> dict[str, Any]:
        dims = value.type.tensor_type.shape.dim
        return {"name": value.name, "shape": [d.dim_param or d.dim_value for d in dims]}

    return {
        "inputs": list(map(described, graph.input)),
        "outputs": list(map(described, graph.output)),
    }


def _write(out: str, models: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
    """The directory `out` with all of its files, or nothing. Raises OSError."""
    parent = os.path.dirname(out)
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as scratch:
        unfinished = pathlib.Path(scratch) / "onnx"
        unfinished.mkdir()
        for name, model in models.items():
            (unfinished / f"{name}.onnx").write_bytes(model)
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=1, allow_nan=False))
        unfinished.replace(out)


if __name__ == "__main__":
    sys.exit(main())
