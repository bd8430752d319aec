"""The networks by name, with the options each of them takes and the published values."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from dfs_jax.models.layers import full_precision
from dfs_jax.models.msdnet import MSDNet
from dfs_jax.models.multi_exit import MultiExit
from dfs_jax.models.resnet import ResNet
from dfs_jax.models.vgg import VGG
from dfs_jax.models.vit import ViT
from dfs_jax.surgery import Surgery


@dataclasses.dataclass(frozen=True)
class Network:
    """A network's class, what makes it this network, what a user may choose, and its dropout."""

    build: Callable[..., MultiExit]
    fixed: Mapping[str, Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dropout_rate: float = 0.0


_VIT_OPTIONS = {"depth": 12, "patch_size": 16, "first_exit": 6}

_NETWORKS: dict[str, Network] = {
    # arXiv 1703.09844, with the settings of the official DFS code.
    "msdnet_cifar100": Network(
        MSDNet,
        {"factors": (1, 2, 4), "bottlenecks": (1, 2, 4)},
        {"steps": (4, 2, 2, 2, 2, 2, 2), "initial": 16, "growth": 16, "reduction": 0.5},
        dropout_rate=0.5,
    ),
    "msdnet_imagenet": Network(
        MSDNet,
        {
            "factors": (1, 2, 4, 4),
            "bottlenecks": (1, 2, 4, 4),
            "exit_width": None,
            "imagenet_stem": True,
        },
        {"steps": (4, 4, 4, 4, 4), "initial": 32, "growth": 16, "reduction": 0.5},
        dropout_rate=0.5,
    ),
    # Ours: a small one for 8×8 images.
    "msdnet_digits": Network(
        MSDNet,
        {"factors": (1, 2), "bottlenecks": (1, 2), "exit_width": 32, "exit_depth": 1},
        {"steps": (2, 1, 1, 1), "initial": 16, "growth": 16, "reduction": 0.5},
        dropout_rate=0.5,
    ),
    "vgg7_cifar100": Network(
        VGG, {}, {"widths": ((64, 64), (128, 128), (256, 256)), "split_init": False}
    ),
    "vgg16_imagenet": Network(
        VGG,
        {},
        {
            "widths": ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
            "split_init": False,
        },
    ),
    # arXiv 1512.03385, table 1, with the exits of the official DFS code.
    "resnet18_cifar100": Network(ResNet, {"depths": (2, 2, 2, 2)}, {"width": 64}),
    "resnet34_cifar100": Network(ResNet, {"depths": (3, 4, 6, 3)}, {"width": 64}),
    "resnet50_cifar100": Network(
        ResNet, {"depths": (3, 4, 6, 3), "bottleneck": True}, {"width": 64}
    ),
    "resnet101_cifar100": Network(
        ResNet, {"depths": (3, 4, 23, 3), "bottleneck": True}, {"width": 64}
    ),
    # arXiv 2010.11929, table 1 (base), and timm's two smaller ones.
    "vit_tiny_patch16": Network(ViT, {"width": 192, "heads": 3}, _VIT_OPTIONS),
    "vit_small_patch16": Network(ViT, {"width": 384, "heads": 6}, _VIT_OPTIONS),
    "vit_base_patch16": Network(ViT, {"width": 768, "heads": 12}, _VIT_OPTIONS),
}


def names() -> tuple[str, ...]:
    """The networks that `create_model` knows."""
    return tuple(sorted(_NETWORKS))


def options(name: str) -> dict[str, Any]:
    """The options of a network with their published values, for a configuration.

    `dropout_rate` None stands for the published rate. Raises ValueError for an unknown name.
    """
    common = {"dropout_rate": None, "adapters": False, "collaboration": False, "boosting": 0.0}
    return common | _find(name).options


def create_model(
    name: str,
    *,
    num_classes: int,
    surgery: Surgery,
    dtype: Any = jnp.float32,
    dropout_rate: float | None = None,
    adapters: bool = False,
    collaboration: bool = False,
    boosting: float = 0.0,
    **options: Any,
) -> MultiExit:
    """The network `name` as a linen module with the contract of `multi_exit.py`.

    `dropout_rate=None` is the published rate; `adapters` adds the layers that only feature
    distillation uses; `collaboration` shows every exit but the first what the one before it has
    answered (`collaboration.py`), `boosting` adds that share of it to the exit's own answer
    (`multi_exit.py`); `options` are the network's own, see `options(name)`.

    Initial weights never depend on `surgery`, so that what is compared starts from the same ones;
    the option `split_init=True` of VGG, the official draw, is the one exception. Raises ValueError
    for an unknown name or option, naming the known ones, and for values out of range.
    """
    network = _find(name)
    unknown = sorted(set(options) - set(network.options))
    if unknown:
        known = ", ".join(network.options) or "none"
        raise ValueError(f"{name} has no option {unknown[0]!r}; its options: {known}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if dropout_rate is not None and not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate must lie in [0, 1), got {dropout_rate}")
    if not 0 <= boosting <= 1:
        raise ValueError(f"boosting must lie in [0, 1], got {boosting}")
    if boosting and collaboration:
        raise ValueError(
            "boosting and collaboration both say what an exit makes of the answer before it; "
            f"choose one, got boosting={boosting} and collaboration=True"
        )
    _check_values(name, options)
    full_precision(dtype)  # raises for what is not a type
    made = network.build(
        num_classes=num_classes,
        surgery=surgery,
        dtype=dtype,
        dropout_rate=network.dropout_rate if dropout_rate is None else dropout_rate,
        adapters=adapters,
        collaboration=collaboration,
        boosting=boosting,
        **network.fixed,
        **{**network.options, **options},
    )
    surgery.check(made.num_exits)
    return made


# Larger ones are slips: tracing so many layers takes minutes, so wide a layer any memory.
_MOST_LAYERS, _WIDEST = 250, 2**16
_LAYERS = ("steps", "widths", "depth")  # options that say how many layers there are


def _check_values(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for the first of `options` that no network of that name can have."""
    for option, value in options.items():
        where = f"{name}: model.options.{option}"
        if option == "reduction" and not 0 < value <= 1:
            raise ValueError(f"{where} must lie in (0, 1], got {value}")
        numbers = _whole_numbers(where, value)
        least = 0 if option == "first_exit" else 1
        if any(not least <= number <= _WIDEST for number in numbers):
            raise ValueError(f"{where} must be {least} to {_WIDEST:,}, got {value}")
        if option in _LAYERS:
            layers = len(numbers) if option == "widths" else sum(numbers)
            if layers > _MOST_LAYERS:
                raise ValueError(f"{where} makes {layers} layers; there can be {_MOST_LAYERS}")


def _whole_numbers(where: str, value: Any) -> list[int]:
    """Those in an option's value; raises ValueError for an empty tuple, at any depth."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise ValueError(f"{where} must name at least one layer of each part, got nothing")
        return [number for one in value for number in _whole_numbers(where, one)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


def _find(name: str) -> Network:
    if name not in _NETWORKS:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(names())}")
    return _NETWORKS[name]
