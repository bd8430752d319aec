"""Ways in which a checkpoint gets damaged; each returns what it did, in words."""

import random
import shutil
from pathlib import Path


def _some_file(random: random.Random, checkpoint: Path) -> Path:
    """A file of the checkpoint that is not empty; large and small ones alike."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size)
    return random.choice(files)


def truncated(random: random.Random, checkpoint: Path) -> str:
    """One file loses its end."""
    file = _some_file(random, checkpoint)
    left = random.randrange(file.stat().st_size)
    with file.open("r+b") as opened:
        opened.truncate(left)
    return f"{file.relative_to(checkpoint)} cut to {left} bytes"


def bit_flipped(random: random.Random, checkpoint: Path) -> str:
    """One bit of one file is another."""
    file = _some_file(random, checkpoint)
    content = bytearray(file.read_bytes())
    at = random.randrange(len(content))
    content[at] ^= 1 << random.randrange(8)
    file.write_bytes(content)
    return f"{file.relative_to(checkpoint)} flipped at byte {at}"


def emptied(random: random.Random, checkpoint: Path) -> str:
    """The folder stays, its files are gone or have no content."""
    if random.random() < 0.5:
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
        return "an empty folder"
    for file in checkpoint.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    return "empty files"


def deleted(random: random.Random, checkpoint: Path) -> str:
    """All of it is gone."""
    shutil.rmtree(checkpoint)
    return "deleted"
