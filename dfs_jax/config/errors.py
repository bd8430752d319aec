"""Refusals: what cannot be used is told in one sentence, before anything is compiled."""

import contextlib
import difflib
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what is wrong and what is right."""


@contextlib.contextmanager
def refusals(where: str | None = None) -> Iterator[None]:
    """Turns what is refused within, by ValueError or TypeError, into a ConfigError.

    Its message begins with `where`, if given: a flag or a field. A ConfigError passes as it is.
    """
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error


def unknown(key: str, known: Iterable[str], what: str) -> str:
    """Words for a `key` that is no `what`: the nearest known one, or all of them."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {listed(known)}"
    return f"there is no such {what}; {hint}"


def listed(known: Iterable[str]) -> str:
    """The names in alphabetical order, or "none"."""
    return ", ".join(sorted(known)) or "none"


_SHORT = reprlib.Repr()
_SHORT.maxtuple = _SHORT.maxlist = _SHORT.maxdict = _SHORT.maxset = 8
_SHORT.maxstring = _SHORT.maxother = 60


def shown(value: Any) -> str:
    """`value` as Python writes it, shortened where it is long: a message stays one sentence."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python writes no numbers of thousands of digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else "a value"
    return text if len(text) <= 120 else f"{text[:120]}…"
