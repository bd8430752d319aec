"""Lines for the person who watches, and who may have closed the terminal."""

import contextlib
import os
import sys


def say(text: str, *, error: bool = False) -> None:
    """Print `text` on standard output, or on standard error, at once.

    What cannot be written, to a closed terminal or a full disk, is left out.
    """
    try:
        print(text, file=sys.stderr if error else sys.stdout, flush=True)
    except OSError:
        if not error:
            _give_up_standard_output()


def _give_up_standard_output() -> None:
    # Its buffer keeps what could not be written, and Python would end with status 120 for it.
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
