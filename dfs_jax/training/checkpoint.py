"""Checkpoints: saving, keeping, verifying and restoring a pytree, with Orbax behind this module.

A checkpoint is the directory `<directory>/<step>` with two items: `state`, the pytree, and
`meta`, a JSON object. Orbax writes it in the background and renames it into place when it is
complete. What Orbax does not do is done here: a digest of every leaf (`digest.py`), because
changed bytes restore without an error; falling back to an older checkpoint; making room for the
step of a damaged one; clearing up after a save that failed; and remembering which is best.

What the state consists of, when to save and how to place arrays on devices are the caller's.
"""

import contextlib
import hashlib
import json
import logging
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dfs_jax.training.digest import digest, layout

_log = logging.getLogger(__name__)

# How long processes wait for each other's part of a save before they give it up.
_PATIENCE_SECONDS = 300

# Fields of `meta` that belong to this module.
_RESERVED = ("digest", "scores", "sha256")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the step and the reason."""


class Restored(NamedTuple):
    """What `Checkpointer.restore` returns."""

    step: int
    state: Any  # the pytree, in the structure of `like`
    meta: dict[str, Any]  # as given to `save` (after a round trip through JSON)


def newest_step(directory: epath.PathLike) -> int | None:
    """The newest step by the names in `directory` and what is under them, or None.

    Unlike a `Checkpointer` it asks nothing of other processes, and sees damaged steps too.
    """
    directory = epath.Path(directory)
    if not directory.exists():
        return None
    steps = [int(p.name) for p in directory.iterdir() if _is_step(p.name)]
    return next((s for s in sorted(steps, reverse=True) if _has_items(directory / str(s))), None)


def _is_step(name: str) -> bool:
    return name.isdecimal() and name == str(int(name))


def _has_items(place: epath.Path) -> bool:
    """Whether `place` was a checkpoint, whatever has become of its files."""
    return any((place / item).exists() for item in ("state", "meta"))


class Checkpointer(contextlib.AbstractContextManager):
    """The checkpoints of one run; keeps the newest two and the best one.

    Every process of a run must construct it and call its methods in the same order.
    """

    def __init__(
        self, directory: epath.PathLike, *, best_metric: str | None, read_only: bool = False
    ):
        """Opens `directory`, the folder `checkpoints` of a workdir, which is created if need be.

        `best_metric` names the entry of `metrics` whose highest value makes a checkpoint the best
        one; None keeps the newest two only. With `read_only` (for commands that read a run) nothing
        is written, moved or deleted.
        """
        self.directory = epath.Path(directory).absolute()
        self._best_metric = best_metric
        self._read_only = read_only
        self._scores: dict[int, float] = {}
        self._told_about_missing_metric = False
        self._saving: int | None = None  # the step that is being written
        self._manager = self._open()
        self._load_scores()

    def _open(self) -> ocp.CheckpointManager:
        policies = [preservation_policy.LatestN(2), _KeepBest(self)]
        return ocp.CheckpointManager(
            self.directory,
            # With names alone a manager cannot read the metadata of what another one wrote.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                create=not self._read_only,
                read_only=self._read_only,
                cleanup_tmp_directories=not self._read_only,
                async_options=ocp.AsyncOptions(timeout_secs=_PATIENCE_SECONDS),
            ),
        )

    @jax.transfer_guard("allow")
    def save(
        self, step: int, state: Any, meta: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> bool:
        """Starts to save `state` as `step`; the arrays may be donated once this returns.

        Args:
          step: number of completed updates.
          state: pytree of arrays (any dtype, PRNG keys too), Python numbers and None.
          meta: JSON object.
          metrics: values at this step; may lack the best metric, and then this checkpoint is
            never the best one.

        Returns:
          False, with nothing done, if `step` exists already or is older than the newest.

        Raises:
          ValueError: if `meta` uses a reserved name (TypeError if it is not JSON).
          CheckpointError: in every process, if the save before this one has failed in the
            background, and then nothing is saved; or if this one could not be started.
        """
        for name in _RESERVED:
            if name in meta:
                raise ValueError(f"meta must not have the field {name!r}, which is reserved")
        self.wait()
        latest = self.latest_step()
        if self._read_only or (latest is not None and step <= latest):
            return False
        record = dict(meta) | {"digest": digest(state)}
        self.scored(step, metrics)  # before the save, which asks what to keep
        known = {*self.all_steps(), step} & self._scores.keys()
        record["scores"] = {self._best_metric: {s: self._scores[s] for s in sorted(known)}}
        record = json.loads(json.dumps(record))
        record["sha256"] = _sha256(record)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_without_empty(state)), meta=ocp.args.JsonSave(record)
        )
        self._saving = step
        self._together(lambda: self._manager.save(step, args=args, force=True))
        return True

    def scored(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step that was saved without them; the next save records them."""
        value = metrics.get(self._best_metric)
        if value is not None and math.isfinite(value):
            self._scores[step] = float(value)
        missing = self._best_metric is not None and metrics and value is None
        if missing and not self._told_about_missing_metric:
            self._told_about_missing_metric = True
            _log.warning(
                "The metrics of this checkpoint lack %r, which selects the best one; they are: %s.",
                self._best_metric,
                ", ".join(metrics),
            )

    @jax.transfer_guard("allow")
    def restore(self, like: Any, step: int | None = None) -> Restored | None:
        """The newest undamaged checkpoint, or exactly `step`.

        A damaged checkpoint (it raises, lacks an item, is of another step, or differs from its
        digest) is skipped with a warning. Once an older one has been restored, the damaged newer
        ones are moved to the folder `<directory>.damaged`, so that their steps can be saved again.
        So is what has a step's name and nothing of a checkpoint in it.

        Args:
          like: pytree with the structure, shapes and dtypes of the state. Leaves are arrays or
            `jax.ShapeDtypeStruct`; a leaf's sharding says where the array goes, on any number
            of devices, and without one it goes to this process's first device. NumPy leaves
            come back as NumPy arrays.
          step: None for the newest.

        Returns:
          None if there is no checkpoint at all.

        Raises:
          CheckpointError: if `step` is missing or damaged, if there are checkpoints and all are
            damaged, or if the state on disk has another structure, shape or dtype than `like`.
        """
        self.wait()
        self._manager.reload()
        steps = self.all_steps()
        if step is not None:
            if step not in steps:
                known = ", ".join(map(str, steps)) or "none"
                raise CheckpointError(
                    f"{self.directory} has no checkpoint of step {step}; there are: {known}"
                )
            try:
                return self._restore(like, step)
            except _Damaged as error:
                raise CheckpointError(
                    f"the checkpoint of step {step} in {self.directory} is damaged: {error}"
                ) from error
        damaged, restored = {}, None
        for candidate in reversed(steps):
            try:
                restored = self._restore(like, candidate)
                break
            except _Damaged as error:
                damaged[candidate] = str(error)
        if restored is None and any(_has_items(self.directory / str(step)) for step in damaged):
            reasons = "; ".join(f"step {s}: {reason}" for s, reason in damaged.items())
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged ({reasons}); remove the folder "
                "to start from scratch"
            )
        for bad, reason in damaged.items():
            _log.warning(
                "The checkpoint of step %d in %s is damaged (%s); %s is used instead.",
                bad,
                self.directory,
                reason,
                f"step {restored.step}" if restored else "none",
            )
        if not self._read_only:
            self._move_aside(sorted({*damaged, *self._strays()}))
        return restored

    def latest_step(self) -> int | None:
        """The newest step, or None. Damaged steps count until `restore` has found them out."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the highest best metric (of equal ones the newest), or None."""
        scored = [(self._scores[s], s) for s in self.all_steps() if s in self._scores]
        return max(scored)[1] if scored else None

    def all_steps(self) -> list[int]:
        """The steps, in increasing order, including one that is still being written."""
        return sorted(self._manager.all_steps())

    def metadata(self, step: int) -> Any:
        """The tree of shapes and dtypes of the state of `step`, as nested dicts.

        Raises CheckpointError if it cannot be read.
        """
        self.wait()
        try:
            tree = self._manager.item_metadata(step)["state"].tree
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.directory} cannot be read: "
                f"{_one_line(error)}"
            ) from error

    def wait(self) -> None:
        """Waits until the running save is complete.

        Raises CheckpointError, in every process, if it failed in any. What it had written is
        removed then, and the checkpoints before it are as they were.
        """
        if self._saving is not None:
            self._together(self._manager.wait_until_finished)
            self._saving = None

    def close(self) -> None:
        """Waits for the running save and releases Orbax's threads; a failed save is a warning."""
        try:
            self.wait()
        except CheckpointError as error:
            _log.warning("%s", error)
        self._manager.close()

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # A save that a lost process took part in would be waited for in vain.
        if not (isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1):
            self.close()

    def _together(self, part: Callable[[], Any]) -> None:
        """Does this process's part of the running save; raises in all if one failed."""
        failure = None
        try:
            part()
        except Exception as error:  # whatever Orbax, TensorStore and the file system raise
            failure = error
        if _all_agree(failure is None):
            return
        step, self._saving = self._saving, None
        reason = _one_line(failure) if failure else "another process met an error"
        # Orbax's list of steps is wrong after a failure, and its unfinished folder would keep a
        # full disk full: a new manager reads the one and removes the other.
        with contextlib.suppress(Exception):
            self._manager.close()
        for thread in threading.enumerate():  # the first error does not stop the other writers
            if type(thread).__module__.startswith("orbax."):
                with contextlib.suppress(Exception):  # Orbax's own `join` raises the thread's error
                    thread.join(_PATIENCE_SECONDS)
        self._scores.pop(step, None)
        with contextlib.suppress(OSError):  # out of reach: the next save tries again
            self._manager = self._open()
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written: {reason}"
        ) from failure

    def _load_scores(self) -> None:
        if self._best_metric is None:
            return
        for step in self.all_steps():
            with contextlib.suppress(_Damaged):
                scores = self._read_meta(step).get("scores", {}).get(self._best_metric, {})
                self._scores |= {int(s): score for s, score in scores.items()}

    def _read_meta(self, step: int) -> dict[str, Any]:
        def read():
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            return dict(self._manager.restore(step, args=args).meta)

        _check(_has_items(self.directory / str(step)), "it is empty")
        record = _attempt(read)
        _check(record.get("sha256") == _sha256(record), "its meta differs from its own checksum")
        return record

    def _restore(self, like: Any, step: int) -> Restored:
        record = self._read_meta(step)
        own = record.get("step", step)
        _check(own == step, f"it is a copy of step {own}")
        _require_same_layout(record["digest"], like, f"step {step} in {self.directory}")

        def read():
            target = _without_empty(jax.tree.map(_placed, like))
            args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            return _with_empty(self._manager.restore(step, args=args).state, like)

        state = _attempt(read)
        found = digest(state)
        changed = [path for path, value in record["digest"].items() if found.get(path) != value]
        _check(not changed, f"{len(changed)} arrays differ from their digest: {changed[:3]}")
        meta = {name: value for name, value in record.items() if name not in _RESERVED}
        return Restored(step, state, meta)

    def _strays(self) -> list[int]:
        """Numbers that something which is no checkpoint has for its name."""
        numbers = {int(p.name) for p in self.directory.iterdir() if _is_step(p.name)}
        return sorted(numbers.difference(self.all_steps()))

    def _move_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        # Beside the folder, not inside: what lies inside are steps.
        attic = self.directory.parent / f"{self.directory.name}.damaged"
        if jax.process_index() == 0:
            attic.mkdir(parents=True, exist_ok=True)
            for step in steps:
                source, target = self.directory / str(step), attic / str(step)
                if target.exists():
                    target.rmtree() if target.is_dir() else target.unlink()
                if source.exists():
                    source.rename(target)
                    _log.warning("The damaged checkpoint of step %d is now %s.", step, target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints moved")
        for step in steps:
            self._scores.pop(step, None)
        self._manager.reload()


class _Damaged(Exception):
    """Why one checkpoint cannot be restored."""


class _KeepBest(preservation_policy.PreservationPolicy):
    """Keeps the checkpoint with the highest score, whenever it was saved.

    Orbax's own `BestN` needs metrics in a file of Orbax's that no digest protects, and a torn
    one makes the manager raise; scores come from our `meta` instead.
    """

    def __init__(self, checkpointer: Checkpointer):
        self._checkpointer = checkpointer

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        scores = self._checkpointer._scores
        scored = [(scores[c.step], c.step) for c in checkpoints if c.step in scores]
        best = max(scored)[1] if scored else None
        return [c.step == best for c in checkpoints]


def _sha256(record: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in record.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _require_same_layout(digests: Mapping[str, str], like: Any, where: str) -> None:
    """Tells a caller's mistake from damage: `digests` come from a meta that is intact."""
    stored = {path: value[:8] for path, value in digests.items()}
    wanted = layout(like)
    differing = {path for path in wanted.keys() & stored.keys() if wanted[path] != stored[path]}
    for what, paths in (
        ("lacks", wanted.keys() - stored.keys()),
        ("has, unasked for,", stored.keys() - wanted.keys()),
        ("has another shape or dtype at", differing),
    ):
        if paths:
            raise CheckpointError(
                f"the state of {where} {what} {min(paths)!r} and {len(paths) - 1} others"
            )


def _is_empty(leaf: Any) -> bool:
    return getattr(leaf, "size", None) == 0


def _without_empty(tree: Any) -> Any:
    # Orbax refuses arrays of no elements.
    return jax.tree.map(lambda leaf: None if _is_empty(leaf) else leaf, tree)


def _with_empty(tree: Any, like: Any) -> Any:
    leaves = iter(jax.tree.leaves(tree))

    def fill(leaf):
        if not _is_empty(leaf):
            return next(leaves)
        target = _placed(leaf)
        empty = np.zeros(target.shape, target.dtype)
        return empty if isinstance(target, np.ndarray) else jax.device_put(empty, target.sharding)

    return jax.tree.map(fill, like)


def _placed(leaf: Any) -> Any:
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return leaf
    # Without a sharding Orbax would use the one on disk, which may name other devices.
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _attempt(read: Any) -> Any:
    """`read()`; raises _Damaged in every process if it raised in any."""
    result, failure = None, None
    try:
        result = read()
    except Exception as error:  # Orbax and TensorStore raise a dozen types for damaged files
        failure = error
    if not _all_agree(failure is None):
        reason = _one_line(failure) if failure else "another process could not read it"
        raise _Damaged(reason) from failure
    return result


def _check(ok: bool, reason: str) -> None:
    if not _all_agree(ok):
        raise _Damaged(reason)


def _all_agree(ok: bool) -> bool:
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
