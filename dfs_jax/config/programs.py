"""Compiled programs that are kept on disk, in JAX's persistent cache, and what can go wrong there.

Where they must not be used, several processes on CPU, is decided in `distributed/processes.py`.
"""

import contextlib
import functools
import logging
import os
import re
import warnings
import zlib
from typing import Any

import jax
from etils import epath

log = logging.getLogger(__name__)

_FAULT = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(.+?)': (.*)")


def keep(folder: str) -> None:
    """Keep programs in `folder` ("": nowhere); a fault there costs compilations and one line."""
    if not folder:
        return
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
    shown = warnings.showwarning
    if getattr(shown, "func", None) is not _show:
        warnings.showwarning = functools.partial(_show, shown)


def _show(otherwise: Any, message: Any, *place: Any, **how: Any) -> None:
    """`warnings.showwarning` for what JAX says of its cache; `otherwise` has the rest."""
    fault = _FAULT.match(str(message))
    if fault is None:
        otherwise(message, *place, **how)
        return
    reading, name, reason = fault[1] == "reading", fault[2], fault[3]
    folder = epath.Path(jax.config.jax_compilation_cache_dir)
    if not (reading and _remove_damaged(folder, name)):
        _say_once(folder, reason.partition(": '")[0])


def _remove_damaged(folder: epath.Path, name: str) -> bool:
    """Whether damaged entries of programs called `name` were found, and removed.

    JAX never writes over a file that is there, so half a program, which a kill or a full disk has
    left, would be compiled in every run. Which entry it could not read JAX does not tell.
    """
    removed = False
    with contextlib.suppress(OSError):
        for entry in folder.glob(f"{name}-*-cache"):
            try:
                zlib.decompress(entry.read_bytes())
            except zlib.error:  # also where it is of another compression; it is made again
                entry.unlink()
                removed = True
    return removed


@functools.cache
def _say_once(folder: epath.Path, reason: str) -> None:
    log.warning("compiled programs cannot be kept in %s: %s", folder, reason)
