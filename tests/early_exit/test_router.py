"""Batched early exit against the masked network: who leaves where, with which logits."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import image

from dfs_jax.early_exit import confidence as scores
from dfs_jax.early_exit import router as routing
from dfs_jax.early_exit import stages
from dfs_jax.early_exit.budget import ALWAYS, NEVER, Thresholds
from dfs_jax.early_exit.router import Router
from dfs_jax.models import create_model
from dfs_jax.surgery import Surgery

EXITS, CLASSES, IMAGE = 4, 5, (2, 2, 1)
SIZES = (1, 8, 64)
PROPERTY = settings(max_examples=25, deadline=None)

COMPILATIONS = collections.Counter()


def count_compilations(event, duration, **kwargs):
    del duration, kwargs
    COMPILATIONS[event.rsplit("/", 1)[-1]] += 1


jax.monitoring.register_event_duration_secs_listener(count_compilations)


def compilations() -> int:
    return COMPILATIONS["backend_compile_duration"]


class Integers:
    """A network in whole numbers, exact at any batch size; image value 50 + i: NaN at exit i."""

    def apply(self, variables, x, i, train, method):
        assert train is False
        return getattr(self, f"_{method}")(variables, x, i)

    def _advance(self, weights, x, i):
        if i == 0:
            first = x[:, 0, 0, 0].astype(jnp.int32)
            x = {"state": jnp.sum(x, (1, 2, 3)).astype(jnp.int32)[:, None], "first": first}
        state = (x["state"] * weights["factor"][i] + i + 1) % 1009
        exit_input = (state, x["first"])
        return (None if i == EXITS - 1 else {**x, "state": state}), exit_input

    def _classify(self, weights, exit_input, i):
        state, first = exit_input
        logits = (state * weights["classes"] % 4).astype(jnp.float32)
        return jnp.where((first == 50 + i)[:, None], jnp.nan, logits), logits


WEIGHTS = {"factor": np.array([3, 5, 7, 11], np.int32), "classes": np.array([1, 2, 3, 5, 6])}


def exact_logits(images: np.ndarray) -> np.ndarray:
    """(N, B, K) of `Integers`, in numpy and for one image after the other."""
    result = np.zeros((EXITS, len(images), CLASSES), np.float32)
    for b, pixels in enumerate(images):
        state = int(pixels.sum())
        for i in range(EXITS):
            state = (state * int(WEIGHTS["factor"][i]) + i + 1) % 1009
            result[i, b] = [state * int(c) % 4 for c in WEIGHTS["classes"]]
            if pixels[0, 0, 0] == 50 + i:
                result[i, b] = np.nan
    return result


def exact_patience(logits: np.ndarray) -> np.ndarray:
    """(N, B): how many exits in a row before this one gave its answer."""
    classes = np.where(np.isnan(logits).any(-1), 0, np.nan_to_num(logits).argmax(-1))
    counts = np.zeros(classes.shape)
    for i in range(1, EXITS):
        counts[i] = np.where(classes[i] == classes[i - 1], counts[i - 1] + 1, 0)
    return np.where(np.isnan(logits).any(-1), np.nan, counts)


def masked(logits, confidences, thresholds):
    """(logits (B, K), exits (B,)) of the first exit that is sure, by comparing one by one."""
    exits = []
    for b in range(logits.shape[1]):
        sure = [i for i in range(EXITS - 1) if confidences[i, b] >= thresholds[i]]
        exits.append(sure[0] if sure else EXITS - 1)
    return logits[exits, np.arange(len(exits))], np.array(exits, int)


def images_of(seed: int, count: int, *, some_nan: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 50, (count, *IMAGE)).astype(np.float32)
    if some_nan:
        chosen = rng.random(count) < 0.3
        images[chosen, 0, 0, 0] = 50 + rng.integers(0, EXITS, chosen.sum())
    return images


def setting(values, confidence="patience") -> Thresholds:
    return Thresholds(confidence, (*values, ALWAYS))


@pytest.fixture(scope="module")
def router() -> Router:
    router = Router(
        stages.from_network(Integers(), WEIGHTS, image(*IMAGE)),
        IMAGE,
        confidence="patience",
        sizes=SIZES,
    )
    router.warmup()
    return router


def assert_answers(answers, logits, exits):
    np.testing.assert_array_equal(answers.exits, exits)
    np.testing.assert_array_equal(answers.logits, logits)


patience = st.sampled_from([-1.0, 0.0, 1.0, 2.0, 3.0, NEVER])


@PROPERTY
@given(
    count=st.sampled_from([0, 1, 3, 64, 65, 256, 1000]),
    values=st.tuples(*[patience] * (EXITS - 1)),
    seed=st.integers(0, 99),
)
def test_a_batch_is_answered_as_by_the_masked_network(router, count, values, seed):
    """With ties throughout (confidences are small whole numbers) and NaN logits."""
    images = images_of(seed, count, some_nan=True)
    logits = exact_logits(images)
    confidences = exact_patience(logits)
    answers = router(images, setting(values))
    assert_answers(answers, *masked(logits, confidences, values))
    np.testing.assert_array_equal(answers.confidence, confidences[answers.exits, np.arange(count)])


@PROPERTY
@given(
    values=st.tuples(*[st.sampled_from([0.1, 0.5, 0.9, 2.0])] * (EXITS - 1)),
    confidences=st.lists(
        st.tuples(*[st.sampled_from([0.0, 0.1, 0.5, 0.9, np.nan, np.inf])] * EXITS), max_size=90
    ),
)
def test_injected_confidences_alone_decide(router, values, confidences):
    confidences = np.array(confidences).reshape(-1, EXITS).T
    images = images_of(0, confidences.shape[1])
    answers = router(images, setting(values), confidences=confidences)
    assert_answers(answers, *masked(exact_logits(images), confidences, values))


def test_a_confidence_that_is_nan_throughout_goes_to_the_deepest_exit(router):
    answers = router(images_of(0, 3), setting([-1e7] * 3), confidences=np.full((EXITS, 3), np.nan))
    assert answers.exits.tolist() == [EXITS - 1] * 3
    assert np.isnan(answers.confidence).all()


def test_thresholds_are_compared_in_double_precision(router):
    """As `budget.choose` does; 0.1 in float32 is more than 0.1."""
    confidences = np.full((EXITS, 1), 0.1)
    answers = router(
        images_of(0, 1), setting([float(np.float32(0.1))] * 3), confidences=confidences
    )
    assert answers.exits.tolist() == [EXITS - 1]


@PROPERTY
@given(
    counts=st.lists(st.integers(0, 150), max_size=8),
    values=st.lists(st.tuples(*[patience] * (EXITS - 1)), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    moves=st.lists(st.integers(0, 6), max_size=8),
)
def test_requests_share_batches_and_get_their_own_answers(router, counts, values, seed, moves):
    """Each with thresholds of its own, and with other steps in between."""
    requests = [images_of(seed + r, count, some_nan=True) for r, count in enumerate(counts)]
    tickets = []
    for r, images in enumerate(requests):
        tickets.append(router.submit(images, setting(values[r % len(values)])))
        for _ in range(moves[r % len(moves)] if moves else 0):
            router.step(drain=r % 2 == 0)
    while router.step(drain=True):
        pass
    for r, (ticket, images) in enumerate(zip(tickets, requests, strict=True)):
        assert router.is_done(ticket)
        logits = exact_logits(images)
        expected = masked(logits, exact_patience(logits), values[r % len(values)])
        assert_answers(router.collect(ticket), *expected)


def test_serving_answers_in_order_and_reads_no_further_than_it_must(router):
    read = []

    def requests():
        for r in range(12):
            read.append(r)
            yield images_of(r, 30)

    serving = router.serve(requests(), setting([1.0, 1.0, 1.0]))
    for r, answers in enumerate(serving):
        logits = exact_logits(images_of(r, 30))
        assert_answers(answers, *masked(logits, exact_patience(logits), [1.0, 1.0, 1.0]))
        # Deeper queues hold up a request until they have gathered a batch each.
        assert len(read) <= r + 1 + EXITS * -(-2 * SIZES[-1] // 30)
    assert r == 11


def test_sharing_batches_wastes_less(router, monkeypatch):
    """Rows that were computed, padding included, for requests that share batches and do not."""
    rows, compiled = [], router._compiled

    def counting(program, i, size):
        if program.__name__ == "_step_program":
            rows.append(size)
        return compiled(program, i, size)

    monkeypatch.setattr(router, "_compiled", counting)
    requests, values = [images_of(r, 50) for r in range(12)], setting([1.0, 1.0, 1.0])
    least = sum(int(np.sum(router(images, values).exits + 1)) for images in requests)
    alone = sum(rows)
    rows.clear()
    list(router.serve(requests, values))
    assert least <= sum(rows) < 1.1 * least
    assert alone > 1.25 * sum(rows)


def test_a_caller_may_stop_asking(router):
    serving = router.serve((images_of(r, 30) for r in range(9)), setting([1.0, 1.0, 1.0]))
    next(serving)
    serving.close()
    images = images_of(99, 70)
    logits = exact_logits(images)
    answers = router(images, setting([0.0, 1.0, 2.0]))
    assert_answers(answers, *masked(logits, exact_patience(logits), [0.0, 1.0, 2.0]))


def test_nothing_is_compiled_in_service(router):
    before = compilations()
    assert before > 0  # the counter sees what `warmup` compiled
    for count in (0, 1, 7, 8, 9, 63, 64, 65, 200):
        router(images_of(count, count), setting([0.0, 1.0, 2.0]))
    list(router.serve((images_of(r, 50) for r in range(5)), setting([1.0, 1.0, 1.0])))
    assert compilations() == before


def recording_stages(log):
    """The stages of `Integers`, which note (stage, batch size) whenever they are traced."""
    result = []
    for i, stage in enumerate(stages.from_network(Integers(), WEIGHTS, image(*IMAGE))):

        def call(weights, arguments, i=i, call=stage.segment.call):
            log.append((i, arguments[0].shape[0]))
            return call(weights, arguments)

        segment = stages.Program(call, stage.segment.weights, stage.segment.names)
        result.append(stages.Stage(segment, stage.head, stage.carried))
    return result


def test_only_what_is_needed_runs_in_the_smallest_batch_that_holds_it():
    """A program is compiled when it first runs, so what was compiled is what ran."""
    log = []
    sizes = (2, 16, 32, 64)
    router = Router(recording_stages(log), IMAGE, confidence="patience", sizes=sizes)
    confidences = np.zeros((EXITS, 64))
    confidences[0, :44] = confidences[1, 44:55] = 1  # 20 go on to stage 1, 9 to stage 2
    confidences[2] = 1
    router(images_of(0, 64), setting([0.5] * 3), confidences=confidences)
    ran = {entry for entry in log if entry[1] != sizes[0]}  # that size gives the shapes
    assert ran == {(0, 64), (1, 32), (2, 16)}


def test_a_failure_leaves_a_router_that_works(router, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    images, values = images_of(0, 100), [1.0, 1.0, 1.0]
    ticket = router.submit(images, setting(values))
    router.step(drain=True)
    with monkeypatch.context() as patch:
        patch.setattr(router, "_compiled", fail)
        with pytest.raises(KeyboardInterrupt):
            router.step(drain=True)
    with pytest.raises(KeyError):
        router.is_done(ticket)
    logits = exact_logits(images)
    expected = masked(logits, exact_patience(logits), values)
    assert_answers(router(images, setting(values)), *expected)


# A real network.


@pytest.fixture(scope="module")
def network():
    """A small MSDNet with random weights and statistics, images, and the logits of all exits."""
    model = create_model("msdnet_digits", num_classes=10, surgery=Surgery(), steps=(1, 1, 1))
    rng = np.random.default_rng(0)
    images = rng.standard_normal((21, 8, 8, 1)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)

    def drawn(leaf):
        fan_in = np.prod(leaf.shape[:-1])
        center, width = (0, 1 / np.sqrt(fan_in)) if len(leaf.shape) > 1 else (1, 0.3)
        return rng.normal(center, width, leaf.shape).clip(-3, 3).astype(leaf.dtype)

    variables = jax.tree.map(drawn, shapes)
    logits = np.stack(jax.jit(lambda v, x: model.apply(v, x).logits)(variables, images))
    return model, variables, images, logits


def test_a_network_is_answered_as_when_every_exit_is_computed(network):
    model, variables, images, logits = network
    classes = logits.argmax(-1)
    confidences = np.stack([scores.score("margin", jnp.asarray(z)) for z in logits])
    values = np.median(confidences[:-1], axis=1) + 2e-6  # off every confidence
    router = Router(
        stages.from_network(model, variables, image(8, 8, 1)),
        (8, 8, 1),
        confidence="margin",
        sizes=(8,),
    )
    answers = router(images, setting(values, "margin"))
    sure = np.vstack([confidences[:-1] >= values[:, None], np.ones(len(images), bool)])
    exits = sure.argmax(0)
    assert len(set(exits)) > 1
    np.testing.assert_array_equal(answers.exits, exits)
    np.testing.assert_allclose(answers.logits, logits[exits, np.arange(21)], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(answers.labels, classes[exits, np.arange(21)])


def test_a_stage_holds_only_the_weights_that_it_reads(network):
    model, variables, _, _ = network
    parts = stages.from_network(model, variables, image(8, 8, 1))
    names = [set(p.names) for s in parts for p in (s.segment, s.head)]
    assert sum(map(len, names)) == len(set.union(*names))  # none twice
    assert set.union(*names) == {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.flatten_with_path(variables)[0]
    }


# Decisions.


def test_batch_sizes():
    assert routing.batch_sizes(256) == (1, 2, 8, 32, 64, 96, 128, 160, 192, 224, 256)
    for largest in range(1, 300):
        sizes = routing.batch_sizes(largest)
        assert sizes[0] == 1
        assert sizes[-1] == largest
        assert len(sizes) <= 12
    with pytest.raises(ValueError, match="at least 1"):
        routing.batch_sizes(0)


def test_the_fitting_size_is_the_smallest_that_holds_them():
    assert [routing.fitting_size(n, (2, 8, 32)) for n in (1, 2, 3, 8, 9, 32, 33)] == [
        *(2, 2, 8, 8, 32, 32),
        32,
    ]


@pytest.mark.parametrize(
    ("waiting", "drain", "expected"),
    [
        ([9, 8, 8, 0], False, 2),  # the deepest full batch
        ([20, 7, 7, 7], False, 0),  # refill
        ([7, 7, 7, 7], False, None),  # wait for more
        ([7, 7, 7, 7], True, 0),  # no more will come: the shallowest
        ([0, 0, 3, 1], True, 2),
        ([0, 0, 0, 0], True, None),
    ],
)
def test_which_stage_runs_next(waiting, drain, expected):
    assert routing.next_stage(waiting, 8, drain=drain) == expected


# Bad input.


def test_what_does_not_fit_is_refused(router):
    images, good = images_of(0, 2), setting([1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"shape \(batch, 2, 2, 1\), got \(2, 3, 3, 1\)"):
        router(np.zeros((2, 3, 3, 1)), good)
    with pytest.raises(ValueError, match="4 exits, but there are thresholds for 2"):
        router(images, setting([1.0]))
    with pytest.raises(ValueError, match="'margin', but the router computes 'patience'"):
        router(images, setting([1.0, 1.0, 1.0], "margin"))
    with pytest.raises(ValueError, match=r"\(4, 2\), got \(4, 3\)"):
        router(images, good, confidences=np.zeros((4, 3)))
    with pytest.raises(ValueError, match="positive"):
        Router([], IMAGE, sizes=())
    with pytest.raises(ValueError, match="known: max_softmax"):
        Router([], IMAGE, confidence="none")
    assert not router.step(drain=True)  # nothing was left behind


def test_answers_are_collected_once_and_when_they_are_there(router):
    ticket = router.submit(images_of(0, 2), setting([1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="not done"):
        router.collect(ticket)
    while router.step(drain=True):
        pass
    router.collect(ticket)
    with pytest.raises(KeyError):
        router.collect(ticket)
