"""Time of a joint training step against the same network in plain JAX, interleaved in one process.

    python -m tests.speed.against_plain --network vgg7_cifar100 --batch 128 --pairs 10

A step is forward, backward and SGD with momentum. Printed are the medians, the median of the
pairs' ratios and its quartiles. Methods are compared by `dfs_jax.benchmark`.
"""

import argparse
import contextlib
import sys
import time

import jax
import jax.numpy as jnp
import optax

from dfs_jax import allocator, compiler, step_cost
from dfs_jax.models import create_model
from dfs_jax.surgery import Surgery
from tests import plain_networks
from tests.summed_loss import summed_loss


def train_step(network, optimizer):
    """Update (params, batch_stats, opt_state), images, labels -> (the same, loss); donates them."""

    def step(state, images, labels):
        params, batch_stats, opt_state = state
        gradient = jax.value_and_grad(summed_loss, has_aux=True)
        (loss, (batch_stats, _)), grads = gradient(params, batch_stats, network, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), batch_stats, opt_state), loss

    return jax.jit(step, donate_argnums=0)


def program(arguments, plain: bool):
    """A call for `step_cost.time_pairs`: one compiled step on random images."""
    side = arguments.image_size
    surgery = Surgery(partition=False)
    network = create_model(arguments.network, num_classes=100, surgery=surgery)
    optimizer = optax.sgd(0.01, momentum=0.9)
    images = jax.random.normal(jax.random.key(1), (arguments.batch, side, side, 3))
    labels = jnp.arange(arguments.batch) % 100
    with plain_networks.plain() if plain else contextlib.nullcontext():
        variables = jax.jit(network.init)(jax.random.key(0), images[:1])
        params = variables["params"]
        state = params, variables.get("batch_stats", {}), optimizer.init(params)
        began = time.perf_counter()
        options = None if plain else compiler.options()
        lowered = train_step(network, optimizer).lower(state, images, labels)
        compiled = lowered.compile(compiler_options=options)
    print(f"compiled in {time.perf_counter() - began:.1f} s", flush=True)

    def call() -> int:
        nonlocal state
        state, loss = compiled(state, images, labels)
        jax.block_until_ready((state, loss))
        return 1

    return call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="vgg7_cifar100")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=10)
    arguments = parser.parse_args()
    allocator.keep_freed_memory()
    calls = {name: program(arguments, plain=name == "plain") for name in ("plain", "ours")}
    times = step_cost.time_pairs({"step": calls}, "plain", arguments.pairs)["step"]
    low, middle, high = step_cost.Spread.of(times["ours"].ratios)
    print(
        f"{arguments.network}, batch {arguments.batch}, side {arguments.image_size}: "
        f"plain {1e3 * times['plain'].median:.0f} ms, ours {1e3 * times['ours'].median:.0f} ms, "
        f"ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f}, {arguments.pairs} pairs)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
