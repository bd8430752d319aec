"""Phases of a run, `train.phases`: parts of its steps that train other things, or otherwise.

    train.phases = ({"share": 0.5, "trains": "last"}, {"share": 0.5})

is a backbone with its last exit for half of the steps, then everything. What a phase may say is
in `Phase`; all that it leaves out is as the configuration has it. A run goes from phase to phase by
itself, and goes on in the middle of one as everywhere else.

The network answers alike in all phases, so that evaluation needs not know them, and the state has
one layout: what differs is which losses count, which weights move and how fast.
"""

import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from dfs_jax.config import ConfigError, limits
from dfs_jax.config.errors import shown, unknown
from dfs_jax.gradients.paths import exits_by_tensor
from dfs_jax.gradients.problem import Problem
from dfs_jax.models import MultiExit, traced
from dfs_jax.objectives import Objective
from dfs_jax.surgery import Surgery
from dfs_jax.training import freeze

TRAINS = ("all", "last", "exits")


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase; the fields of an entry of `train.phases`.

    Attributes:
      share: of the run's steps, above 0; those of all phases add up to 1.
      trains: "all"; "last": the last exit with all that it uses, by its loss alone; "exits": what
        the other exits have of their own, by their losses, on a backbone that stays.
      freeze: patterns of parameter paths that keep their weights, besides `train.freeze`.
      rates: (pattern, factor) pairs: updates of the parameters that a pattern finds are multiplied.
      surgery: fields of `surgery` that differ.
      objective: fields of `objective` that differ.
      optimizer: fields of `optimizer` that differ.
      goes_on: with the optimizer's state and the schedule of the phase before; otherwise both
        begin anew, warm-up and milestones too.

    Raises ValueError for values out of range.
    """

    share: float
    trains: str = "all"
    freeze: tuple[str, ...] = ()
    rates: tuple[tuple[str, float], ...] = ()
    surgery: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    objective: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    goes_on: bool = False

    def __post_init__(self):
        patterns = isinstance(self.freeze, tuple) and all(isinstance(p, str) for p in self.freeze)
        for field, fits, wanted in (
            ("share", _is_number(self.share) and 0 < self.share <= 1, "lie in (0, 1]"),
            ("trains", self.trains in TRAINS, f"be one of {', '.join(TRAINS)}"),
            ("freeze", patterns, "be a tuple of texts"),
            ("rates", _are_rates(self.rates), "be pairs of a pattern and a factor of 0 or more"),
            ("surgery", isinstance(self.surgery, Mapping), "be a dictionary of fields"),
            ("objective", isinstance(self.objective, Mapping), "be a dictionary of fields"),
            ("optimizer", isinstance(self.optimizer, Mapping), "be a dictionary of fields"),
            ("goes_on", isinstance(self.goes_on, bool), "be True or False"),
        ):
            if not fits:
                raise ValueError(f"{field} must {wanted}, got {shown(getattr(self, field))}")
        if self.goes_on and self.optimizer:
            raise ValueError(
                "goes_on keeps the optimizer of the phase before; optimizer must be {}"
            )

    def config(self, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
        """The whole run's configuration with what differs in this phase. Raises ConfigError."""
        own = config.copy_and_resolve_references()
        for section in ("surgery", "objective", "optimizer"):
            for key, value in getattr(self, section).items():
                if key not in own[section]:
                    raise ConfigError(f"{section}.{key}: {unknown(key, own[section], 'field')}")
                try:
                    own[section][key] = value
                except TypeError:
                    kind = own[section].get_type(key).__name__
                    told = f"{section}.{key}: {shown(value)} is not a value of type {kind}"
                    raise ConfigError(told) from None
        own.train.freeze = (*config.train.freeze, *self.freeze)
        limits.check(own)
        return own


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_rates(rates: Any) -> bool:
    return isinstance(rates, tuple) and all(
        isinstance(pair, tuple)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and _is_number(pair[1])
        and 0 <= pair[1] < math.inf
        for pair in rates
    )


def from_config(config: ml_collections.ConfigDict) -> tuple[Phase, ...]:
    """The phases of `train.phases`. Raises ConfigError, naming the entry (the first is 1)."""
    found = []
    names = [field.name for field in dataclasses.fields(Phase)]
    for i, entry in enumerate(config.train.phases):
        with named(i):
            for key in entry:
                if key not in names:
                    raise ValueError(f"{key}: {unknown(str(key), names, 'field of a phase')}")
            if "share" not in entry:
                raise ValueError("share is missing: the phase's share of the steps")
            found.append(Phase(**entry))
    total = sum(phase.share for phase in found)
    if found and not math.isclose(total, 1, abs_tol=1e-6):
        raise ConfigError(f"train.phases: the shares of all phases add up to {total:g}, not to 1")
    if found and found[0].goes_on:
        with named(0):
            raise ValueError("goes_on is for later phases; before the first there is none")
    return tuple(found)


@contextlib.contextmanager
def named(i: int) -> Iterator[None]:
    """What is refused within becomes a ConfigError about phase number `i`, from 0."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ConfigError(f"train.phases, phase {i + 1}: {error}") from error


def first_steps(phases: tuple[Phase, ...], total_steps: int) -> list[int]:
    """For each phase the updates done when it begins; raises ConfigError for an empty one."""
    shares = np.cumsum([0.0, *(phase.share for phase in phases)])
    edges = [round(share * total_steps) for share in shares]
    for i, (first, after) in enumerate(itertools.pairwise(edges)):
        if first == after:
            with named(i):
                share = phases[i].share
                raise ValueError(f"a share of {share:g} of {total_steps} steps is no step")
    return edges[:-1]


def schedule_extents(phases: tuple[Phase, ...], firsts: list[int], total_steps: int):
    """For each phase (first step, number of steps) of the schedule that it follows.

    Phases that go on share the one of those before.
    """
    begins = [first for phase, first in zip(phases, firsts, strict=True) if not phase.goes_on]
    ends = [*begins[1:], total_steps]
    extents = dict(zip(begins, ends, strict=True))
    of_phase = [max(begin for begin in begins if begin <= first) for first in firsts]
    return [(begin, extents[begin] - begin) for begin in of_phase]


def counted(phase: Phase, objective: Objective, num_exits: int) -> Objective:
    """`objective` with weight 0 for the exits whose losses do not count in `phase`."""
    if phase.trains == "all":
        return objective
    weights = list(objective.exit_weights or (1.0,) * num_exits)
    for i in range(num_exits):
        if (i == num_exits - 1) != (phase.trains == "last"):
            weights[i] = 0.0
    return dataclasses.replace(objective, exit_weights=tuple(weights))


def same_answers(a: Surgery, b: Surgery) -> bool:
    """Whether a network answers alike with either surgery."""

    def cuts(surgery: Surgery) -> Surgery | None:
        blind = surgery.partition and not surgery.referencing
        return dataclasses.replace(surgery, exit_gradient="own") if blind else None

    return cuts(a) == cuts(b)


def kept(phase: Phase, network: MultiExit, batch: Any) -> tuple[str, ...]:
    """Patterns of all that `trains` leaves as it is: parameters and statistics.

    Read from the network's own computation on a `batch` of shapes, so that no network needs to
    tell which of its parts are whose.
    """
    if phase.trains == "all":
        return ()
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), traced.variables(network, batch))
    params, statistics = variables["params"], variables.get("batch_stats", {})
    given = batch if isinstance(batch, Mapping) else {"input": batch}  # one needs no name
    problem = Problem(network, Objective(), given, statistics, jax.random.key(0))
    used = exits_by_tensor(problem, params)
    inside, outside = set(), set()
    for path, exits in jax.tree_util.tree_leaves_with_path(used):
        of_last = bool(exits[-1])
        trained = of_last if phase.trains == "last" else exits.any() and not of_last
        (outside if trained else inside).add("/".join(str(entry.key) for entry in path))
    return _patterns(inside, outside)


def _patterns(inside: set[str], outside: set[str]) -> tuple[str, ...]:
    """Patterns that find the paths `inside`, and whatever lies beside them in their modules.

    Statistics lie beside parameters: a module none of whose parameters is `outside` is whole.
    """
    found = set()
    for path in inside:
        parts = path.split("/")
        prefixes = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
        found.add(
            next(p for p in prefixes if not any(o == p or o.startswith(f"{p}/") for o in outside))
        )
    return tuple(f"^{re.escape(prefix)}(/|$)" for prefix in sorted(found))


def same_layout(
    a: optax.GradientTransformation, b: optax.GradientTransformation, params: Any
) -> bool:
    """Whether two optimizers keep states of one layout for `params`, which are shapes."""
    return jax.eval_shape(a.init, params) == jax.eval_shape(b.init, params)


def optimizer(
    update: optax.GradientTransformation, phase: Phase, patterns: tuple[str, ...]
) -> optax.GradientTransformation:
    """`update` with nothing for what the `patterns` find, and with the phase's rates.

    The state is that of `update` in one layout, whatever the phase.
    """

    def scaled(updates, params=None):
        for pattern, factor in phase.rates:
            chosen = freeze.chosen([pattern], updates)
            updates = jax.tree.map(lambda u, on, f=factor: f * u if on else u, updates, chosen)
        return updates

    return optax.chain(update, freeze.still(patterns), optax.stateless(scaled))
