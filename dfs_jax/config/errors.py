"""Refusals: what cannot be used is told in one sentence, before anything is compiled."""

import difflib
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what is wrong and what is right."""


def unknown(key: str, known: Any, what: str) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {listed(known)}"
    return f"there is no such {what}; {hint}"


def listed(known: Any) -> str:
    return ", ".join(sorted(known)) or "none"
