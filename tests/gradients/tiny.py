"""A network of dense layers that compiles in a moment, and problems made with it."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dfs_jax.gradients import Problem
from dfs_jax.models.layers import BatchNorm, Dense, plain
from dfs_jax.models.multi_exit import MultiExit
from dfs_jax.objectives import Objective
from dfs_jax.surgery import Surgery

QUICK = {"xla_backend_optimization_level": 0}


class Tiny(MultiExit):
    """One dense layer a segment, and a second feature that crosses every boundary uncut.

    `side=False` leaves that out, so that all passes through the cut feature.
    """

    widths: Sequence[int] = (6, 6, 6)
    side: bool = True

    def setup(self):
        self.mains = [Dense(width, dtype=self.dtype) for width in self.widths]
        self.norms = [BatchNorm(dtype=self.dtype) for _ in self.widths]
        count = len(self.widths) if self.side else 0
        self.sides = [Dense(3, dtype=self.dtype) for _ in range(count)]
        self.joins = [Dense(width, dtype=self.dtype) for width in self.widths[:count]]
        self.drops = [nn.Dropout(self.dropout_rate) for _ in self.widths]
        self.heads = [Dense(self.num_classes, dtype=self.dtype) for _ in self.widths]

    @property
    def num_exits(self) -> int:
        return len(self.widths)

    @property
    def smallest_image(self) -> int:
        return 1

    def segment(self, i: int, *features: Any, train: bool) -> tuple[Any, ...]:
        if i == 0:
            x = features[0].reshape(len(features[0]), -1)
            features = (x, x)
        y = self.mains[i](features[-1])
        if self.side:
            y = y + self.joins[i](features[0])
        y = self.norms[i](jnp.tanh(y), train=train)
        return (jnp.tanh(self.sides[i](features[0])), y) if self.side else (y,)

    def head(self, i: int, exit_input: Any, *, train: bool) -> tuple[jax.Array, jax.Array]:
        kept = jax.tree.map(lambda x: self.drops[i](x, deterministic=not train), exit_input)
        return self.heads[i](kept), plain(exit_input)


def network(surgery=Surgery(partition=False), **options):  # noqa: B008, a frozen dataclass
    return Tiny(num_classes=3, surgery=surgery, **options)


def problem(net, objective=Objective(), *, size=12, seed=0):  # noqa: B008
    """Parameters and a problem whose running statistics have moved already."""
    rng = np.random.default_rng(seed)
    wide = jnp.promote_types(jnp.float32, net.dtype)
    labels = rng.integers(0, 3, size)
    images = rng.normal(size=(size, 2, 2, 1)) + labels[:, None, None, None]
    batch = {"image": jnp.asarray(images, wide), "label": jnp.asarray(labels)}
    variables = jax.jit(net.init, compiler_options=QUICK)(jax.random.key(seed), batch["image"])
    stats = jax.tree.map(lambda x: x + 0.5, variables.get("batch_stats", {}))
    return variables["params"], Problem(net, objective, batch, stats, jax.random.key(seed + 1))


def jitted(function):
    """`function` compiled with little effort: the tests run it a few times only."""
    return jax.jit(function, compiler_options=QUICK)


def train(method, params, start: Problem, steps: int, rate: float = 0.1):
    """Plain gradient descent; the losses of every step, the last parameters, times compiled."""

    @jitted
    def step(params, stats, state, key):
        here = Problem(start.network, start.objective, start.batch, stats, start.rng)
        update, aux, state = method.apply(here, params, state, key)
        descend = 1 if update.descend is None else update.descend
        params = jax.tree.map(
            lambda w, g: w - rate * descend * g, update.start(params), update.gradients
        )
        return params, aux.batch_stats, state, aux.losses

    stats, state, losses = start.batch_stats, method.init(params), []
    for k in range(steps):
        params, stats, state, now = step(params, stats, state, jax.random.key(k))
        losses.append(np.asarray(now))
    return np.array(losses), params, step._cache_size()


def flat(tree) -> dict[str, np.ndarray]:
    """Leaves by their path, "heads_0/kernel"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): np.asarray(leaf) for path, leaf in leaves}


def segment_of(name: str) -> int:
    """Segment or exit, from 0, that a tensor of `Tiny` belongs to."""
    return int(name.split("/")[0].split("_")[1])


def assert_close(found, want, rtol=1e-9, atol=1e-12):
    found, want = flat(found), flat(want)
    assert found.keys() == want.keys()
    for name in found:
        np.testing.assert_allclose(found[name], want[name], rtol=rtol, atol=atol, err_msg=name)
