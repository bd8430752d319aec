"""Weight files: what is written is read back; damage, strangers and code are refused."""

import json
import logging
import pickle
import sys
import types

import ml_dtypes
import numpy as np
import pytest

from dfs_jax.interop.files import read_weights, unwrap, write_weights
from dfs_jax.interop.torch import InteropError

ARRAYS = {
    "layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "layer.bias": np.array([1.5, -2], np.float64),
    "half": np.array([[0.25]], np.float16),
    "empty": np.zeros((3, 0), np.float32),
    "num_batches_tracked": np.int64(7),
    "flags": np.array([True, False, True]),
}


def _check(read, want):
    assert read.keys() == want.keys()
    for name, value in want.items():
        assert (read[name].dtype, read[name].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(read[name], value)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_round_trip(tmp_path, kind):
    write_weights(tmp_path / f"weights.{kind}", ARRAYS)
    _check(read_weights(tmp_path / f"weights.{kind}"), ARRAYS)


def test_bfloat16_needs_safetensors(tmp_path):
    arrays = {"w": np.array([1, 2.5, -3], ml_dtypes.bfloat16)}
    write_weights(tmp_path / "w.safetensors", arrays)
    _check(read_weights(tmp_path / "w.safetensors"), arrays)
    with pytest.raises(InteropError, match=r"\.npz cannot hold w of type bfloat16"):
        write_weights(tmp_path / "w.npz", arrays)


def test_safetensors_as_specified(tmp_path):
    """A file put together by hand, as in the format's own description."""
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [8, 10]},
    }
    text = json.dumps(header).encode()
    data = np.array([1, -2], "<f4").tobytes() + b"\x80\x3f"
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    read = read_weights(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(read["a"], [1, -2])
    assert read["b"].dtype == ml_dtypes.bfloat16
    assert read["b"] == 1


def _header(header, data=b""):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 16,
        (10).to_bytes(8, "little") + b"not json..",
        _header([1, 2]),
        _header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 4),
        _header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"\0" * 8),
        _header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, b"\0" * 8),
        _header({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
        _header({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
    ],
)
def test_damaged_safetensors(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(InteropError, match="is not an undamaged"):
        read_weights(tmp_path / "w.safetensors")


def test_pickles_in_an_npz_are_not_opened(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.array([print], object))
    with pytest.raises(InteropError, match="plain arrays"):
        read_weights(tmp_path / "w.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"something else"])
def test_damaged_npz(tmp_path, content):
    (tmp_path / "w.npz").write_bytes(content)
    with pytest.raises(InteropError, match="is not an undamaged"):
        read_weights(tmp_path / "w.npz")


def test_unknown_kinds_and_missing_files(tmp_path):
    with pytest.raises(InteropError, match="known kinds"):
        read_weights(tmp_path / "w.onnx")
    with pytest.raises(InteropError, match="no such file"):
        read_weights(tmp_path / "w.npz")
    with pytest.raises(InteropError, match=r"written as \.npz or"):
        write_weights(tmp_path / "w.pth", ARRAYS)


@pytest.mark.parametrize("key", ["state_dict", "model", "net"])
def test_wrapped_and_prefixed_state_dicts(key):
    inner = {"module.a.weight": np.ones(2), "module.module.b": np.zeros(3)}
    found = unwrap({"epoch": 3, key: inner, "best": 0.5}, "file")
    assert set(found) == {"a.weight", "module.b"}


def test_a_prefix_of_some_names_only_stays():
    assert set(unwrap({"module.a": np.ones(2), "b": np.ones(2)}, "file")) == {"module.a", "b"}


WEIGHTS, AVERAGED = {"a": np.zeros(2)}, {"a": np.ones(2)}


@pytest.mark.parametrize(
    ("content", "taken", "told"),
    [
        ({"state_dict_ema": AVERAGED}, 1, "under state_dict_ema are taken"),
        ({"state_dict": WEIGHTS, "state_dict_ema": AVERAGED}, 1, "not those under state_dict"),
        ({"model": WEIGHTS, "model_ema": {"module": AVERAGED}}, 1, "model_ema → module are taken"),
        ({"state_dict": {"model": WEIGHTS, "decay": 0.9}, "epoch": 3}, 0, "state_dict → model"),
        ({"ema": None, "params": {"lr": 0.1}, "model": WEIGHTS}, 0, "under model are taken"),
        ({"ema": {"decay": 0.9}, "a": WEIGHTS["a"], "epoch": 3}, 0, "no arrays: ema, epoch"),
    ],
)
def test_which_weights_of_a_file_are_taken(content, taken, told, caplog):
    """Averaged ones before others, and what was taken is told."""
    with caplog.at_level(logging.INFO):
        found = unwrap(content, "file")
    assert found.keys() == {"a"}
    assert found["a"].tolist() == [taken] * 2
    assert told in caplog.text


@pytest.mark.parametrize("content", [{}, [1, 2], {"epoch": 3}, {"weights": {"a": np.ones(2)}}])
def test_what_is_not_a_state_dict(content):
    with pytest.raises(InteropError, match="file"):
        unwrap(content, "file")


def test_without_pytorch(tmp_path, monkeypatch):
    (tmp_path / "w.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InteropError, match="pip install torch, or convert it"):
        read_weights(tmp_path / "w.pth")


# The beginning of what torch 2.6 and later say.
ADVICE = """Weights only load failed. This file can still be loaded, to do so you have two options
\t(1) Re-running `torch.load` with `weights_only` set to `False` will likely succeed
\t(2) WeightsUnpickler error: Unsupported global: GLOBAL argparse.Namespace was not an allowed"""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            pickle.UnpicklingError(ADVICE),
            ": it needs argparse.Namespace, whose code would run here",
        ),
        (pickle.UnpicklingError("invalid load key"), "."),
        (RuntimeError("Cannot use ``weights_only=True`` with TorchScript archives"), "."),
        (RuntimeError("failed reading zip archive\nmore"), ": failed reading zip archive"),
    ],
)
def test_what_pytorch_refuses_is_told_without_its_advice(tmp_path, monkeypatch, error, reason):
    def load(file, *, map_location, weights_only):
        assert weights_only
        raise error

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(InteropError) as refused:
        read_weights(tmp_path / "w.pth")
    message = str(refused.value)
    assert f"w.pth is not a PyTorch file of plain weights{reason}" in message
    assert "weights_only" not in message
    assert ("torch.save(model.state_dict(), FILE)" in message) == ("zip" not in message)


def test_pytorch_files(tmp_path):
    torch = pytest.importorskip("torch")
    state = {
        "module.w": torch.arange(6.0).reshape(2, 3).T,
        "module.h": torch.tensor([1.0, -2.5], dtype=torch.bfloat16),
        "module.n": torch.tensor(7),
    }
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "w.pth")
    want = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "h": np.array([1, -2.5], ml_dtypes.bfloat16),
        "n": np.int64(7),
    }
    _check(read_weights(tmp_path / "w.pth"), want)


class _Intruder:
    ran = False

    def __reduce__(self):
        return (_run, ())


def _run():
    _Intruder.ran = True


def test_code_in_a_pytorch_file_does_not_run(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": _Intruder()}, tmp_path / "w.pt")
    with pytest.raises(InteropError, match="not a PyTorch file of plain weights"):
        read_weights(tmp_path / "w.pt")
    assert not _Intruder.ran
