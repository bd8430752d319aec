"""Ctrl-C, a closed terminal (SIGHUP) and SIGTERM: how they end a command.

A command ends at once, with one line and the status 128 + number of the signal, also where Python
would first wait for the compiler or for a long step. A run that has something to save takes the
signals for that time (`taken`); then a second Ctrl-C ends it at once. A signal that was ignored
when the command started (by nohup, or by a shell's script in the background) stays ignored.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

_NAMES = {
    signal.SIGINT: "Ctrl-C",
    signal.SIGHUP: "SIGHUP (a closed terminal)",
    signal.SIGTERM: "SIGTERM",
}
ENDING = tuple(_NAMES)

_ANSWER = (
    "told to end: the state is saved after the step or evaluation under way; a second Ctrl-C ends "
    "at once"
)


class _Taker:
    """Who is told of the signals in place of the process's end."""

    def __init__(self, told: Callable[[], None]):
        self.told, self.asked, self.answered = told, False, False


# Signals are the process's own, and so is who handles them.
_taker: _Taker | None = None
_watched = False


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Within, a signal ends this process, unless a run has `taken` it.

    Does nothing within itself, nor outside the main thread, where Python handles no signals.
    """
    global _watched
    if _watched or threading.current_thread() is not threading.main_thread():
        yield
        return
    # Python's handlers wait for the main thread, which may be in the compiler for minutes. The
    # number of a signal is written to this file at once, and another thread reads it.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    _watched = True
    try:
        with _handled(ENDING):
            yield
    finally:
        _watched = False
        signal.set_wakeup_fd(before)
        os.close(writer)  # the thread reads the end of the file


@contextlib.contextmanager
def taken(told: Callable[[], None], numbers: Sequence[int] = ENDING) -> Iterator[None]:
    """Within, a signal among `numbers` calls `told`, which must not mind a second call.

    A second Ctrl-C ends a command, and is Python's KeyboardInterrupt in other programs. Does
    nothing outside the main thread.
    """
    global _taker
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, _taker = _taker, _Taker(told)
    try:
        with _handled(numbers):
            yield
    finally:
        _taker = before


@contextlib.contextmanager
def _handled(numbers: Sequence[int]) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _noticed)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler not in (signal.SIG_IGN, None):  # None: not Python's
                signal.signal(number, handler)


def _noticed(number: int, _: FrameType | None) -> None:
    """Python's handler, in the main thread."""
    if _taker is None:
        return  # the process is about to end
    if _taker.asked and number == signal.SIGINT and not _watched:
        raise KeyboardInterrupt
    _taker.asked = True
    _taker.told()


def _watch(reader: int) -> None:
    """Reads the numbers of signals, each as it arrives, until the other end is closed."""
    with open(reader, "rb", buffering=0) as numbers:
        while byte := numbers.read(1):
            number, taker = byte[0], _taker
            if number not in ENDING:
                continue
            if taker is None:
                _end(number, "nothing was lost; the same command goes on")
            if not taker.answered:
                taker.answered = True
                taker.told()
                _tell(_ANSWER)
            elif number == signal.SIGINT:
                _end(number, "steps since the newest checkpoint are lost; the same command goes on")


def _end(number: int, comfort: str) -> None:
    _tell(f"ended by {_NAMES[number]}: {comfort}")
    os._exit(128 + number)


def _tell(line: str) -> None:
    # Not by sys.stderr, in the middle of whose writing the main thread may be.
    start = "\n" if os.isatty(2) else ""  # a terminal shows ^C at the end of its last line
    with contextlib.suppress(OSError):  # the terminal is gone
        os.write(2, f"{start}{line}\n".encode())
