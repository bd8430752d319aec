"""Signals that end a command, in processes that import next to nothing, and in this one."""

import os
import signal
import subprocess
import sys

import pytest

from dfs_jax.config import signals

# Deaf to Python's handlers, as the compiler is.
DEAF = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"


def child(body, *before):
    """Runs `body` within `ending_at_once`; it prints "ready" first."""
    program = f"""
import hashlib, os, signal
from dfs_jax.config import signals

def send(number):
    os.kill(os.getpid(), number)

with signals.ending_at_once():
    print("ready", flush=True)
    {body}
"""
    return subprocess.Popen(
        [*before, sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    """Its status, and what it printed on standard output and error."""
    out, error = process.communicate(timeout=60)
    return process.returncode, out.splitlines(), error.splitlines()


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (signal.SIGINT, "Ctrl-C"),
        (signal.SIGHUP, r"SIGHUP (a closed terminal)"),
        (signal.SIGTERM, "SIGTERM"),
    ],
)
def test_a_command_ends_at_once_with_one_line(number, name):
    process = child(DEAF)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    line = f"ended by {name}: nothing was lost; the same command goes on"
    assert ended(process) == (128 + number, [], [line])


def test_what_was_ignored_at_the_start_stays_ignored():
    process = child(
        "send(signal.SIGHUP); send(signal.SIGINT)\n"
        "    print('alive', flush=True); send(signal.SIGTERM)\n"
        f"    {DEAF}",
        *("sh", "-c", 'trap "" HUP INT; exec "$@"', "sh"),
    )
    status, out, _ = ended(process)
    assert (status, out) == (128 + signal.SIGTERM, ["ready", "alive"])


def test_a_run_is_told_and_a_second_ctrl_c_ends_it_at_once():
    # A terminal that closes may send SIGHUP more than once, and a scheduler SIGTERM.
    process = child(
        "with signals.taken(lambda: print('told', flush=True)):\n"
        "        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM): send(number)\n"
        "        print('saving', flush=True)\n"
        f"        {DEAF}"
    )
    while process.stdout.readline() != "saving\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    status, _, error = ended(process)
    assert status == 128 + signal.SIGINT
    assert error == [
        "told to end: the state is saved after the step or evaluation under way; a second Ctrl-C "
        "ends at once",
        "ended by Ctrl-C: steps since the newest checkpoint are lost; the same command goes on",
    ]


def test_a_command_that_still_imports_ends_without_a_traceback():
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "dfs_jax.evaluate", "--workdir", "none"],
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.endswith(" dfs_jax.config.command\n"):
            break
    process.send_signal(signal.SIGINT)
    error = process.stderr.read()
    assert process.wait(timeout=60) == 128 + signal.SIGINT
    assert error.endswith("ended by Ctrl-C: nothing was lost; the same command goes on\n")
    assert "Traceback" not in error


def test_handlers_are_given_back():
    def handlers():
        return [signal.getsignal(number) for number in signals.ENDING]

    before = handlers()
    with signals.ending_at_once(), signals.ending_at_once(), signals.taken(lambda: None):
        assert before[0] not in handlers()
    assert handlers() == before
    assert signal.set_wakeup_fd(-1) == -1


def test_in_another_program_a_second_ctrl_c_is_pythons_own():
    told = []
    with signals.taken(lambda: told.append(True)):
        os.kill(os.getpid(), signal.SIGINT)
        assert told == [True]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
