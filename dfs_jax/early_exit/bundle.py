"""One file that answers images: programs, weights, thresholds, labels and preprocessing.

`EarlyExit.load(path)` needs jax and numpy alone. A bundle is a zip file with

    manifest.json             everything that is not an array; format and version first
    weights.npz               every weight once, by name
    programs/*.stablehlo      one program per segment and per exit for each batch size, portable
                              StableHLO for several platforms; arguments are the weights that the
                              manifest lists, then the arrays that flow in

The manifest has a SHA-256 of each member, and the zip comment one of the whole file, so that no
byte can change unnoticed. `export` makes what `write` stores here.
"""

import collections
import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from dfs_jax.early_exit import budget as budgets
from dfs_jax.early_exit.budget import Thresholds
from dfs_jax.early_exit.preprocessing import Preprocessing
from dfs_jax.early_exit.router import Answers, Router
from dfs_jax.early_exit.stages import Arrays, Program, Stage
from dfs_jax.writing.files import write_whole

log = logging.getLogger(__name__)

FORMAT = "dfs_jax early exit"
VERSION = 1
MANIFEST, WEIGHTS = "manifest.json", "weights.npz"
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every member: equal contents give equal files

_Avals = tuple[tuple[str, tuple[int, ...]], ...]  # type and shape of each array

_SEAL = b"sha256:"
_SEAL_SIZE = len(_SEAL) + 64


class BundleError(ValueError):
    """A file that is no usable bundle; the message names the file and what is wrong with it."""


class EarlyExit:
    """A trained network that answers images at the first exit that is sure enough.

    Attributes:
      router: runs the programs.
      stages: the programs themselves, for the batch sizes of the router alone.
      preprocessing: what makes an image an input.
      labels: (K,) names of the classes.
      costs: (N,) multiply-adds of an image that leaves at each exit.
      thresholds: those in use unless a budget is given.
      family: thresholds from cheap to costly, each more accurate than those before.
      manifest: the whole manifest.
    """

    def __init__(self, manifest: Mapping[str, Any], stages: tuple[Stage, ...]):
        """See `load`; raises ValueError, KeyError or TypeError for an unusable manifest."""
        self.manifest = manifest
        self.labels = tuple(manifest["labels"])
        self.costs = tuple(manifest["costs"])
        fields = {k: tupled(v) for k, v in manifest["preprocessing"].items()}
        self.preprocessing = Preprocessing(**fields)
        self.thresholds = Thresholds.from_json(manifest["thresholds"])
        self.family = tuple(map(Thresholds.from_json, manifest["family"]))
        self.stages = stages
        self.router = Router(
            stages,
            self.preprocessing.image_shape,
            confidence=self.thresholds.confidence,
            sizes=manifest["batch_sizes"],
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> "EarlyExit":
        """The bundle in the file `path`. Raises BundleError for a damaged or foreign file.

        What its thresholds warn of is logged.
        """
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}") from error
        try:
            manifest, members = _verified(data)
            _check_versions(manifest)
            with np.load(io.BytesIO(members[WEIGHTS]), allow_pickle=False) as arrays:
                weights = {name: jax.device_put(arrays[name]) for name in arrays.files}
            loaded = cls(manifest, _stages(manifest, members, weights))
        except BundleError as error:
            raise BundleError(f"{path} {error}") from error
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise BundleError(
                f"{path} has a {MANIFEST} that cannot be used: {type(error).__name__}: {error}"
            ) from error
        if told := warning(loaded.thresholds, loaded.family):
            log.warning("%s: %s", path, told)
        return loaded

    def warmup(self) -> None:
        """See `Router.warmup`."""
        self.router.warmup()

    def within(self, budget: float | None) -> Thresholds:
        """The most accurate thresholds of expected cost at most `budget`; None: `thresholds`.

        Raises ValueError if all cost more.
        """
        if budget is None:
            return self.thresholds
        if not self.family:
            raise ValueError("this bundle has no thresholds for budgets")
        return budgets.within(self.family, budget)

    def __call__(self, images: np.ndarray, *, budget: float | None = None) -> Answers:
        """Answers to images (B, H, W, C): pixels in uint8, or normalised in float32.

        `budget` bounds the mean cost per image, as expected from the validation split.
        """
        return self.router(self._normalised(images), self.within(budget))

    def serve(
        self, requests: Iterable[np.ndarray], *, budget: float | None = None
    ) -> Iterator[Answers]:
        """Answers to each of `requests` in their order; see `Router.serve` and `__call__`."""
        return self.router.serve(map(self._normalised, requests), self.within(budget))

    def _normalised(self, images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        if images.dtype == np.uint8:
            return self.preprocessing.normalise(images)
        if images.dtype != np.float32:
            raise ValueError(
                "images must be uint8 (pixels) or float32 (normalised by `preprocessing`), "
                f"got {images.dtype}"
            )
        return images


def warning(thresholds: Thresholds, family: Iterable[Thresholds]) -> str:
    """What any of them warns of, or ""."""
    return next((t.warning for t in (thresholds, *family) if t.warning), "")


def _stages(
    manifest: Mapping[str, Any], members: Mapping[str, bytes], weights: Mapping[str, jax.Array]
) -> tuple[Stage, ...]:
    shared = {
        "platforms": tupled(manifest["platforms"]),
        "calling_convention_version": int(manifest["calling_convention_version"]),
    }

    def exported_later(entry: Mapping[str, Any]) -> Callable[[], jax.export.Exported]:
        read = functools.partial(
            _exported,
            members[entry["file"]],
            inputs=tupled(entry["inputs"]),
            outputs=tupled(entry["outputs"]),
            module_kept_var_idx=tupled(entry["kept"]),
            uses_global_constants=bool(entry["uses_global_constants"]),
            **shared,
        )
        return functools.cache(read)

    def program(entry: Mapping[str, Any]) -> Program:
        names = tuple(entry["weights"])
        exported = {int(size): exported_later(p) for size, p in entry["programs"].items()}
        if sorted(exported) != sorted(manifest["batch_sizes"]):
            raise ValueError("not every program is there for every batch size")

        def call(weights: Arrays, arguments: Arrays) -> Arrays:
            return exported[arguments[0].shape[0]]().call(*weights, *arguments)

        return Program(call, tuple(weights[name] for name in names), names)

    return tuple(
        Stage(
            program(stage["segment"]),
            program(stage["head"]),
            stage["carried"],
            stage.get("tells", False),
        )
        for stage in manifest["stages"]
    )


def _exported(
    program: bytes, *, inputs: _Avals, outputs: _Avals, platforms: tuple[str, ...], **fields: Any
) -> jax.export.Exported:
    """The exported function of this signature, of which a program's bytes say nothing.

    jax.export's own file format would need one package more. So an empty function of the same
    signature is exported, and the program and the other `fields` are put in their place.
    """

    def empty(*arguments):
        del arguments
        return tuple(jax.numpy.zeros(shape, dtype) for dtype, shape in outputs)

    shapes = [jax.ShapeDtypeStruct(shape, dtype) for dtype, shape in inputs]
    frame = jax.export.export(jax.jit(empty), platforms=platforms)(*shapes)
    return dataclasses.replace(frame, mlir_module_serialized=program, **fields)


def _check_versions(manifest: Mapping[str, Any]) -> None:
    convention = int(manifest["calling_convention_version"])
    least = jax.export.minimum_supported_calling_convention_version
    most = jax.export.maximum_supported_calling_convention_version
    if not least <= convention <= most:
        raise BundleError(
            f"was exported by jax {manifest['made_by']['jax']} with calling convention "
            f"{convention}; jax {jax.__version__} here takes {least} to {most}"
        )
    if manifest["x64"] and not jax.config.jax_enable_x64:
        raise BundleError("computes in float64: set JAX_ENABLE_X64=1")


def tupled(value: Any) -> Any:
    """JSON's lists, at any depth, as tuples."""
    return tuple(map(tupled, value)) if isinstance(value, list) else value


def write(
    path: str | os.PathLike, manifest: Mapping[str, Any], members: Mapping[str, bytes]
) -> None:
    """Store a bundle; an existing file is replaced, and a failure leaves it as it was.

    `manifest` gets the format, the version and the digests here. Raises OSError.
    """
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in members.items()}
    manifest = {"format": FORMAT, "version": VERSION, **manifest, "digests": digests}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        text = json.dumps(manifest, indent=1, allow_nan=False).encode()
        for name, content in {MANIFEST: text, **members}.items():
            # Weights do not get smaller, and dominate.
            method = zipfile.ZIP_STORED if name == WEIGHTS else zipfile.ZIP_DEFLATED
            archive.writestr(zipfile.ZipInfo(name, EPOCH), content, method)
        archive.comment = bytes(_SEAL_SIZE)
    body = buffer.getvalue()[:-_SEAL_SIZE]
    write_whole(path, body + _seal(body))


def _verified(data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Manifest and members of a bundle; raises BundleError, which does not name the file."""
    # Damage can make zipfile and json raise almost anything: every exception is a finding.
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        names = archive.namelist()
    except Exception as error:
        raise BundleError("is not a zip file, or not the whole of it") from error
    if MANIFEST not in names:
        raise BundleError(f"is not a bundle, or not the whole of one: it has no {MANIFEST}")
    try:
        manifest = json.loads(_member(archive, MANIFEST))
        kind, version = manifest.get("format"), manifest.get("version")
    except (ValueError, AttributeError) as error:
        raise BundleError(f"has a damaged {MANIFEST}: {error}") from error
    if kind != FORMAT:
        raise BundleError(f"is not a bundle: its {MANIFEST} is of format {kind!r}")
    if version != VERSION:
        raise BundleError(f"has format version {version!r}; this dfs_jax reads {VERSION}")
    digests = manifest.get("digests")
    if not isinstance(digests, dict):
        raise BundleError(f"has a damaged {MANIFEST}: it has no digests")
    for name, count in collections.Counter(names).items():
        if count > 1 or name not in {MANIFEST, *digests}:
            raise BundleError(f"has a member {name} that does not belong there")
    members = {}
    for name, digest in digests.items():
        if name not in names:
            raise BundleError(f"lacks its member {name}")
        members[name] = _member(archive, name)
        if hashlib.sha256(members[name]).hexdigest() != digest:
            raise BundleError(f"has a damaged member {name}: its SHA-256 differs")
    if data[-_SEAL_SIZE:] != _seal(data[:-_SEAL_SIZE]):
        raise BundleError(
            "is damaged, cut off or packed anew: the SHA-256 of the whole file differs"
        )
    return manifest, members


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except Exception as error:  # see `_verified`
        raise BundleError(f"has a damaged member {name}: {error}") from error


def _seal(body: bytes) -> bytes:
    return _SEAL + hashlib.sha256(body).hexdigest().encode()
