"""What training scripts put before the names of a state dict: "module.", "model.", "ema.model." …

Nothing is listed: a prefix is what stands before names that the network has. What a file wraps
around a state dict is `files.py`'s matter.
"""

import collections
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

# Between dots or underscores, a word for averaged weights.
_AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)")


class Taken(NamedTuple):
    """The entries that are meant, without what stood before their names."""

    entries: dict[str, Any]
    prefix: str
    left_out: tuple[str, ...]  # names without the prefix


def taken(entries: Mapping[str, Any], wanted: Collection[str]) -> Taken:
    """Those of `entries` under the prefix that makes most of their names `wanted` ones.

    Of prefixes that do so equally, one of averaged weights, as evaluation prefers them. The entries
    stay as they are where a prefix makes sense of too few: a part of the network, or a chance hit.
    """
    fits = collections.Counter(
        name[:start] for name in entries for start in _starts(name) if name[start:] in wanted
    )
    fits[""] += 0
    prefix = max(fits, key=lambda p: (fits[p], bool(_AVERAGED.search(p)), -len(p)))
    chosen = {n.removeprefix(prefix): v for n, v in entries.items() if n.startswith(prefix)}
    if 2 * fits[prefix] < len(chosen) or 4 * fits[prefix] < len(wanted):
        return Taken(dict(entries), "", ())
    return Taken(chosen, prefix, tuple(n for n in entries if not n.startswith(prefix)))


def common(names: Iterable[str]) -> str:
    """What all `names`, of which there is one at least, begin with, up to a dot; or ""."""
    start = os.path.commonpath([name.rpartition(".")[0].replace(".", "/") for name in names])
    return start.replace("/", ".") + "." * bool(start)


def _starts(name: str) -> list[int]:
    return [0, *(match.end() for match in re.finditer(r"\.", name))]
