"""The benchmark of a step: its figures against each other and against independent counts."""

import csv
import itertools
import json
import math
import os
import re
import subprocess
import sys

import jax
import matplotlib.image
import numpy as np
import optax
import pytest
import tiny_run
from shapes import image
from tiny_run import few_digits  # noqa: F401

from dfs_jax import benchmark
from dfs_jax.models import create_model
from dfs_jax.models.cost import minimal_training_multiply_adds
from dfs_jax.profiling import input_gradients, overheads, random_images, step_cost, timing
from dfs_jax.surgery import Surgery
from dfs_jax.training.run import prepare
from dfs_jax.training.state import abstract_state, initial_state
from dfs_jax.training.step import make_train_step

FLAGS = [f"--config.{item}" for item in tiny_run.overrides("model.options.dropout_rate=0.0")]
COMMAND = ["--config", tiny_run.DIGITS, *FLAGS]


@pytest.fixture(scope="module")
def files(tmp_path_factory, few_digits):  # noqa: F811
    """The stem of the files of one benchmark, and what it printed."""
    out = tmp_path_factory.mktemp("benchmark") / "tiny.v1"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(words)))
        arguments = ["--methods", "dfs", "dfs", "--batch_sizes", "8", "16", "--pairs=3"]
        assert benchmark.main([*COMMAND, *arguments, f"--out={out}.csv"]) == 0
    return out, "\n".join(printed)


@pytest.fixture(scope="module")
def results(files):
    return json.loads(files[0].with_name("tiny.v1.json").read_text())


def test_the_files_tell_the_same(files, results):
    out, printed = files
    assert sorted(path.name for path in out.parent.iterdir()) == [
        f"tiny.v1.{suffix}" for suffix in ("csv", "json", "md", "png")
    ]
    found = [(r["method"], r["batch_size"]) for r in results["results"]]
    assert found == [("joint", 8), ("dfs", 8), ("joint", 16), ("dfs", 16)]
    with open(f"{out}.csv", newline="") as file:
        for row, result in zip(csv.DictReader(file), results["results"], strict=True):
            assert [row["method"], row["batch_size"]] == [
                result["method"],
                str(result["batch_size"]),
            ]
            assert float(row["step_seconds"]) == result["median_seconds"]["step"]
            assert float(row["step_flops"]) == result["phases"]["step"]["flops"]
    text = out.with_name("tiny.v1.md").read_text()
    assert text in printed
    rows = [line for line in text.splitlines() if line.startswith(("| joint", "| dfs"))]
    assert len(rows) == 4 + 2
    assert f"{results['results'][0]['images_per_second']:.1f}" in rows[0]
    pixels = matplotlib.image.imread(f"{out}.png")[..., :3]
    assert (pixels < 0.9).any(axis=-1).mean() > 0.05


def test_figures_follow_from_the_times_that_are_kept(results):
    baseline = None
    for result in results["results"]:
        step, both = result["phases"]["step"], result["phases"]["forward_backward"]
        if result["method"] == "joint":
            baseline = result
        assert len(step["seconds"]) == 3
        assert min(step["seconds"]) > 0
        median = np.median(step["seconds"])
        assert result["images_per_second"] == pytest.approx(result["batch_size"] / median)
        parts = result["median_seconds"]
        assert sum(parts[name] for name in ("forward", "backward", "other")) == pytest.approx(
            median
        )
        assert parts["other"] == pytest.approx(median - np.median(both["seconds"]))
        assert step["peak_bytes"] >= step["argument_bytes"] + step["temporary_bytes"]
        assert step["trace_seconds"] > 0
        assert step["compile_seconds"] > 0
        if result is baseline:
            assert step["time_ratio"] is None
            continue
        for phase, own in result["phases"].items():
            assert own["baseline_seconds"] == baseline["phases"][phase]["seconds"]
            ratios = np.divide(own["seconds"], own["baseline_seconds"])
            quartiles = np.percentile(ratios, (25, 50, 75))
            names = ("lower", "median", "upper")
            assert [own["time_ratio"][n] for n in names] == pytest.approx(quartiles.tolist())
            assert own["flops_ratio"] == own["flops"] / baseline["phases"][phase]["flops"]


def test_bound_follows_from_the_layers_that_are_kept(results):
    assert results["results"][0]["bound"] is None
    for result in results["results"][1::2]:
        bound, step = result["bound"], result["phases"]["step"]
        # Six channels, half of which are live: the next convolution and the exit read them.
        assert [(x["layer"], x["live"], x["shape"][-1]) for x in bound["layers"]] == [
            ("dense", 3, 6),
            ("conv", 3, 6),
        ]
        assert bound["layers"][1]["shape"][0] == result["batch_size"]
        whole = sum(layer["full_seconds"] for layer in bound["layers"])
        assert bound["input_gradient_seconds"] == pytest.approx(whole)
        beta, joint = 0.5, np.median(step["baseline_seconds"])
        assert bound["gain"] == pytest.approx(1 / (1 - (1 - beta) * whole / joint) - 1)
        gain = 1 / step["time_ratio"]["median"] - 1
        assert bound["share_reached"] == pytest.approx(gain / bound["gain"])


def test_machine_and_configuration_are_recorded(results):
    assert results["machine"]["platform"] == "cpu"
    assert results["machine"]["devices"] == jax.device_count()
    assert results["versions"]["jax"] == jax.__version__
    assert results["image_shape"] == [8, 8, 1]
    joint = tiny_run.config("model.options.dropout_rate=0.0", "train.batch_size=8")
    joint.surgery.partition = False
    assert results["results"][0]["config_sha256"] == step_cost.sha256(joint)
    digests = [result["config_sha256"] for result in results["results"]]
    assert len(set(digests)) == 4


def test_flops_are_those_of_the_step_on_real_data(results):
    """The program that training would compile for the data set itself, counted apart."""
    result = results["results"][1]
    run = prepare(tiny_run.config("model.options.dropout_rate=0.0", "train.batch_size=8"))
    batch = next(run.data.train.batches(0))
    compiled = make_train_step(run).lower(abstract_state(run), batch).compile()
    assert result["phases"]["step"]["flops"] == compiled.cost_analysis()["flops"]

    def losses(params, batch_stats):
        outputs, _ = run.network.apply(
            {"params": params, "batch_stats": batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        each = optax.softmax_cross_entropy_with_integer_labels
        return sum(each(logits, batch["label"]).mean() for logits in outputs.logits)

    state = abstract_state(run)
    for phase, function in (("forward", losses), ("forward_backward", jax.grad(losses))):
        quick = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
        alone = quick.lower(state.params, state.batch_stats).compile()
        counted = alone.cost_analysis()["flops"]
        assert result["phases"][phase]["flops"] == pytest.approx(counted, rel=0.05)

    joint = create_model(
        "vgg7_cifar100", num_classes=10, surgery=Surgery(partition=False), widths=((6,), (4,))
    )
    least, whole = (
        minimal_training_multiply_adds(network, image(8, 8, 1)) for network in (run.network, joint)
    )
    assert result["least_flops_ratio"] == least / whole < 1
    assert results["results"][0]["least_flops_ratio"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--methods", "joint", "nonsense"],
            "'nonsense' is unknown; .*methods: dfs, dfs_all, join",
        ),
        (["--methods", "msdnet"], "'msdnet' is a network word of .*digits.py, not a method word"),
        (["--batch_sizes", "8", "0"], "--batch_sizes must be at least 1, got 0"),
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (["--calls=-1"], "--calls must be at least 1, got -1"),
        (["--num_classes=0"], "--num_classes must be at least 1, got 0"),
        (["--num_classes=9999999999"], r"--num_classes must be below 2\*\*31, got 9999999999"),
        (["--batch_sizes", "9" * 20], "train.batch_size = 9+ must be between"),
        (["--overheads", "--pairs=0"], "--pairs must be at least 1, got 0"),
        (["--batch_sizes", "9", "--config.mesh.data=4"], "9 is not divisible by the 4 devices"),
        (["--config.surgery.beta=2"], r"beta must lie in \[0, 1\]"),
        (["--config.train.accumulation=2"], "train.accumulation must be 1, got 2"),
        (["--config.data.name=tfds:other"], "size of the images of data set 'tfds:other'"),
        (
            ["--config.data.name=tfds:other", "--config.data.image_size=8"],
            "number of classes .*'tfds:other' is not known here; give --num_classes",
        ),
        (["--out=/"], "--out: / is a folder; name a file"),
        (["--out={here}/missing/file"], "cannot write to folder .*/missing: No such file"),
        (["--out={here}/plain/file"], "cannot write to folder .*/plain: Not a directory"),
        (["--overheads", "--out={here}/missing/file"], "cannot write to folder .*/missing"),
    ],
)
def test_what_cannot_be_done_is_refused_first(arguments, message, tmp_path, capsys):
    (tmp_path / "plain").write_text("a file")
    arguments = [argument.format(here=tmp_path) for argument in arguments]
    with tiny_run.compilations() as compiled:
        assert benchmark.main([*COMMAND, *arguments]) == 2
    assert compiled == []
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert re.search(message, told), told
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_a_second_method_word_is_refused(capsys):
    command = ["--config", f"{tiny_run.DIGITS}:dfs", *FLAGS, "--methods", "ge"]
    assert benchmark.main(command) == 2
    assert "preset names two methods, 'dfs' and 'joint'; give one" in capsys.readouterr().err


def test_methods_take_turns_with_the_baseline():
    done, now = [], itertools.count()
    calls = {name: lambda name=name: done.append(name) or 2 for name in ("b", "a", "c")}
    times = timing.time_pairs({"": calls}, "a", 2, clock=lambda: next(now) ** 2)[""]
    warm_up = 2 * len(calls)
    assert "".join(done[warm_up:]) == "abac" * 2
    # Call n runs from second (2n)^2 to (2n + 1)^2 and does its work twice.
    seconds = [(4 * n + 1) / 2 for n in range(8)]
    assert times["b"].own == (seconds[1], seconds[5])
    assert times["b"].baseline == (seconds[0], seconds[4])
    assert times["c"].own == (seconds[3], seconds[7])
    assert times["c"].baseline == (seconds[2], seconds[6])
    assert times["a"].own == tuple(seconds[::2])
    assert times["a"].baseline == ()
    assert times["c"].ratios.tolist() == [seconds[3] / seconds[2], seconds[7] / seconds[6]]


def test_phases_of_a_step_take_turns_too():
    done = []
    groups = {
        phase: {name: lambda word=phase + name: done.append(word) or 1 for name in "ab"}
        for phase in "fs"
    }
    times = timing.time_pairs(groups, "a", 2, clock=lambda: 0.0)
    assert done[8:] == ["fa", "fb", "sa", "sb"] * 2
    assert {phase: set(of) for phase, of in times.items()} == {"f": {"a", "b"}, "s": {"a", "b"}}


def test_divergence_is_told(caplog):
    flags = ["train.batch_size=4", "optimizer.learning_rate=1e30", "surgery.partition=False"]
    run = random_images.random_run(tiny_run.config(*flags))
    assert step_cost.measure({"joint": run}, 2)[0].bound is None
    assert "joint diverged on the random images" in caplog.text


def test_a_baseline_alone_is_timed_as_often():
    done = []
    calls = {"": {"a": lambda: done.append("a") or 1}}
    assert timing.time_pairs(calls, "a", 3, clock=lambda: 0.0)[""]["a"].own == (0.0,) * 3
    assert len(done) == 2 + 3


def _ticking():
    """A clock by which every call takes a second."""
    now = itertools.count()
    return lambda: float(next(now))


def test_layers_that_read_a_partitioned_feature_are_all_that_surgery_saves():
    network = create_model(
        "vgg7_cifar100", num_classes=10, surgery=Surgery(beta=0.3), widths=((6, 4, 4), (8,))
    )
    found = input_gradients.measure(network, (2, 8, 8, 1), 1, clock=_ticking())
    saved = 0
    for layer in found.layers:
        batch, *sides, channels = layer.shape
        *window, _, outputs = layer.kernel  # the padding keeps the map
        dead = channels - layer.live
        saved += layer.count * batch * math.prod([*sides, *window]) * dead * outputs
    whole, least = (
        minimal_training_multiply_adds(network.clone(surgery=surgery), image(8, 8, 1))
        for surgery in (Surgery(partition=False), network.surgery)
    )
    assert saved == 2 * (whole - least)  # two images


def test_dead_channels_are_known_wherever_dense_connections_carry_them():
    surgery = Surgery(beta=0.25, exit_gradient="all")
    network = create_model("msdnet_digits", num_classes=10, surgery=surgery)
    found = input_gradients.measure(network, (2, 8, 8, 1), 1, clock=_ticking())
    assert all(layer.live < layer.shape[-1] == layer.kernel[-2] for layer in found.layers)
    assert len({layer.live / layer.shape[-1] for layer in found.layers}) > 1
    # Every layer takes a second.
    assert found.full_seconds == found.live_seconds == sum(layer.count for layer in found.layers)
    dead = sum(layer.count * (1 - layer.live / layer.shape[-1]) for layer in found.layers)
    assert found.dead_seconds == pytest.approx(dead)


def test_timed_input_gradient_is_the_layers_own(monkeypatch):
    """What is timed gives the gradient of the live channels and zeros elsewhere."""
    seen = []
    monkeypatch.setattr(
        input_gradients.jax, "block_until_ready", lambda x: seen.append(np.asarray(x)) or x
    )
    network = create_model(
        "vgg7_cifar100", num_classes=10, surgery=Surgery(beta=0.5), widths=((6,), (4,))
    )
    input_gradients.measure(network, (2, 8, 8, 1), 1)
    conv = [x for x in seen if x.ndim == 4]
    full, live = conv[0], conv[-1]
    assert full.shape == live.shape == (2, 4, 4, 6)
    np.testing.assert_allclose(live[..., :3], full[..., :3], rtol=1e-4, atol=1e-5)
    assert not live[..., 3:].any()
    assert full[..., 3:].any()


def test_prefix_networks_are_the_cheap_way_to_per_exit_gradients():
    overrides = ["model.options.widths=((4,4),(8,8))", "model.options.dropout_rate=0.0"]
    config = tiny_run.config(*overrides, "surgery.partition=False", "train.batch_size=8")
    run = random_images.random_run(config)
    state = initial_state(run)
    batch = next(run.data.train.batches(0))
    counted, gradients = {}, {}
    for name, function in overheads.exit_gradient_functions(run).items():
        quick = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
        compiled = quick.lower(state, batch).compile()
        counted[name] = compiled.cost_analysis()["flops"]
        gradients[name] = compiled(state, batch)
    assert 1.5 < counted["prefix"] / counted["summed"] < 2  # (1 + 2 + 3 + 4) / 4 at most is 2.5
    assert counted["prefix"] < 0.75 * counted["jacrev"]
    stacked = jax.tree.map(lambda *rows: np.stack(rows), *gradients["prefix"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        stacked,
        gradients["jacrev"],
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.sum(0), b, rtol=1e-3, atol=1e-5),
        stacked,
        gradients["summed"],
    )


@pytest.mark.slow
def test_overheads_are_written_and_told(tmp_path, capsys):
    hits = []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
    )
    out = tmp_path / "overheads.json"
    small = "--config.train.batch_size=4"
    before = jax.config.jax_compilation_cache_dir
    assert benchmark.main([*COMMAND, small, "--overheads", "--pairs=2", f"--out={out}"]) == 0
    assert hits  # the second compilation was fetched
    assert jax.config.jax_compilation_cache_dir == before
    found = json.loads(out.read_text())
    assert found["report_share"] == found["report_seconds"] / found["step_seconds"]
    assert found["evaluation_share"] == found["evaluation_seconds"] / found["step_seconds"]
    assert min(found["gradient_seconds"].values()) > 0
    ratio = found["gradient_flops"]["prefix"] / found["gradient_flops"]["summed"]
    printed = capsys.readouterr()
    assert f"{ratio:.2f} FLOPs" in printed.out
    assert f"{found['report_share']:.2%} of a step" in printed.out
    assert "loss" not in printed.err  # the lines of progress


def test_help_says_how_files_are_named():
    command = [sys.executable, "-m", "dfs_jax.benchmark", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0
    for suffix in ("FILE.json", "FILE.csv", "FILE.md", "FILE.png"):
        assert suffix in done.stdout
