import json

import numpy as np
import pytest
from PIL import Image

from dfs_jax import benchmark
from dfs_jax.profiling import input_rate


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, size in (("train", 16), ("test", 2)):
        (root / split / "class").mkdir(parents=True)
        for i in range(size):
            pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / "class" / f"{i}.png")
    values = {
        "data.dir": root,
        "data.image_size": 16,
        "data.validation_size": 0,
        "model.name": "vgg7_cifar100",
        "model.options.widths": "((4,), (4,))",
        "train.batch_size": 16,
        "train.eval_batch_size": 16,
        "train.compilation_cache": "",
    }
    overrides = [f"--config.{field}={value}" for field, value in values.items()]
    return ["--config", "configs/folder.py", "--input_only", *overrides]


def test_the_command_prints_a_table_and_writes_json(flags, tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert benchmark.main([*flags, "--batches=4", "--steps=3", "--start=7", f"--out={out}"]) == 0
    figures = json.loads(out.read_text())
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[-5:-2]] == ["input", "step", "both"]
    assert table[-1].startswith("the first batch, of step 7, came after ")
    assert (figures["start"], figures["first_batch_seconds"] > 0) == (7, True)
    assert (figures["batch_size"], figures["network"]) == (16, "vgg7_cifar100")
    for name in ("input", "step", "both"):
        speed, seconds = figures[name]["images_per_second"], figures[name]["seconds_per_batch"]
        assert speed * seconds == pytest.approx(16)
    assert 0 < figures["both"]["data_wait"] <= 1
    assert figures["step"]["data_wait"] < 0.5


def test_without_steps_only_the_input_is_measured(flags, capsys):
    assert benchmark.main([*flags, "--batches=2", "--steps=0"]) == 0
    assert capsys.readouterr().out.splitlines()[-3].split()[0] == "input"


def test_waiting_is_what_a_slow_input_makes(monkeypatch):
    import time

    class Slow:
        def batches(self, start, sharding):
            while True:
                time.sleep(0.05)
                yield {"image": np.zeros((4, 2, 2, 3)), "label": np.zeros(4, int)}

    class Run:
        mesh = None
        data = type("Data", (), {"train": Slow()})

    monkeypatch.setattr(input_rate.placement, "batch", lambda mesh: None)
    monkeypatch.setattr(input_rate, "initial_state", lambda run: 0)
    monkeypatch.setattr(input_rate, "make_train_step", lambda run: lambda s, b: (s + 1, {}))
    found = input_rate.measure_input(Run, batches=4, steps=3)
    assert found.first_seconds > 0.05
    paces = found.paces
    assert paces["input"].images_per_second < 4 / 0.05
    assert paces["both"].data_wait > 0.9
    assert paces["both"].seconds > 0.15
    assert paces["step"].data_wait < 0.5


def test_a_wrong_configuration_is_refused(flags, capsys):
    assert benchmark.main([*flags, "--config.data.streams=5"]) == 2
    assert "not a multiple of data.streams 5" in capsys.readouterr().err
