"""The command that prints cost and parameters of every exit."""

import json
from pathlib import Path

import pytest

from dfs_jax import flops

GOLDEN = json.loads((Path(__file__).parent / "golden" / "flops.json").read_text())
DIGITS = str(Path(__file__).parents[1] / "configs" / "digits.py")


def test_command_prints_the_published_columns(capsys):
    argv = ["--network", "msdnet_cifar100", "--image-size", "32", "--num-classes", "100"]
    assert flops.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("  ")[0] == "exit"
    golden = GOLDEN["msdnet_cifar100"]
    for i, line in enumerate(lines[1:]):
        number, cost, _, parameters, share, _ = line.split()
        assert number == str(i + 1)
        assert float(cost) == golden["published_flops_M"][i]
        assert float(parameters) == golden["published_params_M"][i]
        flops_i, last = golden["cumulative_flops"][i], golden["cumulative_flops"][-1]
        assert float(share) == round(100 * flops_i / last, 1)


def test_command_on_a_configuration(capsys):
    assert flops.main(["--config", DIGITS]) == 0
    digits = capsys.readouterr().out
    assert len(digits.splitlines()) == 5
    argv = ["--network", "msdnet_digits", "--image-size", "8", "--channels", "1"]
    assert flops.main([*argv, "--num-classes", "10"]) == 0
    assert capsys.readouterr().out == digits
    assert flops.main(["--config", DIGITS, "--config.data.image_size=16"]) == 0
    square = capsys.readouterr().out
    assert flops.main(["--config", DIGITS, "--config.data.image_size=(16,8)"]) == 0
    assert len({digits, square, capsys.readouterr().out}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "either --config FILE or --network NAME"),
        (f"--config {DIGITS} --network vgg7_cifar100", "either --config FILE or --network NAME"),
        ("--network nonesuch --image-size 32 --num-classes 10", "known: msdnet_cifar100"),
        ("--network vgg7_cifar100 --image-size 32", "--num-classes"),
        (
            "--network vgg7_cifar100 --image-size 0 --num-classes 10",
            "--image-size must be at least",
        ),
        ("--network vgg7_cifar100 --image-size 4 --num-classes 10", "8x8"),
        ("--config nowhere.py", "no file 'nowhere.py'"),
        (f"--config {DIGITS} --config.data.image_size=(8,8,1)", "nor a pair (height, width)"),
        (f"--config {DIGITS} --config.surgery.beta=2", "surgery.beta"),
        (f"--config {DIGITS} --config.surgery.betta=0.2", "'beta'"),
        (f"--config {DIGITS} --config.data.name=zoo", "--image-size and --num-classes"),
    ],
)
def test_command_refuses_with_one_sentence(arguments, message, capsys):
    assert flops.main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
