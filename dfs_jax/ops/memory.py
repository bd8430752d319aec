"""How much memory there is: of a device, or of the machine where the CPU is the device.

What a program needs is read from the program; see `training/footprint.py`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

SHORTAGE = (
    "memory has run out; smaller batches need less (train.batch_size, train.eval_batch_size, or "
    "what the command calls them)"
)


def available(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that each of these `devices` of this process can still take; None if unknown.

    CPU devices share what the machine, its swap space and the control groups of this process leave.
    """
    stats = [device.memory_stats() or {} for device in devices]
    free = [s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats if "bytes_limit" in s]
    if free:
        return min(free)
    if devices[0].platform != "cpu" or (shared := of_machine()) is None:
        return None
    return shared // len(devices)


def of_machine() -> int | None:
    """Bytes of main memory that this process can still take; None where that is not told."""
    return min((*_of_system(), *_of_groups()), default=None)


def in_words(count: float) -> str:
    """`count` bytes for a message: "49.2 GB", "310 MB"."""
    size, unit = (1e9, "GB") if count >= 1e9 else (1e6, "MB")
    return f"{count / size:,.3g} {unit}" if count < 1e12 else f"{count / size:,.0f} {unit}"


def is_shortage(error: BaseException) -> bool:
    """Whether `error` says that memory has run out, on the host or on a device."""
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )


def _of_system(meminfo: Path = Path("/proc/meminfo")) -> Iterator[int]:
    if not meminfo.exists():
        return
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    if "MemAvailable" in lines:
        names = ("MemAvailable", "SwapFree")
        yield sum(1024 * int(lines[name].split()[0]) for name in names if name in lines)


# Of version 2 and of version 1: limit, use, and the cached files that make room when need be.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _of_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")):
    """What the control groups leave, of this process and those above it."""
    for base, names in ((root, _FILES[0]), (root / "memory", _FILES[1])):
        for group in {base, *_groups_of(base, own)}:
            left = _left(group, *names)
            if left is not None:
                yield left


def _groups_of(base: Path, own: Path) -> Iterator[Path]:
    if not own.exists():
        return
    for line in own.read_text().splitlines():
        inner = line.split(":", 2)[-1].strip("/")
        for place in (Path(inner), *Path(inner).parents):
            yield base / place


def _left(group: Path, limit: str, use: str, cached: str) -> int | None:
    try:
        most, used = (group / limit).read_text().strip(), int((group / use).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # there is no such group, or not of this version
        return None
    return None if most == "max" else max(0, int(most) - used + int(stat.get(cached, 0)))
