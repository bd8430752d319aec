"""A configuration from its file and the command line, as JSON and back, and compared with another.

Where the JSON is kept is the business of `training/workdir.py`.
"""

import ast
import contextlib
import importlib.util
import json
import os
import re
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections
from ml_collections import config_dict

from dfs_jax.config.errors import ConfigError, listed, shown, unknown
from dfs_jax.config.fields import default, set_gradients, set_network
from dfs_jax.config.limits import check, number_of

_LONGEST = 400  # characters of a message that is not ours

# Fields that name files. A shell leaves the ~ of --config.data.dir=~/x alone.
_PLACES = (("data", "dir"), ("train", "init_from"))


def load(spec: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The configuration of `spec` (`FILE[:preset]`) with `overrides` (`a.b=value`) applied.

    The names of the network and of the gradient method are applied first, so that their own
    options can be overridden too. Raises ConfigError with one sentence for anything wrong.
    """
    file, _, preset = spec.partition(":")
    c = _get_config(file, preset or None)
    pairs = [_split(item) for item in overrides]
    for field, choose in (("model.name", set_network), ("gradients.name", set_gradients)):
        for path, text in pairs:
            if path == field:
                choose(c, text)
    for path, text in pairs:
        if path not in ("model.name", "gradients.name"):
            _override(c, path, text)
    _choose_length(c, {path for path, _ in pairs})
    check(c)
    for section, field in _PLACES:
        if (c[section][field] or "").startswith("~"):
            c[section][field] = os.path.expanduser(c[section][field])
    return c.lock()


def load_module(file: str) -> ModuleType:
    """The module of a configuration file; raises ConfigError if there is none."""
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"--config: there is no file {file!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config: {file!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    with refusing_mistakes(file):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def refusing_mistakes(file: str) -> Iterator[None]:
    """Whatever is raised within, by Python code of a user's own `file`, becomes a ConfigError.

    It names the last line of `file` that was reached.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        reason = f"{type(error).__name__}: {_reason(error)}"
        reason = reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]}…"
        where = f" (line {lines[-1]})" if lines else ""
        raise ConfigError(f"{file}: {reason}{where}") from error


def _reason(error: BaseException) -> str:
    """The message of `error` on one line; ml_collections wraps its own, and lists all fields."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    text = re.sub(r'Other fields present: ".*"', "", text)
    return " ".join(text.split())


def to_json(c: ml_collections.ConfigDict) -> str:
    """The configuration as the text of a workdir's `config.json`."""
    return json.dumps(c.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
    """The inverse of `to_json`; fields that the saved file lacks take today's defaults."""
    saved = json.loads(text)
    c = default()
    set_network(c, saved["model"]["name"])
    set_gradients(c, saved["gradients"]["name"])
    with c.unlocked():
        _merge(c, saved)
    return c.lock()


def differences(
    there: ml_collections.ConfigDict, now: ml_collections.ConfigDict, *, ignored: Iterable[str] = ()
) -> list[str]:
    """Lines `field: value there, value now` of every field that differs.

    `ignored` names fields ("data.dir") and whole sections ("mesh") that may differ.
    """
    before, after = (flatten(json.loads(to_json(c))) for c in (there, now))
    ignored = set(ignored)
    lines = []
    for path in sorted(before.keys() | after.keys()):
        skip = path in ignored or path.split(".")[0] in ignored
        if not skip and before.get(path) != after.get(path):
            lines.append(f"{path}: {before.get(path)!r} there, {after.get(path)!r} now")
    return lines


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dictionary by path: {"surgery.beta": 0.5, …}."""
    flat = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _merge(c: ml_collections.ConfigDict, saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        if isinstance(value, Mapping) and isinstance(c.get(key), ml_collections.ConfigDict):
            _merge(c[key], value)
        elif value is not None:
            c[key] = _tuples(value)


def _tuples(value: Any) -> Any:
    """Lists, at any depth, as tuples, which they were before they became JSON."""
    if isinstance(value, Mapping):
        return {key: _tuples(one) for key, one in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _get_config(file: str, preset: str | None) -> ml_collections.ConfigDict:
    module = load_module(file)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config: {file!r} has no function get_config(preset)")
    with refusing_mistakes(file):
        c = module.get_config(preset)
    if not isinstance(c, ml_collections.ConfigDict):
        raise ConfigError(
            f"{file}: get_config must return what dfs_jax.config.default() gives, with changes; "
            f"it returned {shown(c)}"
        )
    return c


def _split(item: str) -> tuple[str, str]:
    path, equals, text = item.partition("=")
    path = path if len(path) <= 100 else f"{path[:100]}…"
    if not equals:
        raise ConfigError(f"--config.{path}: give a value as --config.{path}=VALUE")
    return path, text


def _override(c: ml_collections.ConfigDict, path: str, text: str) -> None:
    *parents, leaf = path.split(".")
    node: Any = c
    for depth, key in enumerate([*parents, leaf]):
        if not isinstance(node, ml_collections.ConfigDict):
            raise ConfigError(f"config.{path}: {'.'.join(parents[:depth])} has no fields")
        if key not in node:
            raise ConfigError(f"config.{path}: {unknown(key, node, 'field')}")
        if depth < len(parents):
            node = node[key]
    if isinstance(node[leaf], ml_collections.ConfigDict):
        raise ConfigError(f"config.{path} is a section; its fields: {listed(node[leaf])}")
    kind = node.get_type(leaf)
    number = number_of(path) if kind is object else kind
    try:
        value = _parse(text, kind, number)
        # Only placeholders, which ml_collections keeps as references, can be None.
        fields = dict(node.items(preserve_field_references=True))
        if value is None and not isinstance(fields[leaf], config_dict.FieldReference):
            raise ValueError(text)
        node[leaf] = value
    except (TypeError, ValueError, OverflowError):
        name = number.__name__
        name = f"{name} or ({name}, {name})" if kind is object else name
        hint = ", which is written as (1, 2) or ('text',)" if kind is tuple else ""
        raise ConfigError(
            f"config.{path}: {shown(text)} is not a value of type {name}{hint}"
        ) from None


def _choose_length(c: ml_collections.ConfigDict, given: Collection[str]) -> None:
    """One of train.epochs and train.steps that is `given` sets the other to 0."""
    for field, other in (("epochs", "steps"), ("steps", "epochs")):
        if f"train.{field}" in given and f"train.{other}" not in given and c.train[field] != 0:
            c.train[other] = type(c.train[other])(0)


def _parse(text: str, kind: type, number: type) -> Any:
    if kind is str:
        return text
    if kind is bool:
        words = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise ValueError(text) from None
    if kind is object:  # a number, or several
        kind = tuple if isinstance(value, list | tuple) else number
        if value is None:
            raise ValueError(text)
    if kind is tuple:
        value = _tuples(value)
        return value if isinstance(value, tuple) else (value,)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind and value is not None:
        raise ValueError(text)
    return value
