"""The configuration: its fields with their defaults, presets, and the command-line loader.

One tree of fields serves every file under `configs/`; it is locked, so a misspelt field is
an error that names the nearest one. What a field means is said here, once. Which values
make sense together is checked by the module that uses them, before anything is compiled.
"""

import ast
import difflib
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections
from ml_collections import config_dict


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what is wrong and what is right."""


def default() -> ml_collections.ConfigDict:
    """The configuration with every field at its default. Files under `configs/` start here."""
    c = ml_collections.ConfigDict()
    c.seed = 0  # initial weights, dropout and everything random that is not data

    c.model = ml_collections.ConfigDict()
    c.model.name = "msdnet_digits"  # one of dfs_jax.models.names()
    c.model.options = ml_collections.ConfigDict()  # the network's own; see models.options(name)

    c.surgery = ml_collections.ConfigDict()
    c.surgery.beta = 0.5  # share of the channels that deeper exits train, in [0, 1]
    c.surgery.partition = True  # False: joint training, the rest is ignored
    c.surgery.referencing = True  # see the other part without training it; False: zeros instead
    c.surgery.exit_gradient = "own"  # channels an exit trains: "own" (paper) or "all"

    c.objective = ml_collections.ConfigDict()
    c.objective.exit_weights = ()  # weight of each exit's loss, shallow to deep; () = all 1
    c.objective.label_smoothing = 0.0  # in [0, 1)
    c.objective.logit_weight = 0.0  # share of logit distillation in earlier losses, in [0, 1]
    c.objective.temperature = 3.0  # of logit distillation
    c.objective.scale_by_temperature = False  # multiply logit distillation by temperature squared
    c.objective.feature_weight = 0.0  # feature distillation of earlier exits
    c.objective.feature_reduction = "mean"  # "mean" over examples, or the official "batch_norm"

    c.gradients = ml_collections.ConfigDict()
    c.gradients.name = "joint"  # one of dfs_jax.gradients.names()
    c.gradients.options = ml_collections.ConfigDict()  # the method's own

    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.name = "sgd"  # or "adamw", "lamb", "lars"
    c.optimizer.learning_rate = 0.1  # at the peak of the schedule
    c.optimizer.momentum = 0.9  # AdamW: decay of the first moment
    c.optimizer.nesterov = False
    c.optimizer.weight_decay = 5e-4  # on every parameter; SGD: coupled (added to the gradient)
    c.optimizer.clip_norm = 0.0  # gradients of a larger global norm are scaled down to it; 0: off
    c.optimizer.schedule = "multistep"  # "multistep", "cosine" or "constant"
    c.optimizer.milestones = ()  # multistep: epochs at which the rate is multiplied by decay_rate
    c.optimizer.decay_rate = 0.1
    c.optimizer.warmup_epochs = 0.0  # from 0 to the peak
    c.optimizer.warmup = "linear"  # its shape: "linear" or "cosine"

    c.data = ml_collections.ConfigDict()
    c.data.name = "digits"  # one of dfs_jax.data.names()
    c.data.dir = config_dict.placeholder(str)  # prepared data; None: TFDS's own place
    c.data.seed = 0  # order and augmentation of the training examples
    c.data.validation_size = 240  # examples held out of training; 0: no validation split; -1: the
    # data set's own one, where there is one beside the test split
    c.data.image_size = 0  # resize images to this many pixels a side; 0: as they are
    c.data.crop_padding = 0  # random crop after padding by this many pixels
    c.data.crop_fill = 0  # grey level of that padding, 0-255
    c.data.flip = False  # random horizontal flip
    c.data.cutout = 0  # side of a square that is blacked out; 0: off
    c.data.autoaugment = ""  # learned policy of image operations: "cifar10"; "": none
    c.data.randaugment_layers = 0  # random image operations per image (RandAugment's N); 0: off
    c.data.randaugment_magnitude = 9.0  # their strength (RandAugment's M), 0 to 10
    c.data.mixup = 0.0  # blend images: a of Beta(a, a), from which shares are drawn; 0: off
    c.data.cutmix = 0.0  # paste rectangles: a of Beta(a, a), from which areas are drawn; 0: off
    c.data.mix_probability = 1.0  # share of the batches that are mixed
    c.data.normalization = "own"  # the data set's own statistics, or a name in STATISTICS
    # Sets that are read in streams from disk (imagenet2012, tfds:NAME, folder):
    c.data.streams = 64  # the order is cut into so many, on any number of hosts; divides the batch
    c.data.backend = "tf"  # reads TFRECORD files; "grain" reads ARRAY_RECORD files
    c.data.shuffle_buffer = 64  # records that a stream of TFRECORD files keeps to draw from
    c.data.crop_area = 0.08  # smallest share of an image that its random crop covers
    c.data.antialias = False  # when images are made smaller; as PyTorch does it, at half the speed
    c.data.on_error = "raise"  # at a damaged record, or "skip": replace it, count and tell

    c.train = ml_collections.ConfigDict()
    c.train.epochs = 0.0  # length of the run in passes over the training split ...
    c.train.steps = 0  # ... or in updates; exactly one of the two is set
    c.train.batch_size = 64  # over all devices
    c.train.eval_batch_size = 256  # over all devices
    c.train.eval_every = 0  # steps between evaluations; 0: once per epoch
    c.train.checkpoint_every = 0  # steps between checkpoints; 0: once per epoch
    c.train.log_every = 10  # steps between lines of training metrics
    c.train.conflict_every = 100  # steps between measurements of the angles between the exits'
    # gradients, which take a gradient tree per exit of memory; 0: off
    c.train.best_metric = "eval/mean/top1"  # the checkpoint with its highest value is kept
    c.train.init_from = config_dict.placeholder(str)  # workdir whose weights the run starts from
    c.train.freeze = ()  # patterns of parameter paths that keep their weights; see freeze.py
    c.train.accumulation = 1  # microbatches per update; batch statistics are each one's own
    c.train.rematerialise = False  # recompute segments in the backward pass, to save memory
    c.train.ema = 0.0  # decay of averaged parameters and statistics, then evaluated; 0: none
    c.train.checkpoint_minutes = 0.0  # also save when so many minutes have passed; 0: off
    c.train.profile_steps = ()  # (first, last): a profiler trace of these steps, in profile/
    c.train.peak_flops = 0.0  # of one device, per second, for train/mfu; 0: not reported
    c.train.precision = "float32"  # of the computation: "float32", "bfloat16" or "float64"
    c.train.compilation_cache = "~/.cache/dfs_jax"  # compiled programs kept on disk; "": nowhere

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1  # devices that cut the batch only; -1: all that are left
    c.mesh.fsdp = 1  # devices that also spread parameters and optimizer state among them
    return c.lock()


def set_network(c: ml_collections.ConfigDict, name: str, **options: Any) -> None:
    """Choose network `name` and some of its options; raises ConfigError for an unknown one."""
    from dfs_jax import models

    c.model.name = name
    try:
        known = models.options(name)
    except ValueError as error:
        raise ConfigError(f"config.model.name: {error}") from None
    c.model.options = _options(known, options, "model.options")


def set_gradients(c: ml_collections.ConfigDict, name: str, **options: Any) -> None:
    """Choose gradient method `name` and some of its options; raises ConfigError likewise."""
    from dfs_jax import gradients

    c.gradients.name = name
    try:
        known = gradients.options(name)
    except ValueError as error:
        raise ConfigError(f"config.gradients.name: {error}") from None
    c.gradients.options = _options(known, options, "gradients.options")


def _options(known: Mapping[str, Any], chosen: Mapping[str, Any], where: str):
    result = ml_collections.ConfigDict({k: v for k, v in known.items() if v is not None})
    for key, value in known.items():
        if value is None:
            result[key] = config_dict.placeholder(float)
    for key, value in chosen.items():
        if key not in known:
            raise ConfigError(f"config.{where}.{key}: {_unknown(key, known, 'option')}")
        result[key] = value
    return result.lock()


def scale_learning_rate(c: ml_collections.ConfigDict, reference_batch_size: int) -> None:
    """Linear scaling rule: multiply the learning rate by batch size / `reference_batch_size`.

    For a configuration file whose batch size is not the one that its recipe's rate was found
    for; warm up over a few epochs with it (arXiv 1706.02677, sections 2.1 and 2.2).
    """
    if reference_batch_size < 1:
        raise ConfigError(f"the reference batch size must be positive, got {reference_batch_size}")
    c.optimizer.learning_rate *= c.train.batch_size / reference_batch_size


def apply_preset(
    c: ml_collections.ConfigDict,
    preset: str | None,
    *,
    networks: Mapping[str, Callable[[ml_collections.ConfigDict], None]],
    methods: Mapping[str, Callable[[ml_collections.ConfigDict], None]],
) -> ml_collections.ConfigDict:
    """Apply a comma list of at most one network word and one method word, in any order.

    The first entry of `networks` and of `methods` is the default. Each value changes `c` in
    place; the network's change comes first. Raises ConfigError for an unknown or second word.
    """
    chosen = {"network": next(iter(networks)), "method": next(iter(methods))}
    seen: dict[str, str] = {}
    for word in filter(None, (w.strip() for w in (preset or "").split(","))):
        kind = "network" if word in networks else "method" if word in methods else None
        if kind is None:
            raise ConfigError(
                f"preset word {word!r} is unknown; networks: {', '.join(networks)}; "
                f"methods: {', '.join(methods)}"
            )
        if kind in seen:
            raise ConfigError(f"preset names two {kind}s, {seen[kind]!r} and {word!r}; give one")
        seen[kind] = chosen[kind] = word
    networks[chosen["network"]](c)
    methods[chosen["method"]](c)
    return c


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
    spec.loader.exec_module(module)
    return module


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
    before, after, ignored = _flatten(there), _flatten(now), set(ignored)
    lines = []
    for path in sorted(before.keys() | after.keys()):
        skip = path in ignored or path.split(".")[0] in ignored
        if not skip and before.get(path) != after.get(path):
            lines.append(f"{path}: {before.get(path)!r} there, {after.get(path)!r} now")
    return lines


def _flatten(c: ml_collections.ConfigDict) -> dict[str, Any]:
    flat = {}

    def walk(node, prefix):
        for key, value in node.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    walk(json.loads(to_json(c)), "")
    return flat


def _merge(c: ml_collections.ConfigDict, saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        if isinstance(value, Mapping) and isinstance(c.get(key), ml_collections.ConfigDict):
            _merge(c[key], value)
        elif value is not None:
            c[key] = _tuples(value)


def _tuples(value: Any) -> Any:
    """JSON's lists, at any depth, as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _get_config(file: str, preset: str | None) -> ml_collections.ConfigDict:
    module = load_module(file)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config: {file!r} has no function get_config(preset)")
    try:
        return module.get_config(preset)
    except (AttributeError, KeyError, TypeError) as error:  # a wrong field or type in the file
        # ml_collections quotes its own message once more, which escapes its line break.
        reason = str(error.args[0] if error.args else error)
        reason = reason.replace("\\n", "; ").replace("\\", "")
        raise ConfigError(f"{file}: {reason}") from error


def _split(item: str) -> tuple[str, str]:
    path, equals, text = item.partition("=")
    if not equals:
        raise ConfigError(f"--config.{item}: give a value as --config.{item}=VALUE")
    return path, text


def _override(c: ml_collections.ConfigDict, path: str, text: str) -> None:
    *parents, leaf = path.split(".")
    node: Any = c
    for depth, key in enumerate([*parents, leaf]):
        if not isinstance(node, ml_collections.ConfigDict):
            raise ConfigError(f"config.{path}: {'.'.join(parents[:depth])} has no fields")
        if key not in node:
            raise ConfigError(f"config.{path}: {_unknown(key, node, 'field')}")
        if depth < len(parents):
            node = node[key]
    if isinstance(node[leaf], ml_collections.ConfigDict):
        raise ConfigError(f"config.{path} is a section; its fields: {_listed(node[leaf])}")
    try:
        value = _parse(text, node.get_type(leaf))
        # Only placeholders, which ml_collections keeps as references, can be None.
        fields = dict(node.items(preserve_field_references=True))
        if value is None and not isinstance(fields[leaf], config_dict.FieldReference):
            raise ValueError(text)
        node[leaf] = value
    except (TypeError, ValueError):
        kind = node.get_type(leaf).__name__
        raise ConfigError(f"config.{path}: {text!r} is not a value of type {kind}") from None


def _parse(text: str, kind: type) -> Any:
    if kind is str:
        return text
    if kind is bool:
        words = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        raise ValueError(text) from None
    if kind is tuple and not isinstance(value, tuple):
        return tuple(value) if isinstance(value, list) else (value,)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind and value is not None:
        raise ValueError(text)
    return value


def _unknown(key: str, known: Any, what: str) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {_listed(known)}"
    return f"there is no such {what}; {hint}"


def _listed(known: Any) -> str:
    return ", ".join(sorted(known)) or "none"
