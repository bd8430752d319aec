"""The numbers of a run on disk: metrics.jsonl and TensorBoard events.

Which metrics exist and when they are written is the training loop's. Accuracies are fractions
in [0, 1].
"""

import contextlib
import json
import logging
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from dfs_jax.writing.files import json_text, write_whole

_log = logging.getLogger(__name__)

_FRAME = struct.Struct("<Q4x")


class MetricWriter(contextlib.AbstractContextManager):
    """Appends scalars to `<workdir>/metrics.jsonl` and to TensorBoard events beside it.

    A line is {"step": s, name: value, …}. A pair of step and name occurs at most once in the
    file, whatever is written again after a resume. JSON has no NaN and no infinity: these are
    written as null, and `read_metrics` reads null as NaN. In processes other than 0 every
    method does nothing.

    A disk that is full or out of reach does not end a run: what cannot be written is kept in
    memory, with one warning, and written at the next opportunity.
    """

    def __init__(self, workdir: epath.PathLike, *, start_step: int = 0, tensorboard: bool = True):
        """Removes lines and events with a step beyond `start_step`, and torn ones.

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
        text = "".join(map(json_text, kept)).encode()
        if not path.exists() or path.read_bytes() != text:
            write_whole(path, text)
        self._lines = _Appending(path, len(text))
        if tensorboard:
            self._events = _Events.create(path.parent, start_step)

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
        self._lines.append(json_text({"step": step, **new}))
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
    def create(cls, workdir: epath.Path, start_step: int) -> "_Events | None":
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
        for path in workdir.glob("events.out.tfevents.*"):
            _cut_events(path, lambda record: tf.compat.v1.Event.FromString(record).step, start_step)
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


def _cut_events(path: epath.Path, step_of: Callable[[bytes], int], last: int) -> None:
    """Cuts a file of events, which are in order, before the first with a step beyond `last`.

    TensorBoard would show the steps twice that a run takes again.
    """
    content, end = path.read_bytes(), 0
    while len(content) >= end + _FRAME.size:
        # A record of TFRecord: its length, 4 bytes that check it, the record, and 4 for that.
        first = end + _FRAME.size
        after = first + _FRAME.unpack_from(content, end)[0] + 4
        try:
            if after > len(content) or step_of(content[first : after - 4]) > last:
                break
        except Exception:  # protobuf's: a damaged record, behind which readers see nothing
            break
        end = after
    if end < len(content):
        try:
            os.truncate(path, end)
        except OSError:  # gs://, where files change as a whole
            path.write_bytes(content[:end])


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


def _number(value: Any) -> int | float:
    value = np.asarray(value).item()
    return value if isinstance(value, int) and not isinstance(value, bool) else float(value)
