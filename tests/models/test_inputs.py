"""What networks are given, by name: one array, or a dictionary from its cost to its training."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dfs_jax import config as configuration
from dfs_jax import gradients
from dfs_jax.data.pipeline import Data, Spec
from dfs_jax.distributed import placement
from dfs_jax.early_exit import stages
from dfs_jax.models import inputs
from dfs_jax.models.cost import exit_costs, minimal_training_multiply_adds
from dfs_jax.models.layers import Dense, plain
from dfs_jax.models.multi_exit import MultiExit
from dfs_jax.objectives import Objective
from dfs_jax.surgery import Surgery
from dfs_jax.training import optim
from dfs_jax.training.counts import batch_counter, count_split
from dfs_jax.training.run import Run
from dfs_jax.training.state import initial_state
from dfs_jax.training.step import make_conflict_probe, make_train_step

LENGTH, WORDS, WIDTH, CLASSES, BATCH = 5, 7, 8, 2, 16
SPEC = Spec(
    "sentences",
    {
        "ids": jax.ShapeDtypeStruct((LENGTH,), jnp.int32),
        "mask_of_words": jax.ShapeDtypeStruct((LENGTH,), jnp.float32),
    },
    CLASSES,
    ("few", "many"),
    1000,
    0,
    40,
)


class Sentences(MultiExit):
    """The mean of the words that count, two dense layers, an exit after each."""

    num_exits = 2

    def setup(self):
        self.words = nn.Embed(WORDS, WIDTH)
        self.layers = [Dense(WIDTH), Dense(WIDTH)]
        self.heads = [Dense(self.num_classes), Dense(self.num_classes)]

    def check_input(self, sentences):
        if set(sentences) != set(SPEC.inputs):
            raise ValueError(
                f"Sentences takes {', '.join(SPEC.inputs)}, got {', '.join(sentences)}"
            )

    def segment(self, i, x, *, train):
        if i == 0:
            weights = x["mask_of_words"][..., None]
            x = jnp.sum(self.words(x["ids"]) * weights, 1) / jnp.sum(weights, 1)
        return (jnp.tanh(self.layers[i](x)),)

    def head(self, i, exit_input, *, train):
        return self.heads[i](exit_input), plain(exit_input)


NETWORK = Sentences(num_classes=CLASSES, surgery=Surgery(beta=0.25))


def batches(count, sharding=None):
    """Sentences of class 1 have the last word among those that count."""
    for step in range(count):
        rng = np.random.default_rng(step)
        ids = rng.integers(0, WORDS, (BATCH, LENGTH)).astype(np.int32)
        counts = (np.arange(LENGTH) < rng.integers(1, LENGTH + 1, BATCH)[:, None]).astype("f4")
        labels = np.any((ids == WORDS - 1) & (counts > 0), axis=1).astype(np.int32)
        batch = {"ids": ids, "mask_of_words": counts, "label": labels}
        yield jax.device_put({**batch, "mask": np.ones(BATCH, bool)}, sharding)


def test_one_input_is_the_array_itself_and_several_are_a_dictionary():
    spec = Spec("pictures", inputs.images((4, 6, 3)), 10, (), 1, 2, 3)
    assert spec.batch(5) == jax.ShapeDtypeStruct((5, 4, 6, 3), jnp.float32)
    assert spec.side == 4
    assert str(spec) == "pictures: 1 training, 2 validation, 3 test images of 4x6x3, 10 classes"
    assert inputs.of_batch({"image": 1, "label": 2, "mask": 3}) == 1
    assert SPEC.batch(5) == {
        "ids": jax.ShapeDtypeStruct((5, LENGTH), jnp.int32),
        "mask_of_words": jax.ShapeDtypeStruct((5, LENGTH), jnp.float32),
    }
    assert SPEC.side == LENGTH
    assert inputs.of_batch({"ids": 1, "label": 2, "mask_of_words": 3}) == {
        "ids": 1,
        "mask_of_words": 3,
    }


def test_shapes_that_no_image_has_are_refused():
    for shape in ((32, 32), (0, 32, 3), (1, 32, 32, 3)):
        with pytest.raises(ValueError, match="shape of images"):
            inputs.images(shape)
    with pytest.raises(ValueError, match="at least 1"):
        inputs.abstract(inputs.images((8, 8, 1)), 0)


def test_the_cost_of_a_network_on_a_dictionary():
    costs = exit_costs(NETWORK, SPEC.batch(1), convention="multiply_adds")
    layer, head = WIDTH * WIDTH, WIDTH * CLASSES
    assert costs.segments == (layer, layer)
    assert costs.heads == (head, head)
    assert costs.parameters.segments == (WORDS * WIDTH + layer + WIDTH, layer + WIDTH)
    # Input gradients: all of the first layer, a quarter of the second, three of the first exit.
    least = 2 * (2 * layer + 2 * head) + layer * (1 + 1 / 4) + head * (3 / 4 + 1)
    assert minimal_training_multiply_adds(NETWORK, SPEC.batch(1)) == least
    with pytest.raises(ValueError, match="takes ids, mask_of_words, got ids"):
        exit_costs(NETWORK, {"ids": SPEC.batch(1)["ids"]})


def test_a_network_on_a_dictionary_trains_and_is_counted_and_cut_into_stages():
    c = configuration.default()
    c.optimizer.learning_rate, c.optimizer.schedule, c.optimizer.warmup_epochs = 0.3, "constant", 0
    c.train.batch_size, c.train.accumulation = BATCH, 2
    optimizer, schedule = optim.create_optimizer(c, steps_per_epoch=1, total_steps=1)
    mesh = placement.create_mesh(c)
    run = Run(
        config=c,
        data=Data(None, None, SimpleNamespace(batches=lambda over: batches(3, over)), SPEC),
        network=NETWORK,
        objective=Objective(),
        method=gradients.create("joint", num_exits=2),
        optimizer=optimizer,
        schedule=schedule,
        mesh=mesh,
        steps_per_epoch=1.0,
        total_steps=1,
    )
    state, step = initial_state(run), make_train_step(run)
    sharding = placement.batch(mesh)
    assert make_conflict_probe(run)(state, next(batches(1, sharding)))
    losses = []
    for batch in batches(40, sharding):
        state, measured = step(state, batch)
        losses.append(np.asarray(measured.losses))
    assert np.all(np.mean(losses[-5:], 0) < np.mean(losses[:5], 0))

    count = batch_counter(NETWORK, placement.replicated(mesh))
    counts = count_split(count, state.variables, run.data.test, sharding)
    assert int(counts.count) == 3 * BATCH

    given = inputs.of_batch(next(batches(1)))
    variables = jax.device_get(state.variables)
    expected, carry = NETWORK.apply(variables, given).logits, tuple(jax.tree.leaves(given))
    for stage, logits in zip(
        stages.from_network(NETWORK, variables, SPEC.batch(1)), expected, strict=True
    ):
        carry, found = stage.run(stage.weights, carry)
        np.testing.assert_allclose(found, logits, atol=1e-6)
