"""A small network with a bundle of it, for the tests of what is exported."""

import jax
import jax.numpy as jnp
import numpy as np
from shapes import image

from dfs_jax.early_exit import export, stages
from dfs_jax.early_exit.budget import ALWAYS, Thresholds
from dfs_jax.early_exit.preprocessing import Preprocessing

EXITS, CLASSES, IMAGE = 3, 4, (6, 5, 1)
SIZES = (1, 4)
THRESHOLDS = (
    Thresholds("max_softmax", (0.2, 0.2, ALWAYS), 100.0, 0.5, "all at the first exit"),
    Thresholds("max_softmax", (0.6, 0.5, ALWAYS), 180.0, 0.7, "some"),
    Thresholds("max_softmax", (1.1, 1.1, ALWAYS), 300.0, 0.8, "all at the last exit"),
)


class Dense:
    """Three dense layers, an exit after each; what it carries is a dictionary."""

    def apply(self, variables, x, i, train, method):
        assert train is False
        layer = variables["layers"][i]
        if method == "classify":
            logits = x @ layer["head"]
            return logits, logits
        before = x.reshape(len(x), -1) if i == 0 else x["hidden"]
        hidden = jnp.tanh(before @ layer["body"])
        return (None if i == EXITS - 1 else {"hidden": hidden, "unused": before}), hidden


def variables() -> dict:
    rng = np.random.default_rng(0)
    widths = (30, 8, 8)
    layers = [
        {
            "body": rng.normal(0, 0.5, (width, 8)).astype(np.float32),
            "head": rng.normal(0, 0.7, (8, CLASSES)).astype(np.float32),
        }
        for width in widths
    ]
    return {"layers": layers}


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *IMAGE), dtype=np.uint8)


def contents(**changes) -> export.Contents:
    fields = {
        "labels": ("bat", "cat", "cow", "dog"),
        "costs": (100, 200, 300),
        "preprocessing": Preprocessing(IMAGE, (0.4,), (0.3,)),
        "thresholds": THRESHOLDS[1],
        "family": THRESHOLDS,
        "about": {"network": "dense"},
    }
    return export.Contents(**{**fields, **changes})


def write(path, **changes) -> None:
    parts = stages.from_network(Dense(), variables(), image(*IMAGE))
    export.export(path, parts, contents(**changes), SIZES)


def logits(images: np.ndarray) -> np.ndarray:
    """(N, B, K) for normalised images, in numpy and double precision."""
    hidden, result = images.reshape(-1, 30).astype(np.float64), []
    for layer in variables()["layers"]:
        hidden = np.tanh(hidden @ layer["body"])
        result.append(hidden @ layer["head"])
    return np.stack(result)


def confidences(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return (exponentials / exponentials.sum(-1, keepdims=True)).max(-1)


def expected(images: np.ndarray, values) -> tuple[np.ndarray, np.ndarray]:
    """Logits (B, K) and exits (B,) for pixels, by thresholds far from every confidence."""
    z = logits((images / 255 - 0.4) / 0.3)
    sure = confidences(z) >= np.array(values)[:, None]
    assert np.all(np.abs(confidences(z) - np.array(values)[:, None]) > 1e-5)
    exits = sure.argmax(0)
    return z[exits, np.arange(len(images))], exits


def compiled_here() -> int:
    """Programs compiled in this process since this was first called."""
    global _count
    if _count is None:
        _count = 0
        jax.monitoring.register_event_duration_secs_listener(_listen)
    return _count


_count: int | None = None


def _listen(event, duration, **kwargs):
    global _count
    del duration, kwargs
    _count += event.endswith("backend_compile_duration")
