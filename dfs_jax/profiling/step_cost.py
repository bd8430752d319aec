"""What one training step costs, by method: compile time, FLOPs, memory, and seconds.

Three programs a method, all made of the functions of `training/step.py`, on random images:

    forward           the losses of all exits, one pass in training mode
    forward_backward  what the gradient method makes of them (several passes for some methods)
    step              the training loop's own step: that, the optimizer, and what is measured

Every method is timed against a baseline in the same process, in turn (A B A B …), so that
whatever else the machine does meets both alike. Files and tables are made in `report.py`, the
command is `benchmark.py`.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dfs_jax import config as configuration
from dfs_jax.distributed import placement
from dfs_jax.models.cost import minimal_training_multiply_adds
from dfs_jax.profiling import input_gradients
from dfs_jax.profiling.compiled import Cost, Program, compiled_cost
from dfs_jax.profiling.input_gradients import InputGradients
from dfs_jax.profiling.timing import Samples, time_pairs
from dfs_jax.training.run import Run
from dfs_jax.training.state import initial_state
from dfs_jax.training.step import apply_method, jit, make_train_step, step_problem

PHASES = ("forward", "forward_backward", "step")
BASELINE = "joint"

log = logging.getLogger(__name__)


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


def programs(run: Run, calls: int) -> dict[str, Program]:
    """The compiled programs of `run` by phase, each to be run `calls` times in a row.

    A method with phases of its own runs whole cycles.
    """
    calls = -(-calls // run.method.cycle) * run.method.cycle
    batch = next(run.data.train.batches(0, placement.batch(run.mesh)))
    state = initial_state(run)
    # The step takes the arrays of its state for itself; the others look at these.
    fixed = state.replace(opt_state=None, method_state=None, ema=None)
    fixed, method_state = jax.tree.map(jnp.copy, (fixed, state.method_state))

    def forward(carry, fixed, batch):
        problem, _ = step_problem(run, fixed, batch)
        return carry, problem.losses(fixed.params)

    def forward_backward(method_state, fixed, batch):
        after, passes = apply_method(run, fixed.replace(method_state=method_state), batch)
        return after.method_state, (passes, after.batch_stats)

    prepared = {
        "forward": (jit(run, forward), (), (fixed, batch)),
        "forward_backward": (jit(run, forward_backward), method_state, (fixed, batch)),
        "step": (make_train_step(run), state, (batch,)),
    }
    result = {}
    for phase, (function, carry, arguments) in prepared.items():
        compiled, cost = compiled_cost(function, carry, *arguments)
        result[phase] = Program(compiled, cost, carry, arguments, calls)
    return result


def measure(runs: Mapping[str, Run], pairs: int, calls: int = 1) -> list[StepCost]:
    """The cost of every method of `runs`, all at one batch size, `BASELINE` among them."""
    compiled = {method: programs(run, calls) for method, run in runs.items()}
    groups = {phase: {m: own[phase] for m, own in compiled.items()} for phase in PHASES}
    times = time_pairs(groups, BASELINE, pairs)
    for method, own in compiled.items():
        if not own["step"].result.finite:
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
            input_gradients=_input_gradients(run, pairs, calls),
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
        minimal_training_multiply_adds(r.network, r.data.spec.batch(1)) for r in (run, baseline)
    )
    return least / whole


def _input_gradients(run: Run, samples: int, calls: int) -> InputGradients | None:
    if run.config.gradients.name != "joint" or not run.network.surgery.partition:
        return None
    per_device = run.config.train.batch_size // run.mesh.size
    shape = run.data.spec.batch(per_device).shape
    return input_gradients.measure(run.network, shape, samples, calls)
