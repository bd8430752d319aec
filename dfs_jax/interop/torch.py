"""Weights from and to PyTorch: the entries of a state dict against a network's variables.

Only names, layout and pieces change, never a value or its type. PyTorch itself is not needed:
entries are numpy arrays, which `files.py` reads from files. The names are in `names.py`.
"""

import dataclasses
import difflib
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dfs_jax.interop import names, prefixes
from dfs_jax.models import traced
from dfs_jax.models.multi_exit import MultiExit

log = logging.getLogger(__name__)

Variables = dict[str, Any]

_LISTED = 8  # entries at fault that a message names


class InteropError(ValueError):
    """Weights that do not fit; the message counts the entries at fault and names some of them."""


def from_state_dict(network: MultiExit, arrays: Mapping[str, Any]) -> Variables:
    """Variables {"params": …, "batch_stats": …} of `network` with the entries of a state dict.

    `arrays` maps the official repository's names to arrays in PyTorch's layout; their types
    are kept and `num_batches_tracked` is dropped. What training scripts put before the names is
    taken off (`prefixes.py`), and the log tells it. Raises InteropError for entries that are
    missing, unknown or of another shape.
    """
    given, places, problems, translation = _compared(network, arrays)
    if problems:
        raise InteropError(_report(network, problems, given, translation))
    return _assembled(places, given)


def from_backbone(network: MultiExit, arrays: Mapping[str, Any], rng: jax.Array) -> Variables:
    """Variables of `network` with the weights of a backbone that was trained with one classifier.

    As `from_state_dict`, but what belongs to the exits may be missing, unknown to `network` or
    made for another number of classes; such parts get initial values drawn with `rng`. The
    backbone itself must be complete.
    """
    given, places, problems, translation = _compared(network, arrays)
    severe = {name: text for name, text in problems.items() if not translation.is_exit(name)}
    if severe:
        raise InteropError(_report(network, severe, given, translation))
    taken = {path: place for path, place in places.items() if not problems.keys() & place.names()}
    images = jnp.zeros(_image_shape(network, translation, given))
    # Many small random draws that run once: compiling them well would take longer.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    loaded = traverse_util.flatten_dict(_assembled(taken, given), sep="/")

    def others(rng, images):
        initial = traverse_util.flatten_dict(network.init(rng, images), sep="/")
        return {path: value for path, value in initial.items() if path not in loaded}

    fresh = jax.device_get(jax.jit(others, compiler_options=quick)(rng, images))
    return traverse_util.unflatten_dict(loaded | fresh, sep="/")


def to_state_dict(network: MultiExit, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_state_dict`: entries with the official names, in PyTorch's layout.

    `variables` holds "params" and, where the network has batch norm, "batch_stats"; each may
    be left out, and "params" may hold gradients. `num_batches_tracked` is written as 0.
    """
    modules = {name for tree in variables.values() for name in tree}
    places = _places(network, variables, names.translation(network, modules))
    result: dict[str, np.ndarray] = {}
    for path, value in traverse_util.flatten_dict(dict(variables), sep="/").items():
        place, value = places[path], np.asarray(value)
        for name, start, stop in place.pieces:
            part = value if len(place.pieces) == 1 else value[..., start:stop, :]
            result[name] = np.array(part.transpose(place.to_torch), order="C")
            if name.endswith(".running_mean"):
                counter = name.removesuffix("running_mean") + "num_batches_tracked"
                result[counter] = np.zeros((), np.int64)
    return result


class Made(NamedTuple):
    """What a state dict tells about the network it was made for."""

    num_classes: int | None  # of the deepest exit; None where it has no such entry
    image_shape: tuple[int, int, int]  # (H, W, C), the smallest that leads to these shapes


def made_for(network: MultiExit, arrays: Mapping[str, Any]) -> Made:
    """Number of classes and shape of images, for entries of a network like `network`."""
    tree = _shapes(network, _smallest(network))
    translation = names.translation(network, tree["params"].keys())
    given = _entries(arrays, _places(network, tree, translation)).entries
    head = given.get(translation.head)
    classes = head.shape[0] if head is not None and head.ndim else None
    return Made(classes, _image_shape(network, translation, given)[1:])


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where one array of the tree, of shape `shape`, is kept in a state dict.

    `pieces` are (name, first input channel, last + 1), one or, for a split kernel, two.
    """

    shape: tuple[int, ...]
    pieces: tuple[tuple[str, int, int], ...]
    kernel: bool

    @property
    def to_torch(self) -> tuple[int, ...]:
        """The axes (…, in, out) of a kernel become (out, in, …); other arrays stay."""
        axes = tuple(range(len(self.shape)))
        return (axes[-1], axes[-2], *axes[:-2]) if self.kernel else axes

    @property
    def to_flax(self) -> tuple[int, ...]:
        axes = tuple(range(len(self.shape)))
        return (*axes[2:], 1, 0) if self.kernel else axes

    def names(self) -> set[str]:
        return {name for name, _, _ in self.pieces}

    def torch_shape(self, start: int, stop: int) -> tuple[int, ...]:
        shape = list(self.shape)
        if len(self.pieces) > 1:
            shape[-2] = stop - start
        return tuple(shape[axis] for axis in self.to_torch)


def _places(
    network: MultiExit, tree: Mapping[str, Any], translation: names.Translation
) -> dict[str, _Place]:
    """Path in the tree, "params/a/b/kernel", to its place; `tree` holds arrays or shapes."""
    places = {}
    for path, value in traverse_util.flatten_dict(dict(tree), sep="/").items():
        collection, _, inner = path.partition("/")
        module, _, leaf = inner.rpartition("/")
        shape, kernel = tuple(value.shape), leaf == "kernel"
        try:
            last = names.LEAVES.get(collection, {}).get(leaf, leaf)
            name = ".".join(filter(None, (translation.module(module), last)))
        except KeyError:
            raise InteropError(
                f"{type(network).__name__} has no parameter {path!r} that PyTorch has a name for"
            ) from None
        channels = shape[-2] if kernel else 0
        if "_*" in name:
            if isinstance(network.surgery.beta, tuple):
                raise InteropError(
                    "the official code cuts the kernels of a VGG at one share of the channels; "
                    f"surgery.beta must be a number, got {network.surgery.beta}"
                )
            cut = network.surgery.cut(channels)
            shared, other = name.replace("_*", "_p"), name.replace("_*", "_s")
            pieces = (shared, 0, cut), (other, cut, channels)
        else:
            pieces = ((name, 0, channels),)
        places[path] = _Place(shape, pieces, kernel)
    return places


def _entries(arrays: Mapping[str, Any], places: Mapping[str, _Place]) -> prefixes.Taken:
    weights = {
        name: np.asarray(value)
        for name, value in arrays.items()
        if name.rpartition(".")[2] != "num_batches_tracked"
    }
    return prefixes.taken(weights, {name for place in places.values() for name in place.names()})


def _image_shape(
    network: MultiExit, translation: names.Translation, given: Mapping[str, np.ndarray]
) -> tuple[int, int, int, int]:
    """Shape of images (1, H, W, C) for which the given entries were made, as far as it shows."""
    shapes = {name: value.shape for name, value in given.items()}
    side = max(translation.image_side(shapes) or 0, network.smallest_image)
    stem = shapes.get(translation.stem, ())
    return (1, side, side, stem[1] if len(stem) == 4 and stem[1] else 3)


def _compared(
    network: MultiExit, arrays: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, _Place], dict[str, str], names.Translation]:
    """Entries, the places of the network's variables for their images, and what does not fit."""
    tree = _shapes(network, _smallest(network))
    translation = names.translation(network, tree["params"].keys())
    places = _places(network, tree, translation)
    given, prefix, left_out = _entries(arrays, places)
    if prefix:
        others = f"; left out: {_listed(left_out)}" if left_out else ""
        log.info("%d entries under %r are taken%s", len(given), prefix, others)
    image_shape = _image_shape(network, translation, given)
    if image_shape != _smallest(network):
        places = _places(network, _shapes(network, image_shape), translation)
    return given, places, _misfits(places, given), translation


def _smallest(network: MultiExit) -> tuple[int, int, int, int]:
    return (1, network.smallest_image, network.smallest_image, 3)


def _shapes(network: MultiExit, image_shape: tuple[int, ...]) -> Variables:
    return traced.variables(network, jax.ShapeDtypeStruct(image_shape, jnp.float32))


def _misfits(places: Mapping[str, _Place], given: Mapping[str, np.ndarray]) -> dict[str, str]:
    """What is wrong with each entry that is missing, unknown or misshapen, by its name."""
    problems, wanted = {}, set()
    for place in places.values():
        for name, start, stop in place.pieces:
            shape = place.torch_shape(start, stop)
            wanted.add(name)
            if name not in given:
                problems[name] = f"missing, shape {shape}"
            elif given[name].shape != shape:
                problems[name] = f"shape {given[name].shape}, expected {shape}"
    return problems | {name: "unknown" for name in given if name not in wanted}


def _report(
    network: MultiExit,
    problems: Mapping[str, str],
    given: Mapping[str, Any],
    translation: names.Translation,
) -> str:
    """At most ten lines: how many entries are at fault, and some of them."""

    def shallow_first(name: str) -> tuple[bool, str]:
        return translation.is_exit(name), name

    kinds = {
        words: sorted(
            (n for n, text in problems.items() if text.startswith(kind)), key=shallow_first
        )
        for kind, words in _KINDS.items()
    }
    kinds = {words: found for words, found in kinds.items() if found}
    head = (
        f"{len(problems)} entries do not fit {type(network).__name__} with {network.num_classes} "
        f"classes and beta {network.surgery.beta}: "
        + ", ".join(f"{len(found)} {words}" for words, found in kinds.items())
    )
    if len(problems) <= _LISTED:
        return head + "".join(f"\n  {name}: {problems[name]}" for name in sorted(problems))
    unknown = kinds.get(_KINDS["unknown"], [])
    if unknown and (start := prefixes.common(given)):
        head += f"; all names there begin with {start!r}"
    some = (_LISTED - 1) // len(kinds)
    shown = [n for n in (translation.head,) if n in problems]  # it tells the number of classes
    shown += [n for found in kinds.values() for n in found[:some] if n not in shown]
    lines = []
    for name in shown:
        near = difflib.get_close_matches(name, unknown, n=1, cutoff=0.5)
        near = near if problems[name].startswith("missing") else []
        lines.append(f"{name}: {problems[name]}" + "".join(f"; nearest there: {n}" for n in near))
    return "\n  ".join([head, *lines, f"and {len(problems) - len(shown)} more"])


# What is said of an entry begins with, and the same of several.
_KINDS = {"missing": "are missing", "unknown": "are unknown", "shape": "have another shape"}


def _listed(found: tuple[str, ...]) -> str:
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more


def _assembled(places: Mapping[str, _Place], given: Mapping[str, np.ndarray]) -> Variables:
    flat = {}
    for path, place in places.items():
        parts = [given[name].transpose(place.to_flax) for name, _, _ in place.pieces]
        value = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-2)
        flat[path] = np.array(value, order="C")
    return traverse_util.unflatten_dict(flat, sep="/")
