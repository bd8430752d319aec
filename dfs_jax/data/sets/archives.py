"""Archives that a TFDS builder downloads: at hand and whole, or to be had, or told how to get.

TFDS itself tries for minutes to reach a server. Here it is known within seconds, and before
TensorFlow is loaded, whether preparing can succeed. Preparing is the matter of `builders.py`.
"""

import hashlib
import os
import threading
import urllib.parse
from typing import TYPE_CHECKING

from dfs_jax.data.pipeline import DataError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

_SECONDS = 2.5  # within which a server must answer


def check_available(
    builder: "tfds.core.DatasetBuilder", data_dir: str, manual: str | None = None
) -> None:
    """Make sure that each archive of `builder` is at hand or that its server answers.

    An archive is taken from `manual`, where the user puts it (None: `manual_dir`), or from what
    TFDS downloaded before. Raises DataError: for a file in `manual` that is not the published
    one, and, with all that is needed to get it by hand, for one that cannot be had.
    """
    manual = manual or manual_dir(data_dir)
    for url, info in (builder.url_infos or {}).items():
        by_hand = os.path.join(manual, info.filename or os.path.basename(url))
        if os.path.exists(by_hand):
            _verify(by_hand, url, info)
        elif not _downloaded(os.path.join(data_dir, "downloads"), info.size):
            failure = _failure(url)
            if failure:
                raise DataError(
                    f"no connection to {urllib.parse.urlsplit(url).netloc} ({failure}); "
                    f"{instructions(builder, 'tfrecord')}"
                )


def _verify(path: str, url: str, info) -> None:
    size, expected = os.path.getsize(path), int(info.size)
    if size != expected:
        found = f"it has {size:,} bytes instead of {expected:,}"
    elif sha256(path) != info.checksum:
        found = "its SHA-256 is another one"
    else:
        return
    raise DataError(
        f"{path} is not the published archive ({found}); replace it by {url} with "
        f"SHA-256 {info.checksum}, or delete it"
    )


def sha256(path: str) -> str:
    """Digest of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _downloaded(downloads: str, size: int) -> bool:
    """Whether TFDS has a file of that size; it verifies the checksum itself."""
    for folder, subfolders, files in os.walk(downloads):
        if folder == downloads and "extracted" in subfolders:
            subfolders.remove("extracted")
        if any(os.path.getsize(os.path.join(folder, name)) == size for name in files):
            return True
    return False


def _failure(url: str) -> str | None:
    """Why `url` cannot be had, None if it can; known after `_SECONDS`, come what may."""
    import requests  # what TFDS downloads with, so that proxies and certificates are the same

    outcome: list[str | None] = []

    def ask():
        try:
            with requests.get(url, stream=True, timeout=_SECONDS) as response:
                outcome.append(None if response.ok else f"status {response.status_code}")
        except OSError as error:  # the base of all that requests raises
            outcome.append(type(error).__name__)

    # Looking up a name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return outcome[0] if outcome else f"no answer within {_SECONDS:g} seconds"


def instructions(builder: "tfds.core.DatasetBuilder", file_format: str) -> str:
    """What to do where `builder` is not prepared: what to download, where to put it, what to run.

    Sizes and checksums are those that TFDS has registered.
    """
    place = builder._data_dir_root
    run = f"python -m dfs_jax.data.prepare {builder.name} --data_dir={place}"
    run += f" --file_format={file_format}" if file_format != "tfrecord" else ""
    archives = [
        f"{_file_name(url, info)} ({int(info.size):,} bytes, SHA-256 {info.checksum}, {url})"
        for url, info in (builder.url_infos or {}).items()
    ]
    first = f"{builder.name} is not prepared in {place}; "
    if not archives:
        return first + f"run {run}"
    return (
        first + f"where there is a network run {run}; without one, get {', '.join(archives[:6])}"
        f"{', ...' if len(archives) > 6 else ''}, put "
        f"{'it' if len(archives) == 1 else 'them'} in {manual_dir(place)} and run the same"
    )


def manual_dir(data_dir: str | os.PathLike) -> str:
    """Where archives are looked for when nothing else is said."""
    return os.path.join(data_dir, "downloads", "manual")


def _file_name(url: str, info) -> str:
    return info.filename or os.path.basename(urllib.parse.urlsplit(url).path)
