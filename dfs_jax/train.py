"""The training loop: one file, top to bottom.

    prepare ─► restore or initialise ─► [evaluate ─► checkpoint ─► next batch ─► step]* ─► test

A run killed at any moment and started again with the same command ends with the same
parameters: the state is a function of the step, batches are a pure function of the step, and
whatever was logged beyond the restored checkpoint is removed. What one update does is in
`make_train_step`; methods, objectives, networks and data come from their own packages, and a
new one never needs a change here.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from etils import epath

from dfs_jax import checkpoint, data, evaluate, experiment, flops, metrics, optim, sharding
from dfs_jax import config as configuration
from dfs_jax.config import ConfigError
from dfs_jax.data import pipeline
from dfs_jax.gradients import GradientMethod, Problem
from dfs_jax.models import MultiExit
from dfs_jax.objectives import Objective

log = logging.getLogger(__name__)

# What may change between two runs in one workdir; a change elsewhere is another experiment.
_FREE = {
    "data.dir",
    "mesh",
    "train.checkpoint_every",
    "train.eval_batch_size",
    "train.eval_every",
    "train.log_every",
}


_PARAMETERS = "parameters.txt"  # of the workdir: name, shape and size of every parameter


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds. `step` counts completed updates."""

    step: jax.Array  # () int32
    params: Any
    batch_stats: Any
    opt_state: Any
    method_state: Any
    ema: Any  # averaged parameters, or None

    @property
    def variables(self) -> dict[str, Any]:
        """What the network is applied to."""
        return {"params": self.params, "batch_stats": self.batch_stats}


class Run(NamedTuple):
    """The pieces of one run, made from its configuration."""

    config: ml_collections.ConfigDict
    data: data.Data
    network: MultiExit
    objective: Objective
    method: GradientMethod
    optimizer: optax.GradientTransformation
    schedule: Callable[[int], Any]
    mesh: jax.sharding.Mesh
    steps_per_epoch: float
    total_steps: int


def prepare(config: ml_collections.ConfigDict, workdir: str | None = None) -> Run:
    """Check the whole configuration, then prepare its data; nothing is compiled.

    With a `workdir`, refuses one that another experiment used. Raises ConfigError.
    """
    network = experiment.network(config, num_classes=1)
    objective = experiment.objective(config, network.num_exits)
    method = experiment.method(config)
    _check_train(config, network.num_exits)
    optim.create_optimizer(config, steps_per_epoch=1.0, total_steps=1)
    mesh = sharding.create_mesh(config)
    pipeline.check_batch(config, mesh.size)
    if workdir is not None:
        check_workdir(config, workdir)

    source = data.create(config)
    network = network.clone(num_classes=source.spec.num_classes)
    _check_images(network, source.spec.image_shape)
    steps_per_epoch = source.train.size / config.train.batch_size
    total = config.train.steps or math.ceil(config.train.epochs * steps_per_epoch)
    optimizer, schedule = optim.create_optimizer(config, steps_per_epoch, total)
    return Run(
        config,
        source,
        network,
        objective,
        method,
        optimizer,
        schedule,
        mesh,
        steps_per_epoch,
        total,
    )


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> dict[str, float]:
    """Train as `config` says in `workdir`, going on from its newest checkpoint.

    Returns the final metrics, `test/…` among them, and prints them as a table. Raises
    ConfigError for a configuration or workdir that cannot be used, before anything is compiled
    or changed; TrainingError when a loss is not finite.
    """
    run = prepare(config, workdir)
    directory = _open_workdir(config, workdir)
    print(sharding.describe(run.mesh), flush=True)
    costs = flops.exit_costs(run.network, run.data.spec.image_shape)

    held_out = run.data.validation
    best_metric = config.train.best_metric if held_out else None
    if held_out is None:
        log.warning("no validation split: eval/… is the test split, and no best checkpoint is kept")
        held_out = run.data.test
    with checkpoint.Checkpointer(directory / "checkpoints", best_metric=best_metric) as saver:
        state = restore_or_initialise(run, saver)
        start = int(jax.device_get(state.step))
        with metrics.MetricWriter(directory, start_step=start) as writer:
            if start < run.total_steps:
                _describe(run, state, directory)
                state = _loop(run, state, start, saver, writer, held_out)
            final = _test(run, state, writer)
    print(_final_table(final, costs, run), flush=True)
    return final


def _loop(run: Run, state: TrainState, start: int, saver, writer, held_out) -> TrainState:
    """Steps `start`+1 … total, with evaluation and checkpoints on their way."""
    train = run.config.train
    eval_every = train.eval_every or max(1, round(run.steps_per_epoch))
    checkpoint_every = train.checkpoint_every or max(1, round(run.steps_per_epoch))
    by_batch, everywhere = sharding.batch(run.mesh), sharding.replicated(run.mesh)
    train_step = make_train_step(run)
    count = evaluate.counter(run.network, everywhere)
    reporter = _Reporter(run, writer, start)

    batches = run.data.train.batches(start, by_batch)
    for step in range(start, run.total_steps + 1):
        last = step == run.total_steps
        scores: dict[str, float] = {}
        if step > start and (last or step % eval_every == 0):
            with reporter.paused():
                counts = evaluate.evaluate(count, state.variables, held_out, by_batch)
                scores = metrics.summarise(counts, "eval")
                reporter.evaluated(step, scores)
        if step > start and (last or step % checkpoint_every == 0):
            with reporter.paused():  # settles first: only a finite state is saved
                saver.save(step, state, {"step": step}, scores)
        if last:
            break
        with jax.transfer_guard("disallow"):  # a hidden host transfer would stall every step
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            state, measured = train_step(state, batch)
        reporter.step_done(step + 1, measured, waited)
    return state


def make_train_step(run: Run) -> Callable[[TrainState, Mapping[str, jax.Array]], Any]:
    """The compiled update (state, batch) -> (state, measurements); the state is donated.

    Measurements are device arrays: `losses` (N,), `correct` (N,) examples, `gradient_norm` and
    `update_norm` ().
    """
    network, objective, method, optimizer = run.network, run.objective, run.method, run.optimizer
    seed = run.config.seed

    def step(state: TrainState, batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        dropout_rng, method_rng = jax.random.split(rng)
        problem = Problem(network, objective, batch, state.batch_stats, dropout_rng)
        gradients, aux, method_state = method.apply(
            problem, state.params, state.method_state, method_rng
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        measured = {
            "losses": aux.losses,
            "correct": jnp.stack([_correct(z, batch["label"]) for z in aux.logits]),
            "gradient_norm": optax.global_norm(gradients),
            "update_norm": optax.global_norm(updates),
        }
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=aux.batch_stats,
            opt_state=opt_state,
            method_state=method_state,
        )
        return state, measured

    everywhere = sharding.replicated(run.mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=everywhere)


def _correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    labels = labels if labels.ndim == 1 else jnp.argmax(labels, -1)
    return jnp.sum(jnp.argmax(logits, -1) == labels)


# Where the first state comes from: the workdir's newest checkpoint, else fresh weights.


def restore_or_initialise(run: Run, saver: checkpoint.Checkpointer) -> TrainState:
    """The state to go on from, replicated over the mesh."""
    restored = saver.restore(abstract_state(run))
    if restored is not None:
        log.info("going on from the checkpoint of step %d", restored.step)
        return restored.state
    return initial_state(run)


def initial_state(run: Run) -> TrainState:
    """Fresh weights, drawn from the configuration's seed, replicated over the mesh."""
    # Hundreds of small random draws that run once: compiling them well would take longer.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    create = jax.jit(
        _create_state(run), out_shardings=sharding.replicated(run.mesh), compiler_options=quick
    )
    return create()


def abstract_state(run: Run) -> TrainState:
    """Shapes, types and placement of the state, without computing it."""
    everywhere = sharding.replicated(run.mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        jax.eval_shape(_create_state(run)),
    )


def _create_state(run: Run) -> Callable[[], TrainState]:
    def create():
        images = jnp.zeros((1, *run.data.spec.image_shape), jnp.float32)
        variables = run.network.init(jax.random.key(run.config.seed), images)
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=run.optimizer.init(params),
            method_state=run.method.init(params),
            ema=None,
        )

    return create


# The end: the test split, read once with the final weights.


def _test(run: Run, state: TrainState, writer: metrics.MetricWriter) -> dict[str, float]:
    count = evaluate.counter(run.network, sharding.replicated(run.mesh))
    counts = evaluate.evaluate(count, state.variables, run.data.test, sharding.batch(run.mesh))
    scores = metrics.summarise(counts, "test")
    writer.write(run.total_steps, scores)
    return scores


# What is checked before anything else.


def check_workdir(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Refuse, changing nothing, a workdir whose saved configuration is another experiment's."""
    try:
        saved = epath.Path(workdir) / "config.json"
        text = saved.read_text() if saved.exists() else None
    except OSError as error:
        raise ConfigError(f"--workdir: cannot read {workdir}: {error.strerror}") from error
    if text is None:
        return
    try:
        before = configuration.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--workdir: {saved} is not a saved configuration: {error}") from error
    free = set(_FREE)
    if config.optimizer.schedule != "cosine":  # the others do not depend on the run's length
        free |= {"train.epochs", "train.steps"}
    lines = configuration.differences(before, config, ignored=free)
    if lines:
        raise ConfigError(
            f"--workdir: {workdir} holds another experiment; {'; '.join(lines)}. "
            "Choose another workdir, or the saved values"
        )


def _open_workdir(config: ml_collections.ConfigDict, workdir: str) -> epath.Path:
    directory = epath.Path(workdir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            (directory / "config.json").write_text(configuration.to_json(config))
    except OSError as error:
        raise ConfigError(f"--workdir: cannot write to {workdir}: {error.strerror}") from error
    return directory


def _check_train(config: ml_collections.ConfigDict, num_exits: int) -> None:
    train = config.train
    if (train.epochs > 0) == (train.steps > 0):
        raise ConfigError(
            "set exactly one of train.epochs and train.steps to a positive number, "
            f"got {train.epochs} and {train.steps}"
        )
    for field in ("eval_every", "checkpoint_every", "log_every"):
        if train[field] < (field == "log_every"):
            raise ConfigError(f"train.{field} is a number of steps, got {train[field]}")
    names = [f"eval/exit{i}/top1" for i in range(1, num_exits + 1)]
    names += ["eval/mean/top1", "eval/ensemble/top1"]
    if train.best_metric not in names:
        raise ConfigError(
            f"train.best_metric must be one of {', '.join(names)}, got {train.best_metric!r}"
        )


def _check_images(network: MultiExit, image_shape: tuple[int, int, int]) -> None:
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        jax.eval_shape(network.init, jax.random.key(0), images)
    except ValueError as error:
        raise ConfigError(f"{error}; see data.image_size") from error


# What a person sees.


def _describe(run: Run, state: TrainState, directory: epath.Path) -> None:
    from clu import parameter_overview

    if jax.process_index() == 0:
        overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
        (directory / _PARAMETERS).write_text(overview + "\n")
    spec = run.data.spec
    height, width, channels = spec.image_shape
    log.info(
        "%s: %d training, %d validation, %d test images of %dx%dx%d, %d classes",
        spec.name,
        spec.train_size,
        spec.validation_size,
        spec.test_size,
        height,
        width,
        channels,
        spec.num_classes,
    )
    log.info("%s with %s", run.config.model.name, run.network.surgery)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    log.info("%s parameters, listed in %s", f"{count:,}", _PARAMETERS)
    log.info("%s", flops.table(run.network, run.data.spec.image_shape))
    log.info(
        "steps %d to %d of %d images; the first one compiles",
        int(state.step) + 1,
        run.total_steps,
        run.config.train.batch_size,
    )


def _final_table(scores: Mapping[str, float], costs: flops.ExitCosts, run: Run) -> str:
    rows = []
    for i in range(1, run.network.num_exits + 1):
        cost = costs.cumulative[i - 1]
        rows.append((f"exit {i}", f"{scores[f'test/exit{i}/top1']:.2%}", f"{cost / 1e6:.3f}"))
    rows.append(("ensemble", f"{scores['test/ensemble/top1']:.2%}", rows[-1][2]))
    headers = ("", "test accuracy", "cost (M multiply-adds)")
    return f"\n{metrics.format_table(rows, headers)}"


class _Reporter:
    """Fetches the measurements of step n while step n+1 runs, checks and reports them."""

    def __init__(self, run: Run, writer: metrics.MetricWriter, start: int):
        self._run, self._writer = run, writer
        self._progress = metrics.Progress(run.total_steps, start_step=start)
        self._pending: tuple[int, Any] | None = None
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def step_done(self, step: int, measured: Any, waited: float) -> None:
        self.settle()
        self._pending = (step, measured)
        self._waited += waited

    def settle(self) -> None:
        """Wait for the last step's measurements; raises TrainingError if one is not finite."""
        if self._pending is None:
            return
        step, measured = self._pending
        self._pending = None
        measured = jax.device_get(measured)
        _check_finite(step, measured)
        self._steps += 1
        if step % self._run.config.train.log_every == 0 or step == self._run.total_steps:
            self._report(step, measured)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Settles, and keeps what happens inside out of the throughput."""
        self.settle()
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None:
        self._writer.write(step, scores)
        self._progress.evaluation(step, scores)

    def _report(self, step: int, measured: Mapping[str, np.ndarray]) -> None:
        batch_size = self._run.config.train.batch_size
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        line = {"train/loss": float(measured["losses"].sum())}
        for i, loss in enumerate(measured["losses"], 1):
            line[f"train/exit{i}/loss"] = float(loss)
        for i, correct in enumerate(measured["correct"], 1):
            line[f"train/exit{i}/top1"] = float(correct) / batch_size
        line["train/gradient_norm"] = float(measured["gradient_norm"])
        line["train/learning_rate"] = float(self._run.schedule(step - 1))
        line["train/images_per_second"] = self._steps * batch_size / elapsed
        line["train/data_wait"] = self._waited / elapsed
        self._writer.write(step, line)
        self._progress.training(step, line)
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0


def _check_finite(step: int, measured: Mapping[str, np.ndarray]) -> None:
    bad = [str(i) for i, loss in enumerate(measured["losses"], 1) if not np.isfinite(loss)]
    if bad:
        raise TrainingError(
            f"step {step}: the loss of exit {', '.join(bad)} is not finite; nothing of this step "
            "was saved. A smaller optimizer.learning_rate or a warm-up is the usual cure"
        )
    for name in ("gradient_norm", "update_norm"):
        if not np.isfinite(measured[name]):
            raise TrainingError(f"step {step}: {name} is not finite; nothing of it was saved")
