import errno
import io
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.training import metrics, progress
from dfs_jax.training.metrics import MetricWriter


def open_writer(workdir, **options):
    return MetricWriter(workdir, tensorboard=False, **options)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_every_line_is_on_disk_when_write_returns(tmp_path):
    with open_writer(tmp_path / "new") as w:
        for step in (1, 2):
            w.write(step, {"train/loss": jnp.float32(0.5), "n": np.int64(step)})
            assert lines(tmp_path / "new")[-1] == {"step": step, "train/loss": 0.5, "n": step}


def test_values_that_json_lacks_are_null_and_read_back_as_nan(tmp_path):
    with open_writer(tmp_path) as w:
        w.write(1, {"a": math.nan, "b": jnp.float32(jnp.inf), "c": 0.1})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "a": None, "b": None, "c": 0.1}
    with open_writer(tmp_path, start_step=1):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == text
    record = metrics.read_metrics(tmp_path)[0]
    assert math.isnan(record["a"])
    assert record["c"] == 0.1


@pytest.mark.parametrize(
    "torn", ['{"step": 9, "a": 1', '{"step"', "\x00\x00", '{"step": 6, "a": 1.']
)
def test_resume_removes_what_lies_beyond_and_a_torn_last_line(tmp_path, torn):
    with open_writer(tmp_path) as w:
        for step in range(2, 9, 2):
            w.write(step, {"train/loss": step / 10})
        w.write(6, {"eval/mean/top1": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write(torn)
    assert [r["step"] for r in metrics.read_metrics(tmp_path)] == [2, 4, 6, 8, 6]
    with open_writer(tmp_path, start_step=6) as w:
        # The evaluation of step 6 runs again on resume.
        w.write(6, {"eval/mean/top1": 0.75, "eval/ensemble/top1": 0.6})
        w.write(6, {"eval/mean/top1": 0.8})
        w.write(8, {"train/loss": 0.8})
    assert lines(tmp_path) == [
        {"step": 2, "train/loss": 0.2},
        {"step": 4, "train/loss": 0.4},
        {"step": 6, "train/loss": 0.6},
        {"step": 6, "eval/mean/top1": 0.5},
        {"step": 6, "eval/ensemble/top1": 0.6},
        {"step": 8, "train/loss": 0.8},
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}')
    with open_writer(tmp_path, start_step=2) as w:
        w.write(3, {"a": 3})
    assert [r["a"] for r in lines(tmp_path)] == [1, 2, 3]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with open_writer(tmp_path) as w:
        w.write(1, {"a": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert metrics.read_metrics(tmp_path) == []


def test_tensorboard_events_are_written(tmp_path):
    tf = pytest.importorskip("tensorflow")
    pytest.importorskip("clu.metric_writers")
    with MetricWriter(tmp_path) as w:
        w.write(3, {"train/loss": 0.25})
    (events,) = tmp_path.glob("events.out.tfevents.*")
    values = {
        v.tag: (e.step, float(tf.make_ndarray(v.tensor)))
        for e in tf.compat.v1.train.summary_iterator(str(events))
        for v in e.summary.value
    }
    assert values["train/loss"] == (3, 0.25)


def test_after_an_interruption_tensorboard_shows_every_step_once(tmp_path):
    tf = pytest.importorskip("tensorflow")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, last, factor in ((0, 7, 1.0), (4, 9, 10.0), (9, 9, 0.0), (7, 8, 100.0)):
        with MetricWriter(tmp_path, start_step=start) as w:
            for step in range(start + 1, last + 1):
                w.write(step, {"train/loss": step * factor, "n": step})
        newest = max(tmp_path.glob("events.out.tfevents.*"))
        if start == 4:  # what a full disk leaves
            newest.write_bytes(newest.read_bytes() + b"torn")
    shown = reader.EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    found = [(e.step, float(tf.make_ndarray(e.tensor_proto))) for e in shown.Tensors("train/loss")]
    assert found == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50), (6, 60), (7, 70), (8, 800)]


def test_without_tensorflow_the_file_is_written_all_the_same(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with MetricWriter(tmp_path) as w:
        w.write(3, {"train/loss": 0.25})
    assert lines(tmp_path) == [{"step": 3, "train/loss": 0.25}]
    assert "No TensorBoard events" in caplog.text


def test_progress_lines(monkeypatch):
    clock = iter([100.0, 150.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    lines = progress.Progress(2000, start_step=1000, stream=stream)
    scores = {"exit1/top1": 0.5, "exit2/top1": 0.625}
    shown = {"train/loss": 1.23456, "train/images_per_second": 12345.6}
    lines.training(1010, shown | {f"train/{name}": v for name, v in scores.items()})
    scores |= {"ensemble/top1": 0.6, "mean/top1": 0.5625, "exit1/loss": 2.0}
    lines.evaluation(1010, {f"eval/{name}": v for name, v in scores.items()})
    # 5 seconds a step since step 1000, 990 steps to go.
    assert stream.getvalue().splitlines() == [
        "step 1010/2000 (50.5%)  loss 1.2346  train top1 by exit 0.500 0.625  12,346 images/s  "
        "ETA 1:22:30",
        "step 1010/2000 (50.5%)  eval top1 by exit 0.500 0.625  ensemble 0.6000  mean 0.5625",
    ]


def test_a_progress_line_that_cannot_be_written_is_left_out():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    progress.Progress(2000, stream=Full()).training(10, {"train/loss": 1.0})
