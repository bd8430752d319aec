"""Files that are written whole or not at all, and JSON that every reader accepts."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np


@contextlib.contextmanager
def open_whole(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write to, which becomes `path` when the context ends without an error.

    Until then it is called `path` with ".tmp" at the end: a kill or a full disk leaves what was
    there before. `path` is local, or gs://… with etils installed. Raises OSError.
    """
    place = pathlib.Path(path)
    if "://" in os.fspath(path):
        from etils import epath

        place = epath.Path(path)
    unfinished = place.parent / f"{place.name}.tmp"
    with unfinished.open("wb") as file:
        yield file
    unfinished.replace(place)


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Make `content`, text as UTF-8, the whole of the file `path`; see `open_whole`."""
    with open_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def absolute(path: str) -> str:
    """A local path with its home folder and from the root; others, as gs://…, as they are."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def json_text(content: Any, indent: int | None = None) -> str:
    """`content` as JSON with a newline at the end; see `_plain` for what JSON lacks."""
    return json.dumps(_plain(content), indent=indent, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """With numpy's numbers as Python's, and None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
