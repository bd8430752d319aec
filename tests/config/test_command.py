"""What all commands do with their arguments and their output."""

import os
import subprocess
import sys

import pytest

from dfs_jax.config import command


def parsed(*words):
    """The arguments of a command that takes a workdir, a file and places of images."""
    parser = command.parser("")
    command.add_workdir(parser)
    parser.add_argument("--out")
    parser.add_argument("images", nargs="*")
    found = []
    assert command.run(parser, words, lambda arguments, _: found.append(arguments)) == 0
    return found[0]


@pytest.mark.parametrize("words", [("--workdir=~/x",), ("--workdir", "/home/me/x")])
def test_a_home_that_the_shell_left_alone_is_found(words, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = parsed(*words, "--out=~", "a=~/b.png")
    assert (found.workdir, found.out, found.images) == ("/home/me/x", "/home/me", ["a=~/b.png"])


def test_a_value_with_a_tilde_elsewhere_stays_as_it_is():
    assert parsed("--workdir=a~/b").workdir == "a~/b"


def test_an_output_that_is_gone_is_no_failure():
    program = """
import sys
from dfs_jax.writing.console import say
sys.stdin.readline()
say("table")
say("error", error=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=(output := os.pipe())[1],
        stderr=output[1],
        text=True,
    )
    for end in output:
        os.close(end)
    process.communicate("go\n", timeout=60)
    assert process.returncode == 0
