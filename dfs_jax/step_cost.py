"""What one training step costs, by method: compile time, FLOPs, memory, and seconds.

Three programs a method, all compiled from the pieces that training runs, on random images:

    forward           the losses of all exits, one pass in training mode
    forward_backward  what the gradient method makes of them (several passes for some methods)
    step              the training loop's own step: that, the optimizer, and what is measured

Every method is timed against a baseline in the same process, in turn (A B A B …), so that
whatever else the machine does meets both alike. Files and tables are made in
`benchmark_report.py`, the command is `benchmark.py`.
"""

import contextlib
import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from dfs_jax import compiler, experiment, flops, input_gradients, sharding, train
from dfs_jax import config as configuration
from dfs_jax.config import ConfigError
from dfs_jax.data import Data
from dfs_jax.data.pipeline import Batch, Spec, place
from dfs_jax.experiment import Run
from dfs_jax.gradients import Problem
from dfs_jax.input_gradients import InputGradients

PHASES = ("forward", "forward_backward", "step")
BASELINE = "joint"

log = logging.getLogger(__name__)

_WARMUP = 2  # calls that are not counted
# Nothing here depends on the length of an epoch, but schedules are made for one.
_STEPS_PER_EPOCH = 1000

Clock = Callable[[], float]


class Cost(NamedTuple):
    """What the compiler tells of one program; counts and bytes are those of one device."""

    trace_seconds: float  # tracing, and lowering to the compiler's input
    compile_seconds: float  # without the persistent cache
    flops: float
    bytes_accessed: float
    argument_bytes: int
    temporary_bytes: int
    peak_bytes: int  # arguments, temporaries, and results that take no argument's place


class Samples(NamedTuple):
    """Seconds of one call: a method's (P,), and the baseline's (P,) just before each of them.

    The baseline itself has all of its own and nothing to compare with.
    """

    own: tuple[float, ...]
    baseline: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return float(np.median(self.own))

    @property
    def ratios(self) -> np.ndarray:
        """Time over the baseline's, pair by pair: (P,)."""
        return np.array(self.own[: len(self.baseline)]) / np.array(self.baseline)


class Spread(NamedTuple):
    """Median and quartiles."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> "Spread":
        return cls(*map(float, np.quantile(values, (0.25, 0.5, 0.75))))


@dataclasses.dataclass(frozen=True)
class StepCost:
    """The cost of one method at one batch size. Costs and times are by phase."""

    method: str
    batch_size: int
    config_sha256: str  # of the resolved configuration, as a workdir would hold it
    costs: Mapping[str, Cost]
    times: Mapping[str, Samples]
    least_flops: float | None  # share of the baseline's that the definition needs; see `_least`
    input_gradients: InputGradients | None  # of layers that read a partitioned feature

    @property
    def images_per_second(self) -> float:
        """Over all devices, at the median step."""
        return self.batch_size / self.times["step"].median

    @property
    def seconds(self) -> dict[str, float]:
        """Medians: forward, backward and other add up to step."""
        forward, both, step = (self.times[phase].median for phase in PHASES)
        parts = {"forward": forward, "backward": both - forward, "other": step - both}
        return parts | {"step": step}

    @property
    def bound(self) -> float | None:
        """Gain in images per second if what is not computed took no time and the rest as before.

        1 / (1 - s / t) - 1 with the baseline's step t of this run, and s the time of the dead
        input gradients: for VGG, where surgery leaves beta of every feature's channels alive,
        (1 - beta) times that of the input gradients.
        """
        if self.input_gradients is None:
            return None
        step = float(np.median(self.times["step"].baseline))
        return 1 / (1 - self.input_gradients.dead_seconds / step) - 1


def sha256(config: ml_collections.ConfigDict) -> str:
    """Hex digest of a resolved configuration."""
    return hashlib.sha256(configuration.to_json(config).encode()).hexdigest()


# Random images in the place of data.


@dataclasses.dataclass(frozen=True)
class RandomImages:
    """A training source of one batch of normal noise, again and again."""

    config: ml_collections.ConfigDict
    spec: Spec
    size: int

    def batches(
        self, start: int = 0, sharding: jax.sharding.NamedSharding | None = None
    ) -> Iterator[Batch]:
        """As `pipeline.TrainSource`; labels are distributions where the configuration mixes."""
        del start
        count, classes = self.config.train.batch_size, self.spec.num_classes
        rng = np.random.default_rng(0)
        images = rng.standard_normal((count, *self.spec.image_shape)).astype(np.float32)
        labels = rng.integers(0, classes, count).astype(np.int32)
        if self.config.data.mixup or self.config.data.cutmix:
            labels = np.eye(classes, dtype=np.float32)[labels]
        batch = {"image": place(images, sharding), "label": place(labels, sharding)}
        while True:
            yield batch


def random_run(config: ml_collections.ConfigDict, num_classes: int | None = None) -> Run:
    """`experiment.prepare` of `config` on random images, of the shape of the configured data.

    Needs no data. Raises ConfigError as `prepare` does, and where the shape of the images or
    the number of classes is not known.
    """
    name, side = config.data.name, config.data.image_size
    (height, width, channels), classes = flops.DATA_SETS.get(name, ((0, 0, 3), num_classes))
    if not side and not height:
        raise ConfigError(
            f"the size of the images of data set {name!r} is not known here; give "
            "--config.data.image_size=PIXELS"
        )
    if not (num_classes or classes):
        raise ConfigError(
            f"the number of classes of data set {name!r} is not known here; give --num_classes"
        )
    if config.train.accumulation != 1:
        raise ConfigError(
            "the parts of a step with accumulation cannot be told apart; train.accumulation must "
            f"be 1, got {config.train.accumulation}"
        )
    shape = (side, side, channels) if side else (height, width, channels)
    size = config.train.batch_size * _STEPS_PER_EPOCH
    spec = Spec(name, shape, num_classes or classes, (), size, 0, 0)
    images = RandomImages(config, spec, size)
    return experiment.prepare(config, source=Data(images, None, None, spec))


# Programs.


class Program:
    """A compiled function (carry, …) -> (carry, result), called with what the last call left.

    Called, it runs `calls` times, waits for the last `result` and returns `calls`.
    """

    result: Any

    def __init__(self, compiled: Callable, cost: Cost, carry: Any, arguments: Any, calls: int):
        self.cost = cost
        self._compiled, self._carry, self._arguments = compiled, carry, arguments
        self._calls = calls

    def __call__(self) -> int:
        for _ in range(self._calls):
            self._carry, self.result = self._compiled(self._carry, *self._arguments)
        jax.block_until_ready((self._carry, self.result))
        return self._calls


def programs(run: Run, calls: int) -> dict[str, Program]:
    """The compiled programs of `run` by phase, each to be run `calls` times in a row.

    A method with phases of its own runs whole cycles.
    """
    calls = -(-calls // run.method.cycle) * run.method.cycle
    batch = next(run.data.train.batches(0, sharding.batch(run.mesh)))
    state = train.initial_state(run)
    weights = jax.tree.map(jnp.copy, (state.params, state.batch_stats, state.step))

    def problem(weights, batch):
        params, batch_stats, step = weights
        rng = jax.random.fold_in(jax.random.key(run.config.seed), step)
        dropout_rng, method_rng = jax.random.split(rng)
        own = Problem(run.network, run.objective, batch, batch_stats, dropout_rng)
        return own, params, method_rng

    def forward(carry, weights, batch):
        own, params, _ = problem(weights, batch)
        return carry, own.losses(params)

    def forward_backward(method_state, weights, batch):
        own, params, rng = problem(weights, batch)
        result, aux, method_state = run.method.apply(own, params, method_state, rng)
        return method_state, (result, aux)

    method_state = jax.tree.map(jnp.copy, state.method_state)
    step = train.make_train_step(run)
    prepared = {
        "forward": (compiler.jit(forward), (), (weights, batch)),
        "forward_backward": (compiler.jit(forward_backward), method_state, (weights, batch)),
        "step": (step, state, (batch,)),
    }
    result = {}
    for phase, (function, carry, arguments) in prepared.items():
        compiled, cost = compiled_cost(function, carry, *arguments)
        result[phase] = Program(compiled, cost, carry, arguments, calls)
    return result


def compiled_cost(function: Any, *arguments: Any) -> tuple[Callable, Cost]:
    """The jitted `function` compiled for `arguments`, from nothing, and what that cost."""
    with persistent_cache(None):
        jax.clear_caches()  # of what earlier programs traced
        began = time.perf_counter()
        lowered = function.lower(*arguments)
        traced = time.perf_counter()
        compiled = lowered.compile()
        done = time.perf_counter()
    counts, memory = compiled.cost_analysis(), compiled.memory_analysis()
    occupied = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    cost = Cost(
        trace_seconds=traced - began,
        compile_seconds=done - traced,
        flops=compiler.flops(compiled),
        bytes_accessed=float(counts.get("bytes accessed", 0.0)),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=occupied + results,
    )
    return compiled, cost


@contextlib.contextmanager
def persistent_cache(directory: str | None) -> Iterator[None]:
    """Keeps compiled programs in `directory`, however small, or with None nowhere."""
    wanted = {
        "jax_enable_compilation_cache": directory is not None,
        "jax_compilation_cache_dir": directory,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        _configure(wanted)
        yield
    finally:
        _configure(before)


def _configure(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks at its settings only once


# Time.


def time_pairs(
    groups: Mapping[str, Mapping[str, Callable[[], int]]],
    baseline: str,
    pairs: int,
    clock: Clock = time.perf_counter,
) -> dict[str, dict[str, Samples]]:
    """Seconds of every call of every group, each paired with the `baseline` just before it.

    A call runs to its end and returns how often it did its work. A round takes one group after
    the other, so that they meet the same machine; in a group every call in turn, with the
    baseline again before each: A B A C.
    """
    own = {group: {name: [] for name in calls} for group, calls in groups.items()}
    before = {group: {name: [] for name in calls} for group, calls in groups.items()}
    for calls in groups.values():
        for call in calls.values():
            for _ in range(_WARMUP):
                call()
    for _ in range(pairs):
        for group, calls in groups.items():
            others = [name for name in calls if name != baseline]
            for other in others or [None]:
                reference = _seconds(calls[baseline], clock)
                own[group][baseline].append(reference)
                if other is not None:
                    before[group][other].append(reference)
                    own[group][other].append(_seconds(calls[other], clock))
    return {
        group: {
            name: Samples(tuple(own[group][name]), tuple(before[group][name])) for name in calls
        }
        for group, calls in groups.items()
    }


def _seconds(call: Callable[[], int], clock: Clock) -> float:
    began = clock()
    count = call()
    return (clock() - began) / count


def measure(
    runs: Mapping[str, Run], pairs: int, calls: int = 1, clock: Clock = time.perf_counter
) -> list[StepCost]:
    """The cost of every method of `runs`, all at one batch size, `BASELINE` among them."""
    compiled = {method: programs(run, calls) for method, run in runs.items()}
    groups = {phase: {m: own[phase] for m, own in compiled.items()} for phase in PHASES}
    times = time_pairs(groups, BASELINE, pairs, clock)
    for method, own in compiled.items():
        if not own["step"].result["finite"]:
            log.warning(
                "%s diverged on the random images; a method that solves a problem in every step "
                "may take another time for it. A smaller optimizer.learning_rate cures that",
                method,
            )
    return [
        StepCost(
            method=method,
            batch_size=run.config.train.batch_size,
            config_sha256=sha256(run.config),
            costs={phase: program.cost for phase, program in compiled[method].items()},
            times={phase: times[phase][method] for phase in PHASES},
            least_flops=_least(run, runs[BASELINE]),
            input_gradients=_input_gradients(run, pairs, calls, clock),
        )
        for method, run in runs.items()
    ]


def _least(run: Run, baseline: Run) -> float | None:
    """The smallest multiply-adds that the definition of surgery allows, over the baseline's.

    None for gradient methods that are more than one gradient of a sum of losses.
    """
    if run.config.gradients.name != "joint":
        return None
    least, whole = (
        flops.minimal_training_multiply_adds(r.network, r.data.spec.image_shape)
        for r in (run, baseline)
    )
    return least / whole


def _input_gradients(run: Run, samples: int, calls: int, clock: Clock) -> InputGradients | None:
    if run.config.gradients.name != "joint" or not run.network.surgery.partition:
        return None
    per_device = run.config.train.batch_size // run.mesh.size
    shape = (per_device, *run.data.spec.image_shape)
    return input_gradients.measure(run.network, shape, samples, calls, clock)
