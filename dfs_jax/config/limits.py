"""What every field may hold: its type, and the numbers that make sense there.

`check` is called wherever a configuration comes from. Types follow the defaults in `fields.py`;
here stand the elements of tuples and the ranges of `train` and `optimizer`. What a section's own
class checks (surgery, objective, options of networks and methods) and what depends on the data is
checked there.
"""

import math
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_collections

from dfs_jax.config.errors import ConfigError, shown, unknown
from dfs_jax.config.fields import default, set_gradients, set_network

# Of tuples that are empty by default, and of fields that take more than one type.
_KINDS: dict[str, Any] = {
    "data.image_size": int | tuple[int, ...],
    "gradients.options.auxiliary_weights": tuple[float, ...],
    "objective.exit_weights": tuple[float, ...],
    "optimizer.milestones": tuple[float, ...],
    "surgery.beta": float | tuple[float, ...],
    "train.freeze": tuple[str, ...],
    "train.phases": tuple[dict, ...],
    "train.profile_steps": tuple[int, ...],
}

_WORDS = {
    bool: ("True or False", "truth values"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    tuple: ("a tuple", "tuples"),
    dict: ("a dictionary", "dictionaries"),
}

LARGEST_INTEGER = 2**31 - 1  # the device counts in int32, steps for instance
_SMALLEST, _LARGEST = 1e-37, 1e37  # what float32 holds; less would be 0 there


class _Range(NamedTuple):
    """Numbers from `low` to `high`, one of which may be left out, and how one says so."""

    words: str
    low: float = -math.inf
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False

    def __contains__(self, value: Any) -> bool:
        if not self.low <= value <= self.high:  # NaN too
            return False
        return not (self.without_low and value == self.low) and not (
            self.without_high and value == self.high
        )


_ANY = _Range("a number")
_NOT_NEGATIVE = _Range("0 or more", low=0)
_SHARE = _Range("in [0, 1)", low=0, high=1, without_high=True)

_RANGES: dict[str, _Range] = {
    # Beyond 32 bits JAX drops the rest: another seed's numbers, without a word.
    "data.seed": _Range("between 0 and 2**32 - 1", 0, 2**32 - 1),
    "seed": _Range("between 0 and 2**32 - 1", -(2**31), 2**32 - 1),
    "optimizer.clip_norm": _Range("0 (off) or more", low=0),
    "optimizer.decay_rate": _Range("above 0", low=0, without_low=True),
    "optimizer.learning_rate": _NOT_NEGATIVE,
    "optimizer.momentum": _SHARE,
    "optimizer.warmup_epochs": _NOT_NEGATIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "train.checkpoint_every": _NOT_NEGATIVE,
    "train.checkpoint_minutes": _NOT_NEGATIVE,
    "train.conflict_every": _NOT_NEGATIVE,
    "train.ema": _SHARE,
    "train.eval_every": _NOT_NEGATIVE,
    "train.log_every": _Range("1 or more", low=1),
    "train.peak_flops": _NOT_NEGATIVE,
}


def check(config: ml_collections.ConfigDict, section: str = "") -> None:
    """Raise ConfigError for the first field of `config` that cannot hold its value.

    Fields that are missing, or that no configuration has, are refused too. `section` restricts
    the check to one.
    """
    given, standard = fields(config), default()
    for path, choose in (("model.name", set_network), ("gradients.name", set_gradients)):
        if path in given:
            name = given[path][0]
            if not isinstance(name, str):
                raise ConfigError(f"config.{path} = {shown(name)} must be a text")
            choose(standard, name)
    known = fields(standard)
    for path in sorted(given.keys() - known.keys()):
        raise ConfigError(f"config.{path}: {unknown(path, known, 'field')}")
    for path, (usual, kind) in known.items():
        if not path.startswith(section):
            continue
        if path not in given:
            if ".options." in path:  # the network's or the method's own value then
                continue
            raise ConfigError(f"config.{path} is missing")
        value = given[path][0]
        if value is not None or usual is not None:  # placeholders alone may stay empty
            wanted = _wanted(value, _KINDS.get(path) or _kind(usual, kind), _RANGES.get(path, _ANY))
            if wanted:
                raise ConfigError(f"config.{path} = {shown(value)} must be {wanted}")


def number_of(path: str) -> type:
    """Of a field that takes a number or a tuple of them, the type of a number."""
    return typing.get_args(_KINDS[path])[0]


def fields(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, tuple[Any, type]]:
    """Value and type of every field, by its path."""
    found = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            found |= fields(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value, config.get_type(key)
    return found


def _kind(usual: Any, kind: type) -> Any:
    """The type of a field whose default is `usual`: `kind`, with a tuple's elements if known."""
    if isinstance(usual, tuple) and usual:
        elements = {_kind(element, type(element)) for element in usual}
        return tuple[elements.pop(), ...] if len(elements) == 1 else tuple
    return kind


def _wanted(value: Any, kind: Any, numbers: _Range) -> str | None:
    """What a value of `kind` within `numbers` would be, or None if `value` is that."""
    if not _is(value, kind):
        return _words(kind)
    for element in _elements(value):
        if isinstance(element, str) and "\0" in element:
            return "a text without null characters"
        if isinstance(element, str | bool):
            continue
        if element not in numbers:
            return numbers.words
        whole = isinstance(element, int)
        if whole and numbers is _ANY and not -LARGEST_INTEGER <= element <= LARGEST_INTEGER:
            return "between -2**31 and 2**31"
        if not whole and not math.isfinite(element):
            return "finite"
        if not whole and element and not _SMALLEST <= abs(element) <= _LARGEST:
            return "0, or of a size between 1e-37 and 1e37, which float32 can hold"
    return None


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_is(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        return isinstance(value, tuple) and all(_is(one, element) for one in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _words(kind: Any, several: bool = False) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_words(one, several) for one in typing.get_args(kind))
    if typing.get_origin(kind) is not tuple:
        return _WORDS.get(kind, (f"a value of type {kind.__name__}",) * 2)[several]
    return f"{_WORDS[tuple][several]} of {_words(typing.get_args(kind)[0], several=True)}"


def _elements(value: Any) -> Iterator[Any]:
    """The texts and numbers of a value, those within tuples too."""
    if isinstance(value, tuple):
        for one in value:
            yield from _elements(one)
    elif isinstance(value, str | int | float):
        yield value
