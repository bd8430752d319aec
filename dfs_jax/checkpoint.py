"""Checkpoints: saving, keeping, verifying and restoring a pytree, with Orbax behind this module.

A checkpoint is the directory `<directory>/<step>` with two items: `state`, the pytree, and
`meta`, a JSON object. Orbax writes it in the background and renames it into place when it is
complete. What Orbax does not do is done here: a digest of every leaf, because changed bytes
restore without an error; falling back to an older checkpoint; making room for the step of a
damaged one; and remembering which checkpoint is best.

What the state consists of, when to save and how to place arrays on devices are the caller's.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax import lax
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

_log = logging.getLogger(__name__)

# Fields of `meta` that belong to this module.
_RESERVED = ("digest", "score", "sha256")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the step and the reason."""


class Restored(NamedTuple):
    """What `Checkpointer.restore` returns."""

    step: int
    state: Any  # the pytree, in the structure of `like`
    meta: dict[str, Any]  # as given to `save` (after a round trip through JSON)


class Checkpointer(contextlib.AbstractContextManager):
    """The checkpoints of one run; keeps the newest two and the best one.

    Every process of a run must construct it and call its methods in the same order.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        best_metric: str | None,
        read_only: bool = False,
    ):
        """Opens `directory`, which is created if need be.

        Args:
          directory: the folder `checkpoints` of a workdir.
          best_metric: name of the entry of `metrics` whose highest value makes a checkpoint the
            best one; None keeps the newest two only.
          read_only: never write, move or delete anything (for commands that read a run).
        """
        self.directory = epath.Path(directory).absolute()
        self._best_metric = best_metric
        self._read_only = read_only
        self._scores: dict[int, float] = {}
        self._told_about_missing_metric = False
        policies = [preservation_policy.LatestN(2), _KeepBest(self)]
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )
        self._load_scores()

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
          Exception: whatever the save before this one ran into in the background.
        """
        for name in _RESERVED:
            if name in meta:
                raise ValueError(f"meta must not have the field {name!r}, which is reserved")
        latest = self.latest_step()
        if self._read_only or (latest is not None and step <= latest):
            return False
        record = dict(meta) | {"digest": digest(state)}
        score = self._score(metrics)
        if score is not None:
            record["score"] = {self._best_metric: score}
        record = json.loads(json.dumps(record))
        record["sha256"] = _sha256(record)
        if score is not None:
            self._scores[step] = score  # before the save, which asks what to keep
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_without_empty(state)), meta=ocp.args.JsonSave(record)
            ),
            force=True,
        )
        return bool(saved)

    @jax.transfer_guard("allow")
    def restore(self, like: Any, step: int | None = None) -> Restored | None:
        """The newest undamaged checkpoint, or exactly `step`.

        A damaged checkpoint (it raises, lacks an item, or differs from its digest) is skipped
        with a warning. Once an older one has been restored, the damaged newer ones are moved to
        the folder `<directory>.damaged`, so that their steps can be saved again.

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
        damaged: dict[int, str] = {}
        for candidate in reversed(steps):
            try:
                restored = self._restore(like, candidate)
            except _Damaged as error:
                damaged[candidate] = str(error)
                continue
            for bad, reason in damaged.items():
                _log.warning(
                    "The checkpoint of step %d in %s is damaged (%s); step %d is used instead.",
                    bad,
                    self.directory,
                    reason,
                    candidate,
                )
            if not self._read_only:
                self._move_aside(sorted(damaged))
            return restored
        if damaged:
            reasons = "; ".join(f"step {s}: {reason}" for s, reason in damaged.items())
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged ({reasons}); remove the folder "
                "to start from scratch"
            )
        return None

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
        """Waits until the running save is complete; raises the error it met, if any."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the running save and releases Orbax's threads."""
        self._manager.close()

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _score(self, metrics: Mapping[str, float]) -> float | None:
        if self._best_metric is None:
            return None
        value = metrics.get(self._best_metric)
        if value is None:
            if metrics and not self._told_about_missing_metric:
                self._told_about_missing_metric = True
                _log.warning(
                    "The metrics of this checkpoint lack %r, which selects the best one; they "
                    "are: %s.",
                    self._best_metric,
                    ", ".join(metrics),
                )
            return None
        return float(value) if math.isfinite(value) else None

    def _load_scores(self) -> None:
        if self._best_metric is None:
            return
        for step in self.all_steps():
            with contextlib.suppress(_Damaged):
                score = self._read_meta(step).get("score", {}).get(self._best_metric)
                if score is not None:
                    self._scores[step] = score

    def _read_meta(self, step: int) -> dict[str, Any]:
        def read():
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            return dict(self._manager.restore(step, args=args).meta)

        record = _attempt(read)
        _check(record.get("sha256") == _sha256(record), "its meta differs from its own checksum")
        return record

    def _restore(self, like: Any, step: int) -> Restored:
        record = self._read_meta(step)
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
                    target.rmtree()
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
        del context
        scores = self._checkpointer._scores
        scored = [(scores[c.step], c.step) for c in checkpoints if c.step in scores]
        best = max(scored)[1] if scored else None
        return [c.step == best for c in checkpoints]


# Digest: per leaf two sums, modulo 2^32, of a hash of every word and its position. Integer sums
# do not depend on the order, so neither on sharding nor on the number of devices or processes.
# The hash is not linear: in a linear sum two flipped sign bits would cancel.

# Smaller leaves are summed with NumPy: a compilation per shape takes longer than the sum.
_COMPILED_FROM = 1 << 18


def digest(state: Any) -> dict[str, str]:
    """A checksum per leaf: {path: 24 hex digits}, e.g. {"params/conv/kernel": "…"}.

    The first 8 digits depend on dtype and shape alone, the others on every bit and its place.
    The result does not depend on how the arrays are sharded, nor on whether they are JAX or
    NumPy arrays. Arrays that live on several hosts are summed where they are; then every
    process must call this together.
    """
    layout = _layout(state)
    sums = jax.device_get([_sums(leaf) for leaf in jax.tree.leaves(state)])
    return {
        path: f"{head}{int(a):08x}{int(b):08x}"
        for (path, head), (a, b) in zip(layout.items(), sums, strict=True)
    }


def _layout(tree: Any) -> dict[str, str]:
    """The dtype and shape of every leaf as 8 hex digits, by path."""
    layout = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not hasattr(leaf, "dtype"):
            leaf = np.asarray(leaf)
        text = f"{leaf.dtype}{tuple(leaf.shape)}"
        layout[jax.tree_util.keystr(path, simple=True, separator="/")] = (
            f"{zlib.crc32(text.encode()):08x}"
        )
    return layout


def _sums(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if leaf.is_fully_replicated:
            leaf = leaf.addressable_data(0)
        if not leaf.is_fully_addressable or leaf.size >= _COMPILED_FROM:
            return _sums_compiled(leaf)
    host = np.ascontiguousarray(leaf)
    unsigned = np.dtype(f"uint{8 * min(4, host.dtype.itemsize)}")
    words = host.reshape(-1).view(unsigned).astype(np.uint32)
    return _hash_and_sum(words, _mixed_index(words.size), np)


@jax.jit
def _sums_compiled(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    unsigned = jnp.dtype(f"uint{8 * min(4, x.dtype.itemsize)}")
    words = lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    # The row-major position of every word, without a reshape, which would move sharded data.
    index = jnp.zeros((), jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        index += lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    return jnp.stack(_hash_and_sum(words, _mix(index), jnp))


@functools.lru_cache(maxsize=1)
def _mixed_index_table() -> np.ndarray:
    return _mix(np.arange(_COMPILED_FROM, dtype=np.uint32))


def _mixed_index(size: int) -> np.ndarray:
    if size <= _COMPILED_FROM:
        return _mixed_index_table()[:size]
    return _mix(np.arange(size, dtype=np.uint32))


def _hash_and_sum(words: Any, index: Any, xp: Any) -> tuple[Any, Any]:
    first = xp.sum(_mix(words ^ index), dtype=xp.uint32)
    second = xp.sum(_mix(words + index * xp.uint32(0x9E3779B1)), dtype=xp.uint32)
    return first, second


def _mix(x: Any) -> Any:
    """The finaliser of MurmurHash3: a bijection of 32-bit words; x is a uint32 array."""
    x = x ^ (x >> 16)
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> 13)
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _sha256(record: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in record.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _require_same_layout(digests: Mapping[str, str], like: Any, where: str) -> None:
    """Tells a caller's mistake from damage: `digests` come from a meta that is intact."""
    stored = {path: value[:8] for path, value in digests.items()}
    wanted = _layout(like)
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
        failure = _Damaged(_one_line(error))
        failure.__cause__ = error
    if not _all_agree(failure is None) and failure is None:
        failure = _Damaged("another process could not read it")
    if failure is not None:
        raise failure
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
