"""What a run notes of its data: classes, splits, held-out files, measured statistics.

Pixels are not looked at: a fingerprint tells names and sizes of files, or versions and sizes of
prepared sets. Data sets fill a `Record` in; `training/data_record.py` keeps it in the workdir.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dfs_jax.config import ConfigError
from dfs_jax.data.augment.normalization import Statistics

_NAMED = 5  # changes that a message names one by one
_SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Split:
    """Where a split comes from, and the number of examples and the fingerprint of its parts."""

    source: str  # "train", "val" or "test": a split that is held out comes from "train"
    parts: Mapping[str, tuple[int, str]]  # by class folder, or one of a set that is prepared

    @property
    def size(self) -> int:
        """Examples in all parts."""
        return sum(count for count, _ in self.parts.values())


@dataclasses.dataclass(frozen=True)
class Record:
    """All that tells whether a run meets its own data again."""

    classes: tuple[str, ...] = ()
    splits: Mapping[str, Split] = dataclasses.field(default_factory=dict)
    held_out: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    statistics: Statistics | None = None  # mean and deviation, where they were measured
    of_before: bool = False  # files are chosen as they were before there were records

    def to_json(self) -> dict[str, Any]:
        """As JSON's types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Record":
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError for anything else."""
        splits = {
            name: Split(
                split["source"], {k: (int(n), str(f)) for k, (n, f) in split["parts"].items()}
            )
            for name, split in saved["splits"].items()
        }
        statistics = saved["statistics"] and tuple(
            tuple(map(float, x)) for x in saved["statistics"]
        )
        held_out = {split: tuple(names) for split, names in saved["held_out"].items()}
        return cls(
            tuple(saved["classes"]), splits, held_out, statistics or None, bool(saved["of_before"])
        )


# Of a run of an earlier version that has noted nothing yet.
OF_BEFORE = Record(of_before=True)


def fingerprint(lines: Iterable[str]) -> str:
    """The same for the same `lines`, in any order; 16 hexadecimal digits of their SHA-256."""
    digest = hashlib.sha256()
    for line in sorted(lines):
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:16]


def whole(sizes: Mapping[str, int], classes: Sequence[str]) -> Record:
    """The record of a set of which nothing but the `sizes` of its splits can change."""
    splits = {name: Split(name, {name: (size, "")}) for name, size in sizes.items()}
    return Record(tuple(classes), splits)


def of_classes(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """What differs between the names of classes, which labels number in this order; [] if equal."""
    gone = [name for name in before if name not in set(now)]
    new = [name for name in now if name not in set(before)]
    lines = [f"class {listed(gone)} is gone"] * bool(gone)
    lines += [f"class {listed(new)} is new"] * bool(new)
    if not lines and tuple(before) != tuple(now):
        lines.append(f"the classes are in another order, {listed(now)} now")
    return lines


def of_measured(before: Record, now: Record) -> list[str]:
    """What differs in classes, validation and test split: numbers could not be compared; or []."""
    lines = of_classes(before.classes, now.classes)
    for name in _SPLITS[1:]:
        lines += _of_split(name, before.splits.get(name), now.splits.get(name))
    return lines


def of_training(before: Record, now: Record) -> list[str]:
    """What differs in the training split; [] if nothing does."""
    return _of_split(_SPLITS[0], before.splits.get(_SPLITS[0]), now.splits.get(_SPLITS[0]))


def _of_split(name: str, before: Split | None, now: Split | None) -> list[str]:
    if before == now:
        return []
    if before is None or now is None:
        return [f"there was {'no' if before is None else 'a'} {name} split"]
    if before.source != now.source:
        return [f"the {name} split came from {before.source!r}, and comes from {now.source!r} now"]
    lines = []
    for part in sorted(before.parts.keys() | now.parts.keys()):
        (then, mark), (there, own) = before.parts.get(part, (0, "")), now.parts.get(part, (0, ""))
        where = f"{name} split" if part == name else f"{name} split, {part}"
        if then != there:
            lines.append(f"{where}: {there} examples, {then} before")
        elif mark != own:
            lines.append(f"{where}: {there} examples as before, of other names or sizes")
    more = len(lines) - _NAMED
    return lines[:_NAMED] + [f"{more} more such changes in the {name} split"] * (more > 0)


def refuse(lines: Sequence[str], place: str) -> None:
    """Raises ConfigError if there are `lines`, that tell how the data in `place` differ."""
    if lines:
        raise ConfigError(
            f"the data in {place} are not those of this run: {'; '.join(lines)}; restore them, "
            "give the place where the run's own data are, or start in another workdir"
        )


def listed(names: Sequence[str]) -> str:
    """`names` in quotes, a few of them."""
    told = ", ".join(map(repr, names[:_NAMED]))
    return told + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
