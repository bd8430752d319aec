"""Several processes, on virtual CPU devices and over loopback, train as one does."""

import os
import random
import signal
import time

import jax
import numpy as np
import processes
import pytest

from dfs_jax import config as configuration
from dfs_jax.training.run import prepare
from dfs_jax.training.state import restore

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize(
    ("network", "ways"),
    [(processes.MSDNET, [(2, 4)]), (processes.VGG, [(2, 4), (4, 2)])],
    ids=["msdnet", "vgg7"],
)
def test_any_number_of_processes_and_devices_trains_alike(network, ways, tmp_path):
    losses, scores = {}, {}
    for count, devices in ((1, 1), *ways):
        workdir = tmp_path / f"{count}x{devices}"
        text = processes.run(count, devices, processes.arguments(workdir, network=network))
        assert f"process 0 of {count}, {count * devices} cpu device" in text
        losses[count, devices] = processes.series(workdir, r"train/.*loss")
        scores[count, devices] = processes.series(workdir, r"(eval|test)/.*top\d")
    want, counts = losses.pop((1, 1)), scores.pop((1, 1))
    assert {step for step, _ in want} == set(range(1, 21))
    for found in losses.values():
        assert found.keys() == want.keys()
        assert max(abs(found[key] - want[key]) for key in want) < 1e-5
    assert all(found == counts for found in scores.values())


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_goes_on_with_one_and_with_four(
    victim, tmp_path
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    processes.run(1, 1, processes.arguments(whole, "train.steps=40"))

    running = processes.start(2, 1, processes.arguments(broken, "train.steps=4000"))
    try:
        step = random.randint(7, 15)
        processes.wait_for_step(broken, step)
        os.kill(processes.pid_of(victim, broken), signal.SIGKILL)
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

    processes.run(1, 1, processes.arguments(broken, "train.steps=30"))
    processes.run(4, 1, processes.arguments(broken, "train.steps=40"))
    a, b = final_state(whole), final_state(broken)
    assert a.step == b.step == 40
    assert largest_difference((a.params, a.batch_stats), (b.params, b.batch_stats)) < 1e-4
    assert _final_scores(whole) == _final_scores(broken)


def _final_scores(workdir):
    """Test accuracies after the last of the 40 steps; a shorter run before left its own."""
    series = processes.series(workdir, "test/.*top1")
    return {name: value for (step, name), value in series.items() if step == 40}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_reaches_all_processes_which_save_together(number, tmp_path):
    running = processes.start(2, 1, processes.arguments(tmp_path, "train.steps=4000"))
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


def test_fsdp_over_two_processes(tmp_path):
    for name, own in (("plain", ()), ("spread", ("mesh.fsdp=2",))):
        processes.run(2, 1, processes.arguments(tmp_path / name, *own))
    plain, spread = (
        processes.series(tmp_path / name, "(train/.*loss|test/.*top1)")
        for name in ("plain", "spread")
    )
    assert plain.keys() == spread.keys()
    assert max(abs(plain[key] - spread[key]) for key in plain) < 1e-5
