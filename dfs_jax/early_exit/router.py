"""Early exit that skips work: images in batches, each answered by the first exit that is sure.

Between two segments stands a queue. A batch of images runs through one segment and its exit;
those whose confidence reaches the threshold are answered, the others join the next queue. Every
batch is filled up to one of a few fixed sizes, whose programs are compiled beforehand, so that
nothing is compiled in service. Images of different requests, with thresholds of their own, share
batches.

The decisions are numpy functions at the top; `Router` does what they say on the device. Where
the stages come from is `stages`' and `bundle`'s matter, where thresholds come from `budget`'s.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax.early_exit import confidence as scores
from dfs_jax.early_exit.budget import Thresholds
from dfs_jax.early_exit.stages import Stage


def batch_sizes(largest: int) -> tuple[int, ...]:
    """A few sizes up to `largest` that waste little: its eighths, and below them each a quarter.

    Filled up to an eighth, a batch of which a share r goes on costs 1 / (16 r) more on average.
    """
    if largest < 1:
        raise ValueError(f"the largest batch size must be at least 1, got {largest}")
    sizes = {max(largest * k // 8, 1) for k in range(1, 9)}
    while min(sizes) > 1:
        sizes.add(max(min(sizes) // 4, 1))
    return tuple(sorted(sizes))


def fitting_size(count: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending `sizes` that holds `count`, or the largest of all."""
    return next((size for size in sizes if size >= count), sizes[-1])


def leaving(confidence: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Which images leave: (B,) bool, for confidences and thresholds (B,).

    Compared in float64, as `budget.choose` does; a NaN leaves nowhere.
    """
    return np.asarray(confidence, np.float64) >= np.asarray(thresholds, np.float64)


def next_stage(waiting: Sequence[int], largest: int, *, drain: bool) -> int | None:
    """The stage that runs next, for the number of images waiting before each; None: none should.

    The deepest stage with a full batch comes first: full batches are the cheapest, and no queue
    but the first can then grow beyond two batches. Without one, more images are awaited; if none
    will come (`drain`), the shallowest stage runs, so that what it sends on fills up the deeper
    batches.
    """
    full = [i for i, count in enumerate(waiting) if count >= largest]
    if full:
        return full[-1]
    return next((i for i, count in enumerate(waiting) if count), None) if drain else None


class Answers(NamedTuple):
    """What a request of B images gets, in the order in which it gave them."""

    logits: np.ndarray  # (B, K) of the exit that answered
    exits: np.ndarray  # (B,) int, from 0
    confidence: np.ndarray  # (B,) float64, of that exit

    @property
    def labels(self) -> np.ndarray:
        """Classes (B,)."""
        return np.argmax(self.logits, axis=-1)


@dataclasses.dataclass
class _Request:
    answers: Answers  # filled in as images leave
    missing: int


class _Leavers(NamedTuple):
    """Images of one batch that were answered there; their logits are still on the device."""

    logits: jax.Array
    rows: np.ndarray  # of the batch
    images: np.ndarray  # their records


class Router:
    """Answers images by the stages of a network, on JAX's default device.

    Holds its weights there, and between stages the queues: fewer than two batches of the largest
    size each. One thread at a time may use it.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        image_shape: tuple[int, int, int],
        *,
        confidence: str = "max_softmax",
        sizes: Sequence[int] = batch_sizes(64),
    ):
        """Nothing is compiled before `warmup` or the first image.

        Args:
          stages: shallow to deep.
          image_shape: (H, W, C).
          confidence: one of `confidence.names()`; thresholds must be of the same.
          sizes: of the batches, in images.
        """
        if confidence not in scores.names():
            raise ValueError(
                f"unknown confidence {confidence!r}; known: {', '.join(scores.names())}"
            )
        if not sizes or min(sizes) < 1:
            raise ValueError(f"batch sizes must be positive numbers, got {tuple(sizes)}")
        self.confidence = confidence
        self.sizes = tuple(sorted(set(sizes)))
        # A queue runs as soon as it holds a full batch, and gains at most one at a time.
        self._capacity = 2 * self.sizes[-1] - 1
        self.image_shape = tuple(image_shape)
        self._stages = tuple(stages)
        self.num_exits = len(self._stages)
        self._weights = [jax.device_put(stage.weights) for stage in self._stages]
        self._record = np.dtype(
            [
                ("request", np.int64),
                ("row", np.int64),
                ("thresholds", np.float64, (self.num_exits,)),
                ("injected", np.bool_),
                ("confidences", np.float64, (self.num_exits,)),
                ("slot", np.int32),
            ]
        )
        self._programs: dict[tuple[str, int, int], Any] = {}
        self._requests: dict[int, _Request] = {}
        self._tickets = 0
        self.reset()

    def warmup(self) -> None:
        """Compile every program; after this, nothing is compiled whatever is asked."""
        for size in self.sizes:
            for i in range(self.num_exits):
                self._compiled(self._step_program, i, size)
                if i + 1 < self.num_exits:
                    self._compiled(self._put_program, i, size)
        for i in range(1, self.num_exits):
            self._allocate(i)

    def reset(self) -> None:
        """Forget every request and everything that waits."""
        self._requests.clear()
        self._images: collections.deque[np.ndarray] = collections.deque()
        self._queues = [np.zeros(0, self._record) for _ in self._stages]
        self._pools: list[tuple[jax.Array, ...] | None] = [None] * self.num_exits
        self._free = [np.arange(self._capacity, dtype=np.int32) for _ in self._stages]
        self._leavers: list[_Leavers] = []

    # Whole requests.

    def __call__(
        self, images: Any, thresholds: Thresholds, *, confidences: np.ndarray | None = None
    ) -> Answers:
        """Answers to images (B, H, W, C), normalised float32; B may be 0 or any other number.

        `confidences` (N, B), of N exits, stand in for those of the network if given.
        """
        ticket = self.submit(images, thresholds, confidences=confidences)
        while not self.is_done(ticket):
            self.step(drain=True)
        return self.collect(ticket)

    def serve(self, requests: Iterable[Any], thresholds: Thresholds) -> Iterator[Answers]:
        """Answers to each of `requests`, images (B_r, H, W, C), in their order.

        Requests are read as long as no batch is full, and share batches: that is faster than
        one after the other, and an answer may come after later requests were read.
        """
        tickets: collections.deque[int] = collections.deque()
        try:
            for images in requests:
                tickets.append(self.submit(images, thresholds))
                while self.step():
                    pass
                while tickets and self.is_done(tickets[0]):
                    yield self.collect(tickets.popleft())
            while tickets:
                while not self.is_done(tickets[0]):
                    self.step(drain=True)
                yield self.collect(tickets.popleft())
        finally:
            for ticket in tickets:  # the caller stopped asking
                self._requests.pop(ticket, None)

    # Step by step.

    def submit(
        self, images: Any, thresholds: Thresholds, *, confidences: np.ndarray | None = None
    ) -> int:
        """Put images (B, H, W, C) in the first queue; the ticket to collect their answers by.

        Raises ValueError for images of another shape, and for thresholds of another number of
        exits or another confidence than the router's.
        """
        images = np.asarray(images, np.float32)
        self._check(images, thresholds, confidences)
        count, like = len(images), self._abstract[0][1]
        ticket, self._tickets = self._tickets, self._tickets + 1
        logits = np.zeros((count, like.shape[-1]), like.dtype)
        answers = Answers(logits, np.zeros(count, int), np.zeros(count))
        self._requests[ticket] = _Request(answers, count)
        records = np.zeros(count, self._record)
        records["request"], records["row"] = ticket, np.arange(count)
        records["thresholds"] = thresholds.values
        if confidences is not None:
            records["injected"], records["confidences"] = True, np.transpose(confidences)
        if count:
            self._images.append(images)
            self._queues[0] = np.concatenate([self._queues[0], records])
        return ticket

    def step(self, *, drain: bool = False) -> bool:
        """Run one batch through one stage; False if none was to be run (see `next_stage`)."""
        i = next_stage([len(q) for q in self._queues], self.sizes[-1], drain=drain)
        if i is None:
            return False
        try:
            self._run(i)
        except BaseException:
            self.reset()  # a queue may have been given away to the device for good
            raise
        return True

    def is_done(self, ticket: int) -> bool:
        """Whether all images of the request are answered; KeyError if it was collected."""
        return self._requests[ticket].missing == 0

    def collect(self, ticket: int) -> Answers:
        """The answers of a request that is done, once."""
        if not self.is_done(ticket):
            raise ValueError(f"request {ticket} is not done")
        for leavers in self._leavers:
            logits = np.asarray(leavers.logits)
            for request, at in _groups(leavers.images["request"]):
                if request in self._requests:
                    rows = leavers.images["row"][at]
                    self._requests[request].answers.logits[rows] = logits[leavers.rows[at]]
        self._leavers.clear()
        return self._requests.pop(ticket).answers

    # The device's side.

    def _run(self, i: int) -> None:
        batch = self._queues[i][: self.sizes[-1]]
        self._queues[i] = self._queues[i][len(batch) :]
        size = fitting_size(len(batch), self.sizes)
        step = self._compiled(self._step_program, i, size)
        if i == 0:
            source = jax.device_put(self._next_images(len(batch), size))
            carry, logits, confidence = step(self._weights[0], source)
        else:
            slots = np.full(size, batch["slot"][0])
            slots[: len(batch)] = batch["slot"]
            carry, logits, confidence = step(
                self._weights[i], self._pools[i], jax.device_put(slots)
            )
            self._free[i] = np.concatenate([self._free[i], batch["slot"]])
        # The one wait for the device: what follows depends on who leaves.
        computed = np.asarray(confidence)[: len(batch)]
        confidence = np.where(batch["injected"], batch["confidences"][:, i], computed)
        last = i == self.num_exits - 1
        gone = leaving(confidence, batch["thresholds"][:, i]) | last
        if not gone.all():
            self._send_on(i, size, carry, batch, ~gone)
        if gone.any():
            self._answer(i, logits, np.flatnonzero(gone), batch[gone], confidence[gone])

    def _send_on(self, i: int, size: int, carry: Any, batch: np.ndarray, stays: np.ndarray) -> None:
        self._allocate(i + 1)
        count = int(stays.sum())
        slots, self._free[i + 1] = np.split(self._free[i + 1], [count])
        destinations = np.full(size, self._capacity, np.int32)  # out of range: dropped
        destinations[np.flatnonzero(stays)] = slots
        put = self._compiled(self._put_program, i, size)
        self._pools[i + 1] = put(self._pools[i + 1], carry, jax.device_put(destinations))
        records = batch[stays]
        records["slot"] = slots
        self._queues[i + 1] = np.concatenate([self._queues[i + 1], records])

    def _answer(
        self,
        i: int,
        logits: jax.Array,
        rows: np.ndarray,
        records: np.ndarray,
        confidence: np.ndarray,
    ) -> None:
        logits.copy_to_host_async()
        self._leavers.append(_Leavers(logits, rows, records))
        for ticket, at in _groups(records["request"]):
            request = self._requests.get(ticket)
            if request is None:  # nobody waits for it any more
                continue
            request.answers.exits[records["row"][at]] = i
            request.answers.confidence[records["row"][at]] = confidence[at]
            request.missing -= len(at)

    def _next_images(self, count: int, size: int) -> np.ndarray:
        pieces, missing = [], size - count
        while count:
            images = self._images.popleft()
            pieces.append(images[:count])
            if len(images) > count:
                self._images.appendleft(images[count:])
            count -= len(pieces[-1])
        if missing:
            pieces.append(np.zeros((missing, *self.image_shape), np.float32))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    # Programs.

    def _allocate(self, i: int) -> None:
        if self._pools[i] is None:
            self._pools[i] = tuple(
                jax.device_put(np.zeros(leaf.shape, leaf.dtype))
                for leaf in self._carry(i, self._capacity)
            )

    def _carry(self, i: int, size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What stage i receives, for a batch of `size`."""
        if i == 0:
            return (jax.ShapeDtypeStruct((size, *self.image_shape), jnp.float32),)
        return tuple(
            jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype)
            for leaf in self._abstract[i - 1][0]
        )

    @functools.cached_property
    def _abstract(self) -> list[Any]:
        """Per stage what `_advance` returns, as shapes, for a batch of one of the sizes."""
        results: list[Any] = []
        carry = self._carry(0, self.sizes[0])
        for i, weights in enumerate(self._weights):
            results.append(jax.eval_shape(functools.partial(self._advance, i), weights, carry))
            carry = results[-1][0]
        return results

    def _advance(self, i: int, weights: Any, carry: Any) -> tuple[Any, jax.Array, jax.Array]:
        """(carry, logits (B, K), confidence (B,)) of stage i.

        Past the first stage the last array of a carry is the classes answered so far, (B, i).
        """
        *carry, answered = carry if i else (*carry, jnp.zeros((len(carry[0]), 0), jnp.int32))
        carry, logits = self._stages[i].run(weights, tuple(carry))
        confidence = scores.score(self.confidence, logits, list(answered.T))
        if i == self.num_exits - 1:
            return (), logits, confidence
        answer = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (*carry, jnp.column_stack([answered, answer])), logits, confidence

    def _compiled(self, program: Callable[[int, int], Any], i: int, size: int) -> Any:
        """`program` of stage i for batches of `size`, ready to run."""
        key = (program.__name__, i, size)
        if key not in self._programs:
            self._programs[key] = program(i, size).compile()
        return self._programs[key]

    def _step_program(self, i: int, size: int) -> Any:
        weights = jax.tree.map(jax.typeof, self._weights[i])
        if i == 0:
            step = functools.partial(self._advance, 0)
            return jax.jit(lambda weights, images: step(weights, (images,))).lower(
                weights, *self._carry(0, size)
            )

        def gathered(weights, pool, slots):
            return self._advance(i, weights, tuple(leaf[slots] for leaf in pool))

        slots = jax.ShapeDtypeStruct((size,), jnp.int32)
        return jax.jit(gathered).lower(weights, self._carry(i, self._capacity), slots)

    def _put_program(self, i: int, size: int) -> Any:
        def put(pool, carry, slots):
            return tuple(p.at[slots].set(c, mode="drop") for p, c in zip(pool, carry, strict=True))

        slots = jax.ShapeDtypeStruct((size,), jnp.int32)
        pool, carry = self._carry(i + 1, self._capacity), self._carry(i + 1, size)
        return jax.jit(put, donate_argnums=0).lower(pool, carry, slots)

    def _check(
        self, images: np.ndarray, thresholds: Thresholds, confidences: np.ndarray | None
    ) -> None:
        if images.shape[1:] != self.image_shape:
            wanted = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images must have shape (batch, {wanted}), got {images.shape}")
        if len(thresholds.values) != self.num_exits:
            raise ValueError(
                f"the network has {self.num_exits} exits, but there are thresholds for "
                f"{len(thresholds.values)}"
            )
        if thresholds.confidence != self.confidence:
            raise ValueError(
                f"the thresholds are for confidence {thresholds.confidence!r}, but the router "
                f"computes {self.confidence!r}"
            )
        if confidences is not None and np.shape(confidences) != (self.num_exits, len(images)):
            raise ValueError(
                f"confidences must have shape {(self.num_exits, len(images))}, "
                f"got {np.shape(confidences)}"
            )


def _groups(requests: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each number that occurs, with the places where it does."""
    for request in np.unique(requests):
        yield int(request), np.flatnonzero(requests == request)
