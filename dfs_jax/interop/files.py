"""Weight files: `.npz` and `.safetensors` read and written here, `.pth` read through PyTorch.

Nothing in a file is ever executed. A file holds a flat dictionary of named arrays; what wraps
one in a PyTorch checkpoint is taken off. What the names mean is in `torch.py`.
"""

import json
import logging
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from dfs_jax.interop.torch import InteropError
from dfs_jax.writing.files import open_whole

log = logging.getLogger(__name__)

# Fields under which training scripts keep the state dict, the first one present being taken:
# averaged weights before others, since evaluation prefers them.
_WRAPPERS = ("state_dict_ema", "ema_state_dict", "model_ema", "params_ema", "ema")
_WRAPPERS += ("state_dict", "model_state_dict", "model", "net", "network", "module", "params")
# Put before every name by DataParallel and by torch.compile.
_PREFIXES = ("module.", "_orig_mod.")

# https://github.com/huggingface/safetensors: 8 bytes of length, a JSON header, raw arrays.
_DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype("uint8"),
    "I8": np.dtype("int8"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_LARGEST_HEADER = 100_000_000  # bytes, the format's own limit


def read_weights(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The named arrays of a `.npz`, `.safetensors`, `.pth`, `.pt` or `.bin` file.

    Raises InteropError, in one sentence, for a file that is missing, damaged or of another
    kind, and for `.pth` files where PyTorch is not installed.
    """
    path = epath.Path(path)
    read = {
        ".npz": _read_npz,
        ".safetensors": _read_safetensors,
        ".pth": _read_torch,
        ".pt": _read_torch,
        ".bin": _read_torch,
    }.get(path.suffix.lower())
    if read is None:
        raise InteropError(f"{path}: known kinds of weight files are .npz, .safetensors, .pth, .pt")
    if not path.exists():
        raise InteropError(f"{path}: there is no such file")
    try:
        content = read(path)
    except OSError as error:
        raise InteropError(f"{path} cannot be read: {error.strerror or error}") from error
    return unwrap(content, str(path))


def write_weights(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays as `.npz` or `.safetensors`.

    Raises InteropError for other kinds, for a place that cannot be written to, and for types
    that the kind cannot hold (`.npz`: bfloat16).
    """
    path = epath.Path(path)
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    write = {".npz": _write_npz, ".safetensors": _write_safetensors}.get(path.suffix.lower())
    if write is None:
        raise InteropError(f"{path}: weights are written as .npz or .safetensors")
    try:
        write(path, arrays)
    except OSError as error:
        raise InteropError(f"{path} cannot be written: {error.strerror or error}") from error


def unwrap(content: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """The state dict inside the content of a checkpoint, with the official names.

    `{"state_dict": …}` and its like are taken off, one within the other too, as is a "module."
    before all names; the log tells which. Raises InteropError if there is no flat dictionary of
    arrays.
    """
    path: list[str] = []
    while wrappers := _wrappers(content):
        key, *others = wrappers
        content = content[key]
        path.append(key)
        unused = f" and not those under {', '.join(others)}" if others else ""
        log.info("%s: the weights under %s are taken%s", where, " → ".join(path), unused)
    if not isinstance(content, Mapping) or not content:
        raise InteropError(f"{where} holds no named arrays but {type(content).__name__}")
    arrays = {name: np.asarray(v) for name, v in content.items() if _is_array(name, v)}
    others = [name for name in content if name not in arrays]
    if not arrays:
        raise InteropError(
            f"{where}: {others[0]!r} is {type(content[others[0]]).__name__}, not an array; a state "
            f"dict is looked for at the top and under {', '.join(_WRAPPERS)}"
        )
    if others:
        log.info("%s: left out, for they are no arrays: %s", where, ", ".join(map(str, others)))
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in arrays):
            arrays = {name.removeprefix(prefix): value for name, value in arrays.items()}
    return arrays


def _wrappers(content: Any) -> list[str]:
    """The fields of `content` that hold weights, the preferred one first."""
    if not isinstance(content, Mapping):
        return []
    return [key for key in _WRAPPERS if _holds_arrays(content.get(key))]


def _holds_arrays(content: Any) -> bool:
    return isinstance(content, Mapping) and any(
        _is_array(name, value) or _holds_arrays(value) for name, value in content.items()
    )


def _is_array(name: Any, value: Any) -> bool:
    return isinstance(name, str) and hasattr(value, "shape")


def _read_npz(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    except (ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise InteropError(f"{path} is not an undamaged .npz file of plain arrays") from error


def _write_npz(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    for name, value in sorted(arrays.items()):
        if value.dtype.kind not in "biuf":
            raise InteropError(
                f"{path}: .npz cannot hold {name} of type {value.dtype}; use .safetensors"
            )
    with open_whole(path) as file:
        np.savez(file, **arrays)


def _read_safetensors(path: epath.Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    try:
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > min(_LARGEST_HEADER, len(data) - 8):
            raise ValueError("the header ends after the file")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        buffer = memoryview(data)[8 + length :]
        return {name: _tensor(buffer, **entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InteropError(f"{path} is not an undamaged .safetensors file: {error}") from error


def _tensor(
    buffer: memoryview, *, dtype: str, shape: list[int], data_offsets: list[int]
) -> np.ndarray:
    kind, (start, stop) = _DTYPES[dtype], data_offsets
    if not 0 <= start <= stop <= len(buffer) or stop - start != math.prod(shape) * kind.itemsize:
        raise ValueError(f"bytes {start}..{stop} of {len(buffer)} for {dtype} {shape}")
    return np.frombuffer(buffer[start:stop], kind).reshape(shape)


def _write_safetensors(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    kinds = {dtype: name for name, dtype in _DTYPES.items()}
    header, start = {}, 0
    # Wide types first keep every array aligned; the order of names makes the file a function
    # of its content.
    ordered = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    for name in ordered:
        value = arrays[name]
        kind = kinds.get(value.dtype.newbyteorder("<"))
        if kind is None:
            raise InteropError(f"{path}: .safetensors cannot hold {name} of type {value.dtype}")
        stop = start + value.nbytes
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open_whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            value = arrays[name]
            file.write(value.astype(value.dtype.newbyteorder("<")).tobytes())


def _read_torch(path: epath.Path) -> Any:
    try:
        import torch
    except ImportError:
        raise InteropError(
            f"{path} can only be read with PyTorch: pip install torch, or convert it where PyTorch "
            "is installed: safetensors.torch.save_file(torch.load(FILE, weights_only=True), OUT)"
        ) from None
    try:
        with path.open("rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch errors of many kinds
        raise InteropError(
            f"{path} is not a PyTorch file of plain weights{_reason(error)}"
        ) from error
    return _numpy(content)


def _reason(error: Exception) -> str:
    """The first line of torch's, unless it goes on to advise what would run code in the file."""
    if not isinstance(error, pickle.UnpicklingError) and "weights_only" not in str(error):
        return f": {(str(error).splitlines() or [type(error).__name__])[0]}"
    needed = re.search(r"GLOBAL ([\w.]+)", str(error))
    return (
        (f": it needs {needed[1]}, whose code would run here" if needed else "")
        + ". Where the file was made, save the weights alone: "
        "torch.save(model.state_dict(), FILE), or safetensors.torch.save_file likewise"
    )


def _numpy(content: Any) -> Any:
    """The same nested dictionaries with arrays in the place of tensors."""
    if isinstance(content, Mapping):
        return {name: _numpy(value) for name, value in content.items()}
    if not hasattr(content, "detach"):
        return content
    tensor = content.detach().contiguous()
    if str(tensor.dtype) == "torch.bfloat16":  # numpy has no such type of its own
        import torch

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
