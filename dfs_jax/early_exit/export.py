"""Export of a trained run to one file that `bundle.EarlyExit` answers images with; a command.

    python -m dfs_jax.early_exit.export --workdir DIR --out BUNDLE [--step latest|best|N]
        [--data_dir DIR] [--batch-size B] [--score max_softmax|margin|entropy|patience]

Every segment and exit becomes a StableHLO program for each batch size up to B, for CPU, CUDA and
TPU. Thresholds are fitted on the validation split, for any budget; if `dfs_jax.evaluate` left
thresholds for a target in the workdir (thresholds.json), those are what the bundle uses when no
budget is given; thresholds of another checkpoint are refused. A run without a validation split
gives a bundle whose last exit answers all.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import io
import json
import platform
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax.early_exit import bundle, confidence
from dfs_jax.early_exit.budget import ALWAYS, NEVER, Thresholds
from dfs_jax.early_exit.preprocessing import Preprocessing
from dfs_jax.early_exit.router import batch_sizes
from dfs_jax.early_exit.stages import Program, Stage, named_weights

PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a bundle holds besides the network. N exits, K classes."""

    labels: tuple[str, ...]  # (K,)
    costs: tuple[int, ...]  # (N,) multiply-adds of an image that leaves at each exit
    preprocessing: Preprocessing
    thresholds: Thresholds  # in use unless a budget is given
    family: tuple[Thresholds, ...] = ()  # to choose from by budget, of the same confidence
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for people


def export(path: str, stages: Sequence[Stage], contents: Contents, sizes: Sequence[int]) -> None:
    """Write the bundle of `stages` for batches of `sizes` to `path`. Raises OSError."""
    members: dict[str, bytes] = {}
    entries = []
    shape = contents.preprocessing.image_shape
    avals = {size: (jax.ShapeDtypeStruct((size, *shape), jnp.float32),) for size in sizes}
    for i, stage in enumerate(stages, 1):
        segment, results = _programs(f"segment{i}", stage.segment, avals, members)
        exit_inputs = {size: r[stage.carried :] for size, r in results.items()}
        head, logits = _programs(f"exit{i}", stage.head, exit_inputs, members)
        entries.append(
            {"carried": stage.carried, "tells": stage.tells, "segment": segment, "head": head}
        )
        avals = {size: stage.onwards(r, logits[size]) for size, r in results.items()}
    weights = named_weights(stages)
    manifest = {
        "made_by": _versions(),
        **contents.about,
        "labels": list(contents.labels),
        "costs": [int(cost) for cost in contents.costs],
        "preprocessing": dataclasses.asdict(contents.preprocessing),
        "thresholds": contents.thresholds.to_json(),
        "family": [thresholds.to_json() for thresholds in contents.family],
        "batch_sizes": list(sizes),
        "platforms": list(PLATFORMS),
        "calling_convention_version": jax.export.maximum_supported_calling_convention_version,
        "x64": any(weight.dtype == np.float64 for weight in weights.values()),
        "stages": entries,
    }
    bundle.write(path, manifest, {bundle.WEIGHTS: _npz(weights), **members})


def _programs(
    name: str, program: Program, arguments: Mapping[int, Sequence[Any]], members: dict[str, bytes]
) -> tuple[dict[str, Any], dict[int, Sequence[Any]]]:
    """Add the program for each batch size to `members`; its entry, and the shapes it returns."""
    weights = [jax.typeof(weight) for weight in program.weights]
    entry: dict[str, Any] = {"weights": list(program.names), "programs": {}}
    results = {}

    def flat(*arrays):
        return program.call(arrays[: len(weights)], arrays[len(weights) :])

    for size, avals in arguments.items():
        with _no_locations():
            exported = jax.export.export(jax.jit(flat), platforms=PLATFORMS)(*weights, *avals)
        file = f"programs/{name}_batch{size}.stablehlo"
        members[file] = exported.mlir_module_serialized
        entry["programs"][str(size)] = {
            "file": file,
            "inputs": [_described(aval) for aval in exported.in_avals],
            "outputs": [_described(aval) for aval in exported.out_avals],
            "kept": list(exported.module_kept_var_idx),
            "uses_global_constants": exported.uses_global_constants,
        }
        results[size] = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in exported.out_avals]
    return entry, results


@contextlib.contextmanager
def _no_locations() -> Iterator[None]:
    """Leaves out the source lines of operations: they name files of this machine."""
    field = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, field)
    jax.config.update(field, 0)
    try:
        yield
    finally:
        jax.config.update(field, before)


def _described(aval: Any) -> tuple[str, list[int]]:
    return str(aval.dtype), list(aval.shape)


def _npz(weights: Mapping[str, np.ndarray]) -> bytes:
    """What `np.savez` writes, but for the time of day."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, weight in weights.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, weight, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", bundle.EPOCH), content.getvalue())
    return buffer.getvalue()


def _versions() -> dict[str, str]:
    packages = ("dfs_jax", "jax", "jaxlib", "numpy")
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {"python": platform.python_version(), **versions}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command with arguments `argv`."""
    from dfs_jax.config import command

    parser = command.parser(__doc__)
    command.add_workdir(parser)
    command.add_data_dir(parser)
    parser.add_argument("--out", required=True, metavar="BUNDLE", help="file to write")
    parser.add_argument("--step", default="latest", metavar="latest|best|N", help="checkpoint")
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="B", help="images that run together, at most"
    )
    parser.add_argument(
        "--score", choices=confidence.names(), help="what thresholds compare; default: max_softmax"
    )
    return command.run(parser, argv, lambda arguments, _: _export_workdir(arguments))


def _export_workdir(arguments: argparse.Namespace) -> None:
    from dfs_jax.config import ConfigError
    from dfs_jax.early_exit import stages
    from dfs_jax.training import workdir as workdirs
    from dfs_jax.training.run import prepare
    from dfs_jax.training.state import restore

    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    config = workdirs.saved_config(arguments.workdir, arguments.data_dir)
    run = prepare(config, arguments.workdir)
    step, state = restore(run, arguments.workdir, arguments.step)
    contents = _contents(run, arguments, step, state.variables)
    variables = jax.device_get(state.variables)  # off the mesh: a program runs on one device
    parts = stages.from_network(run.network, variables, run.data.spec.batch(1))
    sizes = batch_sizes(arguments.batch_size)
    try:
        export(arguments.out, parts, contents, sizes)
    except OSError as error:
        raise ConfigError(f"--out: cannot write {arguments.out}: {error.strerror}") from error
    print(
        f"{arguments.out}: {run.config.model.name} of step {step}, {len(parts)} exits, batches "
        f"of {', '.join(map(str, sizes))}, thresholds for {len(contents.family)} budgets"
    )
    if told := bundle.warning(contents.thresholds, contents.family):
        print(f"warning: {told}")


def _contents(run: Any, arguments: argparse.Namespace, step: int, variables: Any) -> Contents:
    """What goes with the network whose `variables` are those of `step`."""
    from dfs_jax.config import ConfigError
    from dfs_jax.models.cost import exit_costs
    from dfs_jax.training.digest import fingerprint

    spec = run.data.spec
    costs, weights = exit_costs(run.network, spec.batch(1)).cumulative, fingerprint(variables)
    chosen = _saved_thresholds(arguments.workdir, step, len(costs), weights)
    score = arguments.score or (chosen.confidence if chosen else "max_softmax")
    if chosen and score != chosen.confidence:
        raise ConfigError(
            f"--score: the workdir's thresholds.json compares {chosen.confidence}, not {score}; "
            "leave --score away, or evaluate again"
        )
    fitted = _fitted(run, arguments.workdir, step, weights)
    family = tuple(
        dataclasses.replace(thresholds, **fitted)
        for thresholds in _family(run, variables, score, costs)
    )
    if chosen:
        told = chosen.warning or fitted["warning"]
        chosen = dataclasses.replace(chosen, **fitted | {"warning": told})
    full = Thresholds(score, (NEVER,) * (len(costs) - 1) + (ALWAYS,), fitted_for="the last exit")
    return Contents(
        labels=spec.class_names,
        costs=costs,
        preprocessing=_preprocessing(run),
        thresholds=chosen or (family[-1] if family else full),
        family=family,
        about={**_network(run.config), "data": spec.name, "step": step, "weights": weights},
    )


def _network(config: Any) -> dict[str, Any]:
    """All that `models.create_model` needs to build the network again."""
    return {
        "network": config.model.name,
        "options": config.model.options.to_dict(),
        "surgery": config.surgery.to_dict(),
        "precision": config.train.precision,
    }


def _fitted(run: Any, workdir: str, step: int, weights: str) -> dict[str, Any]:
    """The fields of `Thresholds` about the checkpoint, for those that are fitted here."""
    from dfs_jax.training import lineage

    held_out = run.data.validation is not None
    told = lineage.warning(run.config, workdir) if held_out else ""
    return {"step": step, "weights": weights, "warning": told}


def _saved_thresholds(
    workdir: str, step: int, num_exits: int, weights: str = ""
) -> Thresholds | None:
    """The thresholds for a target that the evaluation left in the workdir, if it did.

    Raises ConfigError unless they were fitted to the checkpoint of `step`, whose weights have the
    fingerprint `weights`.
    """
    from etils import epath

    from dfs_jax.config import ConfigError

    saved = epath.Path(workdir) / "thresholds.json"
    if not saved.exists():
        return None
    again = f"python -m dfs_jax.evaluate --workdir {workdir} --step {step}"
    try:
        thresholds = Thresholds.from_json(json.loads(saved.read_text()))
        fitted = thresholds.step
        fitted = _step_of(thresholds, saved.parent) if fitted is None else fitted
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{saved} cannot be used: {error}; evaluate again: {again}") from error
    again += f" and a target (there: {thresholds.fitted_for})"
    if fitted != step or len(thresholds.values) != num_exits:
        raise ConfigError(
            f"{saved} belongs to step {fitted}, but step {step} is exported; give --step {fitted}, "
            f"or fit thresholds to step {step}: {again}"
        )
    if thresholds.weights and weights not in ("", thresholds.weights):
        raise ConfigError(f"{saved} belongs to other weights of step {step}; fit anew: {again}")
    return thresholds


def _step_of(thresholds: Thresholds, workdir: Any) -> int:
    """The step that `thresholds` were fitted to, by the evaluation beside them.

    Of thresholds that do not say it, as earlier versions wrote them. Raises ValueError if a later
    evaluation, without a target, took the place of theirs.
    """
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    chosen = evaluation.get("chosen", {"thresholds": thresholds.to_json()})
    if chosen is None or Thresholds.from_json(chosen["thresholds"]) != thresholds:
        raise ValueError("evaluation.json beside it is of another evaluation")
    return evaluation["step"]


def _family(run: Any, variables: Any, score: str, costs: Sequence[float]) -> tuple[Thresholds, ...]:
    from dfs_jax.distributed import placement
    from dfs_jax.early_exit import budget
    from dfs_jax.evaluation.answers import answer_split, answerer

    if run.data.validation is None:
        return ()
    answer = answerer(run.network, score, placement.replicated(run.mesh))
    answers = answer_split(answer, variables, run.data.validation, placement.batch(run.mesh))
    return budget.family(score, answers.confidences, answers.correct, costs)


def _preprocessing(run: Any) -> Preprocessing:
    """What the run's own evaluation does to images."""
    from dfs_jax.data.input import decode, in_memory

    spec, in_full = run.data.spec, isinstance(run.data.test, in_memory.InMemoryEval)
    image_shape = spec.inputs["image"].shape
    rows, columns = decode.covered(image_shape[:2])
    return Preprocessing(
        image_shape,
        *spec.statistics,
        short_side=0 if in_full else rows if rows == columns else (rows, columns),
        antialias=in_full or run.config.data.antialias,
    )


if __name__ == "__main__":
    sys.exit(main())
