"""The scripts under launch/: clean, honest about wrong use, and printing the right commands."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("local.sh", "gpu.sh", "tpu_pod.sh", "slurm.sbatch")
ARGUMENTS = ("--config", "configs/digits.py:joint", "--workdir", "runs/a b")


def launch(script, *words, **variables):
    """The finished script, told to use `python`."""
    return subprocess.run(
        ["bash", f"launch/{script}", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHON": "python"} | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def commands(done):
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_no_complaint(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", f"launch/{script}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_arguments_it_says_how_it_is_used(script):
    done = launch(script)
    assert done.returncode == 2
    assert script in done.stderr


@pytest.mark.parametrize("count", ["0", "two", "-1"])
def test_local_refuses_what_is_no_number_of_processes(count):
    done = launch("local.sh", count, *ARGUMENTS)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: launch/local.sh N ARGS")


def test_local_starts_numbered_processes_that_meet_at_one_port():
    found = commands(launch("local.sh", "3", *ARGUMENTS, DRY_RUN="1", PORT="1234"))
    start = ["python", "-m", "dfs_jax.main", *ARGUMENTS, "--coordinator", "127.0.0.1:1234"]
    assert found == [[*start, "--num-processes", "3", "--process-id", str(i)] for i in range(3)]


class TestLocal:
    """launch/local.sh with a stand-in for the interpreter, which does what a process can do."""

    @pytest.fixture
    def local(self, tmp_path):
        def start(body, count=2):
            stand_in = tmp_path / "python"
            # The script asks it for a free port too, with -c.
            stand_in.write_text(
                f"#!/bin/bash\n[[ $1 == -c ]] && exec echo 1\nid=${{@: -1}}\n{body}\n"
            )
            stand_in.chmod(0o755)
            return subprocess.Popen(
                ["launch/local.sh", str(count), *ARGUMENTS],
                cwd=ROOT,
                env=os.environ | {"PYTHON": str(stand_in)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

        return start

    def test_every_line_says_whose_it_is(self, local):
        out, err = (running := local('echo "a  $id"; printf last; echo bad >&2')).communicate(
            timeout=60
        )
        assert running.returncode == 0
        assert sorted(out.splitlines()) == ["[0] a  0", "[0] last", "[1] a  1", "[1] last"]
        assert sorted(err.splitlines()) == ["[0] bad", "[1] bad"]

    def test_the_first_failure_is_its_status(self, local):
        _, err = (running := local("sleep 0.$((id * 7)); exit $((id + 3))")).communicate(timeout=60)
        assert running.returncode == 3
        assert "ended with status 3" in err

    def test_a_process_that_does_not_follow_is_killed(self, local, tmp_path):
        # The grace is long for a test: one that is shorter, in a copy of the script.
        script = (ROOT / "launch" / "local.sh").read_text()
        assert "GRACE_SECONDS=15" in script
        copy = tmp_path / "local.sh"
        copy.write_text(script.replace("GRACE_SECONDS=15", "GRACE_SECONDS=1"))
        stand_in = tmp_path / "python"
        stand_in.write_text(
            "#!/bin/bash\n[[ $1 == -c ]] && exec echo 1\n[[ ${@: -1} == 0 ]] && exit 9\nexec sleep 50\n"  # noqa: E501
        )
        stand_in.chmod(0o755)
        done = subprocess.run(
            ["bash", str(copy), "2", *ARGUMENTS],
            env=os.environ | {"PYTHON": str(stand_in)},
            capture_output=True,
            text=True,
            check=False,
            timeout=40,
        )
        assert done.returncode == 9
        assert "1 did not end within 1 s and are killed" in done.stderr

    def test_sigterm_reaches_every_process(self, local):
        body = "trap 'echo told; exit 1' TERM; echo ready; while true; do sleep 0.1; done"
        running = local(body)
        assert running.stdout.readline() in ("[0] ready\n", "[1] ready\n")
        assert running.stdout.readline() in ("[0] ready\n", "[1] ready\n")
        running.send_signal(signal.SIGTERM)
        out, _ = running.communicate(timeout=60)
        assert sorted(out.splitlines()) == ["[0] told", "[1] told"]
        assert running.returncode == 1


class TestLocalInATerminal:
    """Ctrl-C reaches the script, what it waits for, and not the processes, which ignore it."""

    @pytest.fixture
    def running(self, tmp_path):
        stand_in = tmp_path / "python"
        stand_in.write_text(
            "#!/bin/bash\n[[ $1 == -c ]] && exec echo 1\n"
            "trap 'echo saving; sleep 1; echo saved; exit 1' TERM\n"
            "echo ready; while true; do sleep 0.1; done\n"
        )
        stand_in.chmod(0o755)
        process = subprocess.Popen(
            ["launch/local.sh", "2", *ARGUMENTS],
            cwd=ROOT,
            env=os.environ | {"PYTHON": str(stand_in)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert {process.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
        return process

    def test_it_waits_until_all_have_saved(self, running):
        os.killpg(running.pid, signal.SIGINT)
        out, _ = running.communicate(timeout=60)
        assert sorted(out.splitlines()) == [
            "[0] saved", "[0] saving", "[1] saved", "[1] saving"
        ]  # fmt: skip
        assert running.returncode == 1

    def test_a_second_one_ends_all_at_once(self, running):
        os.killpg(running.pid, signal.SIGINT)
        assert running.stdout.readline().endswith("saving\n")
        os.killpg(running.pid, signal.SIGINT)
        out, error = running.communicate(timeout=60)
        assert "saved" not in out
        assert running.returncode == 128 + signal.SIGKILL
        assert "all of them end" in error

    def test_a_terminal_that_is_gone_ends_nothing_too_early(self, running):
        running.stdout.close()
        running.stderr.close()
        began = time.monotonic()
        os.kill(running.pid, signal.SIGHUP)
        assert running.wait(timeout=60) == 1
        assert time.monotonic() - began > 0.9


def test_gpu_is_one_process_for_a_machine():
    assert commands(launch("gpu.sh", "--dry-run", *ARGUMENTS)) == [
        ["python", "-m", "dfs_jax.main", *ARGUMENTS]
    ]
    (words,) = commands(launch("gpu.sh", "--dry-run", "--machine", "1/4", "host:99", *ARGUMENTS))
    assert words[3:] == [
        *ARGUMENTS, "--coordinator", "host:99", "--num-processes", "4", "--process-id", "1"
    ]  # fmt: skip


def test_gpu_is_one_process_for_each_gpu():
    found = commands(launch("gpu.sh", "--dry-run", "--per-gpu", *ARGUMENTS, GPUS="2", PORT="7"))
    assert [words[:2] for words in found] == [["env", f"CUDA_VISIBLE_DEVICES={i}"] for i in (0, 1)]
    assert [words[-1] for words in found] == ["0", "1"]


def test_gpu_refuses_both_ways_at_once():
    done = launch("gpu.sh", "--per-gpu", "--machine", "0/2", "host:1", *ARGUMENTS)
    assert done.returncode == 2
    assert "not both" in done.stderr


def test_slurm_runs_one_task_a_process():
    (words,) = commands(launch("slurm.sbatch", *ARGUMENTS, DRY_RUN="1"))
    assert words == [
        "srun", "--kill-on-bad-exit=1", "--label", "python", "-m", "dfs_jax.main", *ARGUMENTS
    ]  # fmt: skip
    options = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH --") and "=" in line
    )
    # JAX gives each task of a node the GPU of its number.
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@")


TPU = {"TPU_NAME": "dfs", "TPU_ZONE": "zone-b", "TPU_TYPE": "v4-32"}


def tpu(*words, **variables):
    return launch("tpu_pod.sh", "--dry-run", *words, **(TPU | variables))


def test_tpu_pod_from_its_creation_to_its_end():
    gcloud = ["gcloud", "compute", "tpus", "tpu-vm"]
    place = ["--zone", "zone-b", "--project", "p"]
    (create,) = commands(tpu("create", TPU_OPTIONS="--spot --labels=a=b", TPU_PROJECT="p"))
    assert create == [
        *gcloud, "create", "dfs", "--accelerator-type", "v4-32", "--version",
        "tpu-ubuntu2204-base", "--spot", "--labels=a=b", *place,
    ]  # fmt: skip
    archive, copy, install = commands_of_lines(tpu("setup").stdout)
    assert archive[0] == "git"
    assert copy[:5] == [*gcloud, "scp"]
    assert install[4:8] == ["ssh", "dfs", "--worker", "all"]
    (run,) = commands_of_lines(tpu("run", *ARGUMENTS).stdout)
    assert run[4:8] == ["ssh", "dfs", "--worker", "all"]
    # What the hosts' shells see is what was given here.
    remote = shlex.split(run[run.index("--command") + 1])
    start = remote.index("dfs_jax.main") + 1
    assert tuple(remote[start : start + len(ARGUMENTS)]) == ARGUMENTS
    logs = commands(tpu("logs", "out", TPU_HOSTS="4"))
    assert [words[6:9] for words in logs[1:]] == [
        [f"out/host-{i}.log", "--worker", str(i)] for i in range(4)
    ]
    (delete,) = commands(tpu("delete"))
    assert delete[4:] == ["delete", "dfs", "--quiet", "--zone", "zone-b"]


def commands_of_lines(text):
    """Commands whose words may hold line ends, which bash quotes as $'…\\n…'."""
    done = subprocess.run(
        [
            "bash",
            "-c",
            'while IFS= read -r line; do eval "words=($line)"; printf "%s\\0" "${words[@]}"; printf "\\1\\0"; done',  # noqa: E501
        ],
        input=text,
        capture_output=True,
        text=True,
        check=True,
    )
    return [
        part.split("\0")[:-1] for part in done.stdout.replace("\0\1\0", "\0\1").split("\1") if part
    ]


@pytest.mark.parametrize("missing", ["TPU_NAME", "TPU_ZONE", "TPU_TYPE"])
def test_tpu_pod_names_the_variable_that_is_missing(missing):
    done = tpu("create", **{missing: ""})
    assert done.returncode == 2
    assert f"set {missing}" in done.stderr
    assert not done.stdout


def test_tpu_pod_refuses_an_unknown_word():
    assert tpu("stop").returncode == 2


def test_dockerfile_ends_in_the_training_command():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    assert text.rstrip().endswith('ENTRYPOINT ["python", "-m", "dfs_jax.main"]')
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY")]
    assert all((ROOT / name).exists() for names in copied for name in names)


@pytest.mark.slow
def test_a_configuration_that_is_refused_is_told_once_by_each_process_and_ends_all(tmp_path):
    running = processes.start(2, 1, processes.arguments(tmp_path, "train.batch_size=15"))
    text, _ = running.communicate(timeout=300)
    assert running.returncode == 2
    assert "train.batch_size 15 is not divisible by the 2 devices" in text
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []
