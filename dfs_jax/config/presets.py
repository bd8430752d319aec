"""Presets: the words after `FILE:`, and what a method word such as "dfs" sets in every file alike.

Network words are each file's own. A method word stands for a row of the published tables (arXiv
2407.13986) or, as `boost` and `cgt`, for a paper of its own, on whatever recipe the configuration
file has. A file takes `METHODS` as it is, or adds to a word what its own networks need.
`SECOND_STAGES` are words for runs that start from another run's weights.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from dfs_jax.config.errors import ConfigError
from dfs_jax.config.fields import set_gradients

Preset = Callable[[ml_collections.ConfigDict], None]  # changes a configuration in place


def apply_preset(
    c: ml_collections.ConfigDict,
    preset: str | None,
    *,
    networks: Mapping[str, Preset],
    methods: Mapping[str, Preset],
    sizes: Mapping[str, Preset] | None = None,
) -> ml_collections.ConfigDict:
    """Apply a comma list of at most one network, size and method word each, in any order.

    The first entry of each kind is its default. The network's change comes first, then that of the
    size. Raises ConfigError for an unknown or second word.
    """
    words = {"network": networks, "size": sizes or {}, "method": methods}
    words = {kind: known for kind, known in words.items() if known}
    seen: dict[str, str] = {}
    for word in filter(None, (w.strip() for w in (preset or "").split(","))):
        kind = next((kind for kind, known in words.items() if word in known), None)
        if kind is None:
            every = "; ".join(f"{kind}s: {', '.join(known)}" for kind, known in words.items())
            raise ConfigError(f"preset word {word!r} is unknown; {every}")
        if kind in seen:
            raise ConfigError(f"preset names two {kind}s, {seen[kind]!r} and {word!r}; give one")
        seen[kind] = word
    for kind, known in words.items():
        known[seen.get(kind, next(iter(known)))](c)
    return c


def surgery(exit_gradient: str) -> Preset:
    """Deep Feature Surgery whose exits train the channels `exit_gradient`."""

    def apply(c: ml_collections.ConfigDict) -> None:
        set_gradients(c, "joint")
        c.surgery.partition = True
        c.surgery.referencing = True
        c.surgery.exit_gradient = exit_gradient

    return apply


def method(name: str, **options: Any) -> Preset:
    """Gradient method `name` on the whole features, without surgery."""

    def apply(c: ml_collections.ConfigDict) -> None:
        set_gradients(c, name, **options)
        c.surgery.partition = False

    return apply


def in_phases(*phases: Mapping[str, Any]) -> Preset:
    """The summed loss without surgery, in `phases`; see `training/phases.py`."""

    def apply(c: ml_collections.ConfigDict) -> None:
        method("joint")(c)
        c.train.phases = phases

    return apply


def boost(c: ml_collections.ConfigDict) -> None:
    """BoostNet (AAAI 2023, arXiv 2211.16726), with the share of its CIFAR-100 runs.

    Every exit adds to half of the logits before it (`models/multi_exit.py`); the backbone has
    gradient equilibrium.
    """
    method("equilibrium")(c)
    c.model.options.boosting = 0.5


METHODS: dict[str, Preset] = {
    "dfs": surgery("own"),  # the paper's definition
    "dfs_all": surgery("all"),  # what the official MSDNet code ran, and its published rows report
    "joint": method("joint"),  # MSDNet, DSN
    "ge": method("equilibrium"),
    "pcgrad": method("pcgrad"),
    "cagrad": method("cagrad"),
    "nash_mtl": method("nash_mtl"),
    "meta_gf": method("meta_gf"),
    "bdl1": method("bdl", variant="overlap", final_loss=False),
    "bdl2": method("bdl", variant="overlap", final_loss=True),
    "wpn": method("l2w_den"),
    # The backbone with its last exit first, then everything (ICML 2025, arXiv 2407.14320) ...
    "mixed": in_phases({"share": 0.5, "trains": "last"}, {"share": 0.5}),
    # ... or then the other exits on what it is.
    "disjoint": in_phases({"share": 0.5, "trains": "last"}, {"share": 0.5, "trains": "exits"}),
    "boost": boost,
    "cgt": method("confidence_gated", gate="soft"),  # arXiv 2509.17885
}


# Everything but the last dense layer of each exit and what collaboration adds, in any network.
_BACKBONE = r"^(?!collaborators_|heads_|exits_\d+/(dense|fc|head)/)"


def imta(c: ml_collections.ConfigDict) -> None:
    """The second stage of IMTA (ICCV 2019, arXiv 1908.06294), on the weights of a run with `ge`.

        --config FILE:ge                                       --workdir FIRST
        --config FILE:imta --config.train.init_from=FIRST      --workdir SECOND

    The backbone is frozen; exits see the previous exit's answer and learn from the last one's
    (one-for-all distillation, T = 1 and a share of 0.1 as for ImageNet). The official code starts
    the last layers afresh, and its teacher is the first stage's last exit, of which the last one
    learns too; here they go on from the first stage, and the teacher is today's last exit.
    """
    method("joint")(c)
    c.model.options.collaboration = True
    c.model.options.adapters = False
    c.objective.logit_weight = 0.1
    c.objective.temperature = 1.0
    c.objective.scale_by_temperature = True
    c.objective.feature_weight = 0.0
    c.train.freeze = (_BACKBONE,)
    c.train.conflict_every = 0  # nothing that two exits share is trained


SECOND_STAGES: dict[str, Preset] = {"imta": imta}
