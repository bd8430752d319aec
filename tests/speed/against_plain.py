"""Time of a joint training step against the same network in plain JAX, interleaved.

    python -m tests.speed.against_plain --network vgg7_cifar100 --batch 128 --pairs 10

A step is forward, backward and SGD with momentum. Each version has a process of its own, as in
training, for what `ops/allocator.py` sets holds for a process; one runs while the others wait:

    plain       plain JAX: no formulation, compiler option or allocator setting of this library
    plain kept  the same, with the allocator's setting
    ours        what training runs

Printed are the medians, the median of the pairs' ratios and its quartiles. Methods are compared by
`dfs_jax.benchmark`.
"""

import argparse
import contextlib
import multiprocessing
import sys
import time

import jax
import jax.numpy as jnp
import optax

from dfs_jax.models import create_model
from dfs_jax.ops import allocator, compiler
from dfs_jax.profiling import timing
from dfs_jax.surgery import Surgery
from tests import plain_networks
from tests.summed_loss import summed_loss

VERSIONS = ("plain", "plain kept", "ours")


def train_step(network, optimizer):
    """Update (params, batch_stats, opt_state), images, labels -> (the same, loss); donates them."""

    def step(state, images, labels):
        params, batch_stats, opt_state = state
        gradient = jax.value_and_grad(summed_loss, has_aux=True)
        (loss, (batch_stats, _)), grads = gradient(params, batch_stats, network, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), batch_stats, opt_state), loss

    return jax.jit(step, donate_argnums=0)


def serve(version, arguments, asked):
    """Run a step of `version` on random images for everything that comes through `asked`."""
    if version != "plain":
        allocator.keep_freed_memory()
    side, plain = arguments.image_size, version != "ours"
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
    asked.send(time.perf_counter() - began)
    while asked.recv():
        state, loss = compiled(state, images, labels)
        jax.block_until_ready((state, loss))
        asked.send(1)


def start(version, arguments, stack):
    """A call for `step_cost.time_pairs`: a step of `version`, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(version, arguments, theirs), daemon=True)
    process.start()
    theirs.close()  # so that a process that dies is noticed
    print(f"{version}: compiled in {ours.recv():.1f} s", flush=True)
    stack.callback(ours.send, None)

    def call() -> int:
        ours.send(True)
        return ours.recv()

    return call


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="vgg7_cifar100")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=10)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        calls = {version: start(version, arguments, stack) for version in VERSIONS}
        times = timing.time_pairs({"step": calls}, "plain", arguments.pairs)["step"]
    print(f"{arguments.network}, batch {arguments.batch}, side {arguments.image_size}")
    print(f"plain: {1e3 * times['plain'].median:.0f} ms")
    for version in VERSIONS[1:]:
        low, middle, high = timing.Spread.of(times[version].ratios)
        print(
            f"{version}: {1e3 * times[version].median:.0f} ms, ratio to plain {middle:.3f} "
            f"(quartiles {low:.3f} to {high:.3f}, {arguments.pairs} pairs)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
