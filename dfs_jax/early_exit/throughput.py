"""How much time early exit saves, against always computing the last exit; own command.

    python -m dfs_jax.early_exit.throughput --config configs/cifar100.py:msdnet
        [--batch-size 256] [--batches 6] [--repeats 5] [--config.a.b=value]

The network has random weights, and who leaves where is prescribed: a share proportional to q^k
at exit k, as in the budgeted evaluation, for several q. Three numbers per q:

    promised   if an image cost no more than the segments and exits that it passes, each of
               which is timed alone with a full batch
    batch      measured, one batch after the other
    refill     measured, all batches waiting in the router's queues together

The reference of all three is one compiled program of the whole network without the earlier exits.
Every round measures everything in turn, so that whatever else the machine does meets all alike;
reported are medians over rounds.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dfs_jax.early_exit import router, stages
from dfs_jax.early_exit.budget import ALWAYS, Thresholds
from dfs_jax.early_exit.router import Router
from dfs_jax.early_exit.stages import Stage
from dfs_jax.profiling.timing import timed
from dfs_jax.writing.tables import format_table

RATIOS = (0.25, 0.5, 1.0, 2.0)
_HALFWAY = 0.5  # prescribed confidences are 0 and 1


class Round(NamedTuple):
    """Seconds per batch of one round. N exits, R ratios."""

    segments: np.ndarray  # (N,)
    heads: np.ndarray  # (N,)
    full: float  # the whole network with the last exit alone
    batch: np.ndarray  # (R,) router, one batch after the other
    refill: np.ndarray  # (R,) router, all batches together


class Speedup(NamedTuple):
    """How much faster than always the last exit, at one ratio; medians over rounds."""

    ratio: float
    leaving: tuple[float, ...]  # share of the images that leaves at each exit
    promised: float
    batch: float
    refill: float
    batch_share: float  # of what is promised
    refill_share: float


def measure(
    parts: Sequence[Stage],
    image_shape: tuple[int, int, int],
    *,
    batch_size: int,
    batches: int,
    repeats: int,
    ratios: Sequence[float] = RATIOS,
) -> list[Speedup]:
    """The speed-up of the router over stages `parts`, at each of `ratios`."""
    routed = Router(parts, image_shape, sizes=router.batch_sizes(batch_size))
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch_size, *image_shape)).astype(np.float32)
    exits = [_prescribed(rng, batch_size * batches, len(parts), ratio) for ratio in ratios]
    alone = _Alone(parts, images)
    rounds = [_round(routed, alone, images, exits, batches) for _ in range(repeats + 1)]
    return [_speedup(ratio, exits[r], r, rounds[1:], len(parts)) for r, ratio in enumerate(ratios)]


def table(speedups: Sequence[Speedup]) -> str:
    """The speed-ups as aligned lines."""
    rows = [
        (
            f"{s.ratio:g}",
            " ".join(f"{share:.0%}" for share in s.leaving),
            f"{s.promised:.2f}",
            f"{s.batch:.2f}",
            f"{s.batch_share:.0%}",
            f"{s.refill:.2f}",
            f"{s.refill_share:.0%}",
        )
        for s in speedups
    ]
    headers = ("q", "leaving", "promised", "batch", "of promise", "refill", "of promise")
    return format_table(rows, headers)


class _Alone:
    """Segments, exits and the whole network as compiled programs of their own, with inputs."""

    def __init__(self, parts: Sequence[Stage], images: np.ndarray):
        self.segments: list[Callable[[], Any]] = []
        self.heads: list[Callable[[], Any]] = []
        carry = (jax.device_put(images),)
        weights = [stage.weights for stage in parts]
        everything = jax.jit(functools.partial(_last_logits, parts))
        self.full = functools.partial(everything, weights, carry)
        for stage in parts:
            segment, head = jax.jit(stage.segment.call), jax.jit(stage.head.call)
            results = segment(stage.segment.weights, carry)
            exit_input = results[stage.carried :]
            self.segments.append(functools.partial(segment, stage.segment.weights, carry))
            self.heads.append(functools.partial(head, stage.head.weights, exit_input))
            carry = stage.onwards(results, head(stage.head.weights, exit_input))


def _last_logits(parts: Sequence[Stage], weights: Any, carry: Any) -> jax.Array:
    logits = None
    for stage, own in zip(parts, weights, strict=True):
        carry, logits = stage.run(own, carry)  # earlier logits that nobody uses are not computed
    return logits


def _round(
    routed: Router, alone: _Alone, images: np.ndarray, exits: Sequence[np.ndarray], batches: int
) -> Round:
    batch, refill = [], []
    for prescribed in exits:
        requests = np.split(prescribed, batches, axis=1)
        batch.append(timed(lambda r=requests: [_ask(routed, images, [c]) for c in r])[1])
        refill.append(timed(lambda r=requests: _ask(routed, images, r))[1])
    return Round(
        np.array([timed(segment)[1] for segment in alone.segments]),
        np.array([timed(head)[1] for head in alone.heads]),
        timed(alone.full)[1],
        np.array(batch) / batches,
        np.array(refill) / batches,
    )


def _ask(routed: Router, images: np.ndarray, requests: Sequence[np.ndarray]) -> None:
    """Answers to `images` once for each of the prescribed confidences (N, B), together."""
    thresholds = Thresholds(
        routed.confidence, (_HALFWAY,) * (routed.num_exits - 1) + (ALWAYS,), fitted_for="timing"
    )
    tickets = []
    for confidences in requests:
        tickets.append(routed.submit(images, thresholds, confidences=confidences))
        while routed.step():
            pass
    while routed.step(drain=True):
        pass
    for ticket in tickets:
        routed.collect(ticket)


def _prescribed(rng: np.random.Generator, size: int, num_exits: int, ratio: float) -> np.ndarray:
    """Confidences (N, size) by which a share proportional to ratio^k leaves at exit k."""
    bounds = np.cumsum(ratio ** np.arange(num_exits))
    exits = np.searchsorted(bounds / bounds[-1], (np.arange(size) + 0.5) / size)
    return (np.arange(num_exits)[:, None] >= rng.permutation(exits)).astype(np.float64)


def _speedup(
    ratio: float, prescribed: np.ndarray, r: int, rounds: Sequence[Round], num_exits: int
) -> Speedup:
    leaving = np.bincount(np.argmax(prescribed, axis=0), minlength=num_exits) / len(prescribed[0])
    reaching = 1 - np.cumsum(leaving) + leaving
    promised = np.array([m.full / (reaching @ (m.segments + m.heads)) for m in rounds])
    batch = np.array([m.full / m.batch[r] for m in rounds])
    refill = np.array([m.full / m.refill[r] for m in rounds])
    medians = map(np.median, (promised, batch, refill, batch / promised, refill / promised))
    return Speedup(ratio, tuple(leaving), *map(float, medians))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command with arguments `argv`."""
    from dfs_jax.config import command

    parser = command.parser(__doc__)
    command.add_config(parser)
    parser.add_argument("--batch-size", type=int, default=256, metavar="B")
    parser.add_argument("--batches", type=int, default=6, metavar="N", help="of one measurement")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds")
    return command.run(parser, argv, _run)


def _run(arguments: argparse.Namespace, config: Any) -> None:
    from dfs_jax import data
    from dfs_jax.config import ConfigError
    from dfs_jax.training.run import create_network

    for flag in ("batch_size", "batches", "repeats"):
        if getattr(arguments, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} must be at least 1")
    image_shape, classes = data.known_images(config)
    if classes is None:
        raise ConfigError(
            f"the images of data set {config.data.name!r} are not known here; "
            f"known: {', '.join(data.KNOWN)}"
        )
    network = create_network(config, classes)
    images = np.zeros((1, *image_shape), np.float32)
    variables = jax.jit(network.init)(jax.random.key(config.seed), images)
    parts = stages.from_network(network, variables, images)
    speedups = measure(
        parts,
        image_shape,
        batch_size=arguments.batch_size,
        batches=arguments.batches,
        repeats=arguments.repeats,
    )
    device = jax.devices()[0].device_kind
    print(
        f"{config.model.name} on {device}, batch size {arguments.batch_size}, {arguments.repeats} "
        f"rounds of {arguments.batches} batches; speed-up over always the last exit"
    )
    print(table(speedups))


if __name__ == "__main__":
    sys.exit(main())
