"""The networks of tests/golden rebuilt here: the same weights and inputs, and their gradients.

What is compared with what is in test_golden.py. The losses are written out here once more, from
their definition, and share no code with `dfs_jax.objectives`.
"""

import functools
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax.interop.torch import from_state_dict, to_state_dict
from dfs_jax.models import MultiExit, create_model
from dfs_jax.surgery import Surgery

GOLDEN = Path(__file__).parent / "golden"

# For a program that runs a few times: generating fast code takes far longer than slow code runs.
QUICK = {"xla_backend_optimization_level": 0}
# For one that runs dozens of times.
THOROUGH = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}

# The official name: ours, and whether the network has adapters.
NETWORKS = {
    "msdnet_cifar100": ("msdnet_cifar100", False),
    "msdnet_imagenet": ("msdnet_imagenet", False),
    "resnet18": ("resnet18_cifar100", True),
    "sdn_resnet18": ("resnet18_cifar100", False),
    "vgg7_64_cifar100_nodistill": ("vgg7_cifar100", False),
    "vgg7_64_cifar100_distill": ("vgg7_cifar100", True),
    "vgg16_64_imagenet_nodistill": ("vgg16_imagenet", False),
}
MODES = {
    "plain": {"partition": False},
    "partition": {"referencing": False},
    "fr_strict": {"exit_gradient": "own"},
    "fr_full": {"exit_gradient": "all"},
}


def read_json(name: str) -> Any:
    return json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))


@functools.cache
def state_dict_names() -> dict[str, list]:
    return read_json("state_dict_names")


def fill(name: str, shape: list[int], conv_gain: float) -> np.ndarray:
    """The value of one state-dict entry, drawn from its name."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if len(shape) == 4:
        value = rng.standard_normal(shape) * np.sqrt(conv_gain / np.prod(shape[1:]))
    elif len(shape) == 2:
        value = rng.standard_normal(shape) * np.sqrt(2 / shape[1])
    elif last in ("weight", "running_var"):
        value = rng.uniform(0.5, 1.5, shape)
    else:
        value = 0.1 * rng.standard_normal(shape)
    return value.astype(np.float32)


def inputs(seed: int, batch: int, side: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, side, side, 3) in float32, coarse blocks plus fine noise, and labels (B,)."""
    rng = np.random.Generator(np.random.PCG64(seed))
    fine = rng.standard_normal((batch, 3, side, side))
    coarse = rng.standard_normal((batch, 3, 4, 4))
    labels = rng.integers(0, classes, batch)
    images = fine + coarse.repeat(side // 4, 2).repeat(side // 4, 3)
    return images.astype(np.float32).transpose(0, 2, 3, 1), labels


def stats(x: np.ndarray) -> np.ndarray:
    """L2 norm, sum and first 4 values, NaN where there are fewer."""
    x = np.asarray(x, np.float64).ravel()
    first = np.pad(x[:4], (0, max(0, 4 - x.size)), constant_values=np.nan)
    return np.array([np.linalg.norm(x), x.sum(), *first])


def channels_first(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1) if np.ndim(x) == 4 else np.asarray(x)


class Gradients(NamedTuple):
    """One pass in training mode and the gradient of a loss, in PyTorch's names and layout."""

    loss: float
    exit_ce: np.ndarray  # (E,)
    logits: np.ndarray  # (E, B, classes)
    features: list[np.ndarray]
    buffers: dict[str, np.ndarray]  # running statistics afterwards
    gradients: dict[str, np.ndarray]
    input_gradient: np.ndarray  # (B, 3, H, W)


class Case:
    """One recorded network, `golden` what was recorded; computes in float64 unless told."""

    def __init__(self, name: str, dtype: Any = np.float64, options: dict[str, Any] = QUICK):
        model, mode, *_ = name.split("__")
        self.golden = dict(np.load(GOLDEN / "networks" / f"{name}.npz"))
        self.meta = json.loads(str(self.golden["meta"]))
        ours, adapters = NETWORKS[model]
        self.network: MultiExit = create_model(
            ours,
            num_classes=self.meta["num_classes"],
            # Plain networks record no ratio; the two kernels of a VGG layer are cut in half.
            surgery=Surgery(beta=self.meta["dns_ratio"] or 0.5, **MODES[mode]),
            dtype=jnp.dtype(dtype),
            dropout_rate=0.0,
            adapters=adapters,
        )
        entries = state_dict_names()[model]
        self.names = [n for n, *_ in entries if n.rsplit(".", 1)[-1] in ("weight", "bias")]
        self.buffer_names = [n for n, *_ in entries if ".running_" in n]
        values = {n: fill(n, shape, self.meta["conv_gain"]) for n, shape, _ in entries}
        self.state_dict = {n: v.astype(dtype) if v.ndim else v for n, v in values.items()}
        self.variables = from_state_dict(self.network, self.state_dict)
        images, self.labels = inputs(
            self.meta["input_seed"],
            self.meta["batch"],
            self.meta["height"],
            self.meta["num_classes"],
        )
        self.images = images.astype(dtype)
        self.num_exits = self.network.num_exits
        self._forward = jax.jit(self._losses_and_pullback, compiler_options=options)
        self._backward = jax.jit(lambda pullback, of: pullback(of), compiler_options=options)
        self._at_start: dict[str, Gradients] = {}

    def forward(self, train: bool) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Logits (E, B, classes), cross-entropies (E,) and features, with one compilation."""

        @functools.partial(jax.jit, compiler_options=QUICK)
        def run(variables, images):
            mutable = ["batch_stats"] if train else False
            out = self.network.apply(variables, images, train=train, mutable=mutable)
            out = out[0] if train else out
            return jnp.stack(out.logits), self._exit_ce(out.logits), out.features

        logits, ce, features = jax.device_get(run(self.variables, self.images))
        return logits, ce, [channels_first(f) for f in features]

    def at_start(self, loss: str = "ce") -> Gradients:
        """Gradient of a recorded loss at the recorded weights, computed once."""
        if loss not in self._at_start:
            self._at_start[loss] = self.gradients(loss=loss)
        return self._at_start[loss]

    def gradients(self, loss: str = "ce") -> Gradients:
        """Gradient of a recorded loss."""
        passed, statistics, pullback = self._pass(loss, self.variables["params"])
        return self._named(passed, statistics, self._backward(pullback, (1.0, self._no_exit())))

    def exit_gradients(self) -> Iterator[Gradients]:
        """Gradients of each exit's cross-entropy, after one forward pass."""
        passed, statistics, pullback = self._pass("ce", self.variables["params"])
        for i in range(self.num_exits):
            of_exit = self._no_exit().at[i].set(1.0)
            yield self._named(passed, statistics, self._backward(pullback, (0.0, of_exit)))

    def _no_exit(self) -> jax.Array:
        return jnp.zeros(self.num_exits, self.images.dtype)

    def _pass(self, loss: str, params: Any):
        settings = self.meta["losses"][loss]
        gamma = settings["loss_coefficient"] if settings["useKD"] else 0.0
        coefficient = settings["feature_loss_coefficient"] if settings["useFD"] else 0.0
        return self._forward(params, self.images, gamma, coefficient)

    def _named(self, passed, statistics, pulled_back) -> Gradients:
        (total, ce, out), statistics = jax.device_get((passed, statistics))
        gradients, input_gradient = jax.device_get(pulled_back)
        both = {"params": gradients, "batch_stats": statistics}
        entries = to_state_dict(self.network, both)
        return Gradients(
            float(total),
            ce,
            np.stack(out.logits),
            [channels_first(f) for f in out.features],
            {n: entries[n] for n in self.buffer_names},
            {n: entries[n] for n in self.names},
            channels_first(input_gradient),
        )

    def trajectory(self, loss: str, learning_rate: float):
        """Losses (6,), cross-entropies (6, E) and parameters over five updates of SGD.

        Momentum 0.9, weight decay on every parameter that PyTorch had a gradient for.
        """
        trained = {n: np.ones(v.shape, bool) for n, v in self.state_dict.items()}
        for name, none in zip(self.names, self.golden[f"train_{loss}_grad_none"], strict=True):
            trained[name][...] = not none
        trained = from_state_dict(self.network, trained)["params"]

        params, losses, exit_ce = self.variables["params"], [], []
        velocity = jax.tree.map(jnp.zeros_like, params)
        for step in range(6):
            (total, ce, _), _, pullback = self._pass(loss, params)
            losses.append(float(total))
            exit_ce.append(np.asarray(ce))
            if step < 5:
                gradients, _ = self._backward(pullback, (1.0, self._no_exit()))
                params, velocity = _sgd(params, velocity, gradients, trained, learning_rate)
        end = {"params": params, "batch_stats": self.variables["batch_stats"]}
        return np.array(losses), np.array(exit_ce), to_state_dict(self.network, end)

    def _exit_ce(self, logits) -> jax.Array:
        labels = jnp.asarray(self.labels)[:, None]
        chosen = [jnp.take_along_axis(jax.nn.log_softmax(z), labels, 1) for z in logits]
        return -jnp.stack([log_p.mean() for log_p in chosen])

    def _losses_and_pullback(self, params, images, gamma, coefficient):
        """What a pass gives, and from gradients of (loss, cross-entropies) those of its inputs.

        What differs between calls is an argument, so that each half is compiled once.
        """

        def losses(params, images):
            out, statistics = self.network.apply(
                {**self.variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            ce = self._exit_ce(out.logits)
            return (self._loss(ce, out, gamma, coefficient), ce), (out, statistics["batch_stats"])

        (total, ce), pullback, (out, statistics) = jax.vjp(losses, params, images, has_aux=True)
        return (total, ce, out), statistics, pullback

    def _loss(self, ce, out, gamma, coefficient):
        last = self.num_exits - 1
        teacher = jax.lax.stop_gradient(jax.nn.softmax(out.logits[-1] / 3.0))
        total = ce[last]
        for i in range(last):
            kd = -(teacher * jax.nn.log_softmax(out.logits[i] / 3.0)).sum(-1).mean()
            total += (1 - gamma) * ce[i] + gamma * kd
            if any(s["useFD"] for s in self.meta["losses"].values()):
                apart = out.features[i] - jax.lax.stop_gradient(out.features[last])
                total += coefficient * jnp.sqrt(jnp.sum(jnp.square(apart)))
        return total


@functools.partial(jax.jit, donate_argnums=1, compiler_options=QUICK)
def _sgd(params, velocity, gradients, trained, learning_rate):
    """One update: (parameters, velocities); what is not `trained` (bool) stays."""
    decayed = jax.tree.map(lambda g, p: g + 5e-4 * p, gradients, params)
    velocity = jax.tree.map(
        lambda v, d, on: jnp.where(on, 0.9 * v + d, 0), velocity, decayed, trained
    )
    return jax.tree.map(lambda p, v: p - learning_rate * v, params, velocity), velocity
