"""Several processes, on virtual CPU devices and over loopback, train as one does."""

import os
import random
import signal
import time

import jax
import numpy as np
import processes
import pytest
from tiny_run import few_digits  # noqa: F401

from dfs_jax import config as configuration
from dfs_jax import main
from dfs_jax.training.run import prepare
from dfs_jax.training.state import restore

pytestmark = pytest.mark.slow


def train_alone(workdir, *own):
    """The training command in this process, on one device."""
    own = (*own, "mesh.data=1", "train.compilation_cache=")
    assert main.main(processes.arguments(workdir, *own)) == 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of 20 steps of one process, and then of 40."""
    workdir = tmp_path_factory.mktemp("alone")
    for steps in (20, 40):
        train_alone(workdir, f"train.steps={steps}")
    return workdir


def numbers(workdir, pattern, last=20):
    """{(step, name): value} of the metrics whose names match, up to the step `last`."""
    found = processes.series(workdir, pattern)
    return {key: value for key, value in found.items() if key[0] <= last}


def final_state(workdir):
    config = configuration.from_json((workdir / "config.json").read_text())
    with config.unlocked():
        config.mesh.data, config.mesh.fsdp = 1, 1
    return jax.device_get(restore(prepare(config), str(workdir))[1])


def largest_difference(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(np.abs(np.asarray(x, float) - np.asarray(y, float)).max() for x, y in leaves)


def test_the_second_run_in_a_home_and_a_resumed_one_end_as_the_first(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    kept = programs()
    text = processes.run(2, 1, processes.arguments(first, "train.steps=5"))
    assert "[0] process 0 of 2, 2 cpu devices (1 of them here), mesh data=2 fsdp=1" in text
    assert "[1] process 1 of 2" in text
    # Process 0 speaks for both.
    assert "[0]           test accuracy" in text
    assert "[1]           test accuracy" not in text
    # No run takes a program from another: those that are read back sum in another order.
    assert programs() == kept
    for steps in (3, 5):
        processes.run(2, 1, processes.arguments(second, f"train.steps={steps}"))
    a, b = final_state(first), final_state(second)
    assert a.step == b.step == processes.reached(second) == 5
    assert largest_difference(a, b) == 0


def programs():
    """Names of the compiled programs that are kept in the home of the runs."""
    return {entry.name for entry in processes.KEPT.glob("*-cache")}


def test_processes_of_several_devices_train_as_one_device_does(alone, tmp_path):
    text = processes.run(2, 4, processes.arguments(tmp_path))
    assert "process 0 of 2, 8 cpu device" in text
    want, found = (numbers(workdir, r"train/.*loss") for workdir in (alone, tmp_path))
    assert {step for step, _ in want} == set(range(1, 21))
    assert found.keys() == want.keys()
    assert max(abs(found[key] - want[key]) for key in want) < 1e-5
    scores = r"(eval|test)/.*top\d"
    assert numbers(alone, scores) == numbers(tmp_path, scores)


@pytest.mark.parametrize(("victim", "then"), [(0, 4), (1, 1)])
def test_a_killed_process_ends_the_other_and_the_run_goes_on_with_any_number(
    victim, then, alone, tmp_path
):
    running = processes.start(2, 1, processes.arguments(tmp_path, "train.steps=4000"))
    try:
        step = random.randint(7, 15)
        processes.wait_for_step(tmp_path, step)
        os.kill(processes.pid_of(victim, tmp_path), signal.SIGKILL)
        killed = time.monotonic()
        text, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    took = time.monotonic() - killed
    print(f"process {victim} was killed at step {step}; all had ended {took:.1f} s later")
    assert took < 15, text
    assert running.returncode != 0
    assert "another one has died" in text or "another task died" in text
    assert "all of them end" in text

    if then == 1:
        train_alone(tmp_path, "train.steps=40")
    else:
        processes.run(then, 1, processes.arguments(tmp_path, "train.steps=40"))
    a, b = final_state(alone), final_state(tmp_path)
    assert a.step == b.step == 40
    assert largest_difference((a.params, a.batch_stats), (b.params, b.batch_stats)) < 1e-4
    last = "test/.*top1"
    assert numbers(alone, last, 40).items() >= numbers(tmp_path, last, 40).items() != set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_all_processes_which_save_together(number, tmp_path):
    # One of the two as a user has it, with TensorFlow's threads and handlers.
    words, whole = processes.arguments(tmp_path, "train.steps=4000"), number == signal.SIGTERM
    running = processes.start(2, 1, words, whole)
    try:
        processes.wait_for_step(tmp_path, 7)
        if number == signal.SIGHUP:  # to one of them, past the script
            os.kill(processes.pid_of(1, tmp_path), number)
        else:
            running.send_signal(number)
        text, _ = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == 1
    saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal())
    for process in (0, 1):
        assert f"[{process}] error: told to end: step {saved} is saved" in text
    assert final_state(tmp_path).step == saved


def test_fsdp_over_two_processes(alone, tmp_path):
    processes.run(2, 1, processes.arguments(tmp_path, "mesh.fsdp=2"))
    pattern = "(train/.*loss|test/.*top1)"
    plain, spread = numbers(alone, pattern), numbers(tmp_path, pattern)
    assert plain.keys() == spread.keys()
    assert max(abs(plain[key] - spread[key]) for key in plain) < 1e-5
