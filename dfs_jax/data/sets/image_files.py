"""The image files of a tree SPLIT/CLASS/…/FILE, with their sizes, and what else lies there.

Folders in a class folder belong to the class. Hidden files and folders are left alone, and so is
__MACOSX, which archives of macOS bring. How files become splits is in `folder.py`.
"""

import collections
import concurrent.futures
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from etils import epath

from dfs_jax.data import record
from dfs_jax.data.input.pictures import ENDINGS
from dfs_jax.data.pipeline import DataError

_REQUESTS = 32  # at a time, to a remote store


class ImageFile(NamedTuple):
    """A file of a split."""

    name: str  # below the folder of the split, "/" between folders: CLASS/…/FILE
    path: str
    size: int  # bytes; 0 where it cannot be told

    @property
    def label(self) -> str:
        """Name of the class."""
        return self.name.partition("/")[0]


class Found(NamedTuple):
    """What lies in the folder of a split."""

    folder: epath.Path
    classes: tuple[str, ...]  # its folders, sorted, empty ones too
    files: list[ImageFile]  # by class, then by name
    unused: collections.Counter[str]  # other files, by ending


def folders(parent: epath.Path) -> list[str]:
    """Names of the folders in `parent` that count, sorted."""
    return sorted(p.name for p in parent.iterdir() if _counts(p.name) and p.is_dir())


def find(folder: epath.Path) -> Found:
    """The images in the folder of a split. Raises DataError for a folder that cannot be read."""
    names, unused = [], collections.Counter()
    for place, file in _walk(folder):
        ending = os.path.splitext(file)[1].lower()
        if place and _counts(file) and ending in ENDINGS:
            names.append(f"{place}/{file}")
        elif not _counts(file):
            unused["hidden"] += 1
        else:
            unused["in no class folder" if ending in ENDINGS else ending or "no ending"] += 1
    names.sort(key=lambda name: name.partition("/"))
    paths = [f"{os.fspath(folder)}/{name}" for name in names]
    files = [ImageFile(*each) for each in zip(names, paths, _sizes(paths), strict=True)]
    return Found(folder, tuple(folders(folder)), files, unused)


def as_before(found: Found) -> Found:
    """What was found before runs noted their data: fewer kinds of files, none in inner folders."""
    endings = (".jpg", ".jpeg", ".png")
    files = [f for f in found.files if f.name.count("/") == 1 and f.name.lower().endswith(endings)]
    return found._replace(files=files)


def parts(files: Iterable[ImageFile]) -> dict[str, tuple[int, str]]:
    """Number and fingerprint of the files of each class; see `record.Split`."""
    by_class = collections.defaultdict(list)
    for file in files:
        by_class[file.label].append(f"{file.name}\0{file.size}")
    return {
        label: (len(lines), record.fingerprint(lines)) for label, lines in sorted(by_class.items())
    }


def _counts(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _walk(folder: epath.Path) -> Iterator[tuple[str, str]]:
    """(folder below `folder` with "/" between its parts, file) of every file."""
    top = os.fspath(folder)
    if _remote(top):
        walked = ((os.fspath(p), d, f) for p, d, f in folder.walk(on_error=_unreadable))
    else:  # epath does not follow links
        walked = os.walk(top, onerror=_unreadable, followlinks=True)
    for place, below, files in walked:
        below[:] = [name for name in below if _counts(name) and not _leads_back(place, name)]
        inside = place[len(top) :].strip("/")
        if all(_counts(part) for part in inside.split("/") if part):
            yield from ((inside, file.strip("/")) for file in files)


def _leads_back(place: str, name: str) -> bool:
    """Whether a folder is a link to one that holds it: its files would be met again and again."""
    path = os.path.join(place, name)
    if _remote(place) or not os.path.islink(path):
        return False
    return f"{os.path.realpath(place)}/".startswith(f"{os.path.realpath(path)}/")


def _sizes(paths: list[str]) -> Iterable[int]:
    if not paths or not _remote(paths[0]):
        return map(_size, paths)
    with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(lambda path: epath.Path(path).stat().length, paths))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # a link to nothing: reading it says so, or skips it
        return 0


def _remote(path: str) -> bool:
    return "://" in path


def _unreadable(error: Exception) -> None:  # TensorFlow's have neither field
    place, reason = (getattr(error, field, None) for field in ("filename", "strerror"))
    raise DataError(f"{place or 'a folder'} cannot be read: {reason or error}") from error
