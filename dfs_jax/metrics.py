"""What a run reports: metrics.jsonl, TensorBoard events, progress lines, exact evaluation counts.

Which metrics exist and when they are written is the training loop's. Accuracies are fractions
in [0, 1].
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import lax

_log = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------
# metrics.jsonl
# ---------------------------------------------------------------------------------------------


class MetricWriter:
    """Appends scalars to `<workdir>/metrics.jsonl` and to TensorBoard events beside it.

    A line is {"step": s, name: value, …}. A pair of step and name occurs at most once in the
    file, whatever is written again after a resume. JSON has no NaN and no infinity: these are
    written as null, and `read_metrics` reads null as NaN. In processes other than 0 every
    method does nothing.

    A disk that is full or out of reach does not end a run: what cannot be written is kept in
    memory, with one warning, and written at the next opportunity.
    """

    def __init__(self, workdir: epath.PathLike, *, start_step: int = 0, tensorboard: bool = True):
        """Reads the file; lines with a step beyond `start_step`, and torn ones, are removed.

        Args:
          workdir: created if need be.
          start_step: completed updates of the state that the run starts from.
          tensorboard: also write events; without clu or TensorFlow this is skipped with a note.
        """
        self._primary = jax.process_index() == 0
        self._events = None
        if not self._primary:
            return
        path = _path(workdir)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in _parse(path) if r["step"] <= start_step]
        self._written: dict[int, set[str]] = {}
        for record in kept:
            self._written.setdefault(record["step"], set()).update(record)
        text = "".join(_line(record) for record in kept).encode()
        if not path.exists() or path.read_bytes() != text:
            temporary = path.parent / f"{path.name}.tmp"
            temporary.write_bytes(text)
            temporary.replace(path)
        self._lines = _Appending(path, len(text))
        if tensorboard:
            self._events = _Events.create(path.parent)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes one line, which the file has when this returns unless the disk is full.

        Values are numbers or 0-d arrays. Names that were recorded for this step already are left
        out.
        """
        if not self._primary:
            return
        step = int(step)
        seen = self._written.setdefault(step, {"step"})
        new = {name: _number(value) for name, value in scalars.items() if name not in seen}
        if not new:
            return
        seen.update(new)
        self._lines.append(_line({"step": step, **new}))
        if self._events is not None:
            self._events.append((step, new))

    def close(self) -> None:
        """Writes out what is left; a disk that is still full is a warning."""
        if not self._primary:
            return
        self._lines.close()
        if self._events is not None:
            self._events.close()


class _Patient:
    """Writes items in order; those that a failure keeps out wait for the next call."""

    def __init__(self, name: Any):
        self._name = name
        self._waiting: list[Any] = []
        self._failing = False

    def append(self, item: Any) -> None:
        self._waiting.append(item)
        self._write_waiting()

    def close(self) -> None:
        self._write_waiting()
        if self._waiting:
            _log.warning("The last %d records are missing in %s.", len(self._waiting), self._name)

    def _write_waiting(self) -> None:
        try:
            self._write(self._waiting)
        except Exception as error:  # OSError, or TensorFlow's own classes
            if not self._failing:
                reason = getattr(error, "strerror", None) or type(error).__name__
                _log.warning(
                    "%s cannot be written (%s); metrics are kept in memory until it can.",
                    self._name,
                    reason,
                )
            self._failing = True
            return
        if self._failing:
            _log.info("%s can be written again; nothing is missing.", self._name)
        self._waiting, self._failing = [], False

    def _write(self, items: Sequence[Any]) -> None:
        raise NotImplementedError


class _Appending(_Patient):
    """Lines at the end of a file of `size` bytes."""

    def __init__(self, path: epath.Path, size: int):
        super().__init__(path)
        self._path, self._size = path, size

    def _write(self, items: Sequence[str]) -> None:
        data = "".join(items).encode()
        try:
            with self._path.open("ab") as file:
                file.write(data)
        except Exception:
            # A full disk takes the beginning of a line. (On gs:// files change as a whole.)
            with contextlib.suppress(OSError):
                os.truncate(self._path, self._size)
            raise
        self._size += len(data)


class _Events(_Patient):
    """Scalars (step, {name: value}) in TensorBoard files."""

    @classmethod
    def create(cls, workdir: epath.Path) -> "_Events | None":
        """None, with a note, where clu or TensorFlow is missing."""
        try:
            import tensorflow as tf
            from clu import metric_writers
        except ImportError as error:
            _log.warning("No TensorBoard events are written: %s.", error)
            return None
        # TensorFlow would otherwise take most of the GPU's memory. It refuses once it is in use.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], "GPU")
        return cls(workdir, metric_writers.SummaryWriter)

    def __init__(self, workdir: epath.Path, writer: Callable[[str], Any]):
        super().__init__("the TensorBoard events")
        self._workdir, self._writer = workdir, writer
        self._open: Any = None

    def close(self) -> None:
        super().close()
        with contextlib.suppress(Exception):
            self._open.close()

    def _write(self, items: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
        try:
            if self._open is None:
                self._open = self._writer(str(self._workdir))
            for step, scalars in items:
                self._open.write_scalars(step, scalars)
            self._open.flush()
        except Exception:
            self._open = None  # what was torn stays in the old file, which readers skip
            raise


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of `<workdir>/metrics.jsonl`; a torn last line is left out, null is NaN.

    Returns an empty list if there is no such file.
    """
    return [
        {name: math.nan if value is None else value for name, value in record.items()}
        for record in _parse(_path(workdir))
    ]


def has(workdir: epath.PathLike, step: int, name: str) -> bool:
    """Whether `<workdir>/metrics.jsonl` has the scalar `name` of `step`."""
    return any(line["step"] == step and name in line for line in read_metrics(workdir))


def _path(workdir: epath.PathLike) -> epath.Path:
    return epath.Path(workdir) / "metrics.jsonl"


def _parse(path: epath.Path) -> list[dict[str, Any]]:
    records = []
    if not path.exists():
        return records
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
            records.append(record)
        except (ValueError, TypeError, KeyError):
            _log.warning("Line %d of %s is torn and is left out.", number, path)
    return records


def _line(record: Mapping[str, Any]) -> str:
    clean = {name: value if _is_finite(value) else None for name, value in record.items()}
    return json.dumps(clean, allow_nan=False) + "\n"


def _is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: Any) -> int | float:
    value = np.asarray(value).item()
    return value if isinstance(value, int) and not isinstance(value, bool) else float(value)


# ---------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------


# What a progress line says of the speed, in this order.
_SPEED = {
    "train/images_per_second": "{:,.0f} images/s",
    "train/images_per_second_per_device": "{:,.0f} a device",
    "train/step_seconds": "{:.3g} s a step",
    "train/data_wait": "{:.0%} waiting for data",
    "train/device_memory_gb": "{:.1f} GB a device",
    "train/mfu": "MFU {:.1%}",
}


class Progress:
    """Prints one line per call: where the run is, how fast it goes and when it will end.

    Plain lines without escape codes, so that they read the same in a terminal and in a log;
    only process 0 prints.
    """

    def __init__(self, total_steps: int, *, start_step: int = 0, stream: TextIO | None = None):
        """The time to go is estimated from the steps since this call, evaluations included.

        Args:
          total_steps: length of the whole run.
          start_step: where this process starts.
          stream: standard error if None, looked up at every call.
        """
        self._total = total_steps
        self._start_step = start_step
        self._stream = stream
        self._start = time.monotonic()

    def training(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints loss, training accuracy by exit and speed, as far as `metrics` has them:
        train/loss, train/exit1/top1 …, those of `_SPEED`; and the time to go.
        """
        parts = []
        if "train/loss" in metrics:
            parts.append(f"loss {metrics['train/loss']:.4f}")
        parts += _by_exit("train", metrics)
        for name, text in _SPEED.items():
            if name in metrics:
                parts.append(text.format(metrics[name]))
        done = step - self._start_step
        if done > 0:
            left = (time.monotonic() - self._start) / done * max(self._total - step, 0)
            parts.append(f"ETA {_clock(left)}")
        self._print(step, parts)

    def evaluation(self, step: int, metrics: Mapping[str, float], *, prefix: str = "eval") -> None:
        """Prints the accuracy by exit, of the ensemble and the mean, from `summarise`."""
        parts = _by_exit(prefix, metrics)
        for name in ("ensemble", "mean"):
            if f"{prefix}/{name}/top1" in metrics:
                parts.append(f"{name} {metrics[f'{prefix}/{name}/top1']:.4f}")
        self._print(step, parts)

    def _print(self, step: int, parts: Sequence[str]) -> None:
        if jax.process_index() == 0:
            where = f"step {step}/{self._total} ({step / max(self._total, 1):.1%})"
            # A log on a full disk, or a closed terminal, must not end the training.
            with contextlib.suppress(OSError):
                print("  ".join([where, *parts]), file=self._stream or sys.stderr, flush=True)


def _by_exit(prefix: str, metrics: Mapping[str, float]) -> list[str]:
    exits: list[str] = []
    while (name := f"{prefix}/exit{len(exits) + 1}/top1") in metrics:
        exits.append(f"{metrics[name]:.3f}")
    return [f"{prefix} top1 by exit {' '.join(exits)}"] if exits else []


def format_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """A plain-text table: text is left-aligned, numbers right-aligned; floats have 4 decimals.

    Returns the lines joined by newlines, without one at the end.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    columns = list(zip(headers, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [
        bool(rows) and all(isinstance(row[i], (int, float, np.number)) for row in rows)
        for i in range(len(headers))
    ]

    def line(row):
        padded = (
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(row, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), line(["-" * w for w in widths]), *map(line, cells)])


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (float, np.floating)) else str(value)


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


# ---------------------------------------------------------------------------------------------
# Exact evaluation
# ---------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExitCounts:
    """Sums over examples, N exits from shallow to deep; they add up across batches."""

    top1: Any  # (N,) correct answers
    top5: Any  # (N,) labels among the five largest logits; None for five classes or fewer
    loss: Any  # (N,) cross-entropy, summed
    ensemble: Any  # () correct answers of the mean of all exits' softmax
    count: Any  # () examples


def count_batch(logits: Sequence[jax.Array], labels: jax.Array, mask: jax.Array) -> ExitCounts:
    """The counts of one batch; can be jitted, and used under any sharding of the batch.

    Among equal logits the lower class comes first, as in `jax.lax.top_k`.

    Args:
      logits: one (B, K) array per exit, shallow to deep.
      labels: (B,) integers; of any value where the mask is 0.
      mask: (B,) 1 or True for examples that count, 0 for padding.

    Returns:
      int32 counts, and losses in float32 (or wider, as the logits).
    """
    mask = mask.astype(bool)
    labels = jnp.where(mask, labels, 0)
    stacked = jnp.stack(logits)  # (N, B, K)
    stacked = stacked.astype(jnp.promote_types(jnp.float32, stacked.dtype))
    classes = stacked.shape[-1]

    def correct(scores, k):
        hit = jnp.any(lax.top_k(scores, k)[1] == labels[:, None], axis=-1)
        return jnp.sum(hit & mask, axis=-1, dtype=jnp.int32)

    log_probabilities = jax.nn.log_softmax(stacked)
    index = jnp.broadcast_to(labels[:, None], (*stacked.shape[:-1], 1))
    loss = -jnp.take_along_axis(log_probabilities, index, axis=-1)[..., 0]
    return ExitCounts(
        top1=correct(stacked, 1),
        top5=correct(stacked, 5) if classes > 5 else None,
        loss=jnp.sum(jnp.where(mask, loss, 0), axis=-1),
        ensemble=correct(jnp.mean(jnp.exp(log_probabilities), axis=0), 1),
        count=jnp.sum(mask, dtype=jnp.int32),
    )


def total(batches: Iterable[ExitCounts]) -> ExitCounts:
    """The sum of the counts of all `batches`, on the host in int64 and float64.

    Raises ValueError if there is no batch.
    """

    def wide(x):
        x = np.asarray(jax.device_get(x))
        return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)

    sums = [jax.tree.map(wide, batch) for batch in batches]
    if not sums:
        raise ValueError("there are no batches to count")
    return jax.tree.map(lambda *parts: sum(parts[1:], start=parts[0]), *sums)


def summarise(counts: ExitCounts, prefix: str) -> dict[str, float]:
    """Metrics of `counts`, e.g. for prefix "eval": eval/exit1/top1, …/top5, …/loss for every
    exit from 1, eval/ensemble/top1, and eval/mean/top1, the mean over exits.

    top5 is there only for more than five classes. Raises ValueError if nothing was counted.
    """
    count = int(counts.count)
    if count == 0:
        raise ValueError(f"{prefix}: no examples were counted")
    top1 = np.asarray(counts.top1, np.float64) / count
    metrics = {}
    for i in range(len(top1)):
        metrics[f"{prefix}/exit{i + 1}/top1"] = float(top1[i])
        if counts.top5 is not None:
            metrics[f"{prefix}/exit{i + 1}/top5"] = int(counts.top5[i]) / count
        metrics[f"{prefix}/exit{i + 1}/loss"] = float(counts.loss[i]) / count
    metrics[f"{prefix}/ensemble/top1"] = int(counts.ensemble) / count
    metrics[f"{prefix}/mean/top1"] = float(np.mean(top1))
    return metrics
