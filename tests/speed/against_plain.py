"""Time of a training step against the same network in plain JAX, interleaved in one process.

    python -m tests.speed.against_plain --network vgg7_cifar100 --batch 128 --pairs 10
    python -m tests.speed.against_plain --network vgg7_cifar100 --against joint --beta 0.5

A step is forward, backward and SGD with momentum; A and B take turns, compilation and two
warm-up steps are left out. Printed are the medians, the median of the pairs' ratios and its
quartiles.
"""

import argparse
import contextlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import optax

from dfs_jax.models import create_model
from dfs_jax.surgery import Surgery
from tests import plain_networks


def compiled_step(arguments, surgery: Surgery, plain: bool):
    """(compiled step, its first state, images, labels)."""
    side = arguments.image_size
    network = create_model(arguments.network, num_classes=100, surgery=surgery)
    optimizer = optax.sgd(0.01, momentum=0.9)
    images = jax.random.normal(jax.random.key(1), (arguments.batch, side, side, 3))
    labels = jnp.arange(arguments.batch) % 100
    with plain_networks.plain() if plain else contextlib.nullcontext():
        variables = jax.jit(network.init)(jax.random.key(0), images[:1])
        state = variables["params"], variables["batch_stats"]
        state = (*state, optimizer.init(state[0]))
        step = plain_networks.train_step(network, optimizer)
        began = time.perf_counter()
        compiled = step.lower(state, images, labels).compile()
        seconds = time.perf_counter() - began
    print(f"compiled in {seconds:.1f} s", flush=True)
    return compiled, state, images, labels


def interleaved(programs: list, pairs: int) -> list[list[float]]:
    """Seconds of each program in each of `pairs` rounds, the order reversed every other round."""
    states = [program[1] for program in programs]
    times: list[list[float]] = [[] for _ in programs]
    for round_ in range(pairs + 2):
        order = range(len(programs)) if round_ % 2 else reversed(range(len(programs)))
        for i in order:
            step, _, images, labels = programs[i]
            began = time.perf_counter()
            states[i], loss = step(states[i], images, labels)
            jax.block_until_ready((states[i], loss))
            if round_ >= 2:
                times[i].append(time.perf_counter() - began)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="vgg7_cifar100")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--beta", type=float, help="DFS with this beta; joint training without")
    parser.add_argument("--against", choices=("plain", "joint"), default="plain")
    arguments = parser.parse_args()
    joint = Surgery(partition=False)
    ours = joint if arguments.beta is None else Surgery(beta=arguments.beta)
    programs = [
        compiled_step(arguments, joint, plain=arguments.against == "plain"),
        compiled_step(arguments, ours, plain=False),
    ]
    theirs, own = interleaved(programs, arguments.pairs)
    ratios = [b / a for a, b in zip(theirs, own, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"{arguments.network}, batch {arguments.batch}, side {arguments.image_size}: "
        f"{arguments.against} {1e3 * statistics.median(theirs):.0f} ms, "
        f"ours {1e3 * statistics.median(own):.0f} ms, "
        f"ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f}, {len(ratios)} pairs)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
