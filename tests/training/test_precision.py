"""Precision and memory: what changes how a step is computed, and what it must not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from summed_loss import summed_loss
from tiny_run import few_digits  # noqa: F401

from dfs_jax.distributed import placement
from dfs_jax.training.run import ConfigError, prepare
from dfs_jax.training.state import initial_state
from dfs_jax.training.step import make_train_step

PLAIN = ("model.options.dropout_rate=0.0",)


def run_of(*own, network=tiny_run.NETWORK):
    return prepare(tiny_run.config(*PLAIN, *own, network=network))


def steps(run, count):
    """State and measurements after each of `count` updates, on the host; the first is fresh."""
    state, step = initial_state(run), make_train_step(run)
    batches = run.data.train.batches(0, placement.batch(run.mesh))
    found = [(jax.device_get(state), None)]
    for _ in range(count):
        state, measured = step(state, next(batches))
        found.append(jax.device_get((state, measured)))
    return found


def exact_steps(run, count):
    """The state after `count` updates, of a step whose bits hang on nothing beside the update."""
    state, step = initial_state(run), make_train_step(run)
    batches = run.data.train.batches(0, placement.batch(run.mesh))
    for at in range(count):
        batch = next(batches)
        if at == 0:
            exact = {"xla_cpu_use_fusion_emitters": True}
            step = step.lower(state, batch).compile(compiler_options=exact)
        state, _ = step(state, batch)
    return jax.device_get(state)


def assert_close(found, want, atol):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


class TestAccumulation:
    """Microbatches one after the other."""

    def test_is_the_mean_of_the_gradients_with_statistics_that_follow_each_other(self):
        with jax.enable_x64(True):
            run = run_of("train.accumulation=4", "train.precision=float64")
            (fresh, _), (found, measured) = steps(run, 1)
            batch = next(run.data.train.batches(0, placement.batch(run.mesh)))
            loss_of = functools.partial(summed_loss, network=run.network)
            gradient = jax.jit(jax.grad(loss_of, has_aux=True))
            stats, total, losses = fresh.batch_stats, None, []
            for i in range(4):
                images, labels = (batch[name][i::4] for name in ("image", "label"))
                g, (stats, loss) = gradient(fresh.params, stats, images=images, labels=labels)
                total = g if total is None else jax.tree.map(jnp.add, total, g)
                losses.append(loss)
            mean = jax.tree.map(lambda g: g / 4, total)
            updates, _ = run.optimizer.update(mean, fresh.opt_state, fresh.params)
            # The learning rate is rounded to float32 in one place or the other.
            assert_close(found.params, optax.apply_updates(fresh.params, updates), 1e-9)
            assert_close(found.batch_stats, stats, 1e-12)
            assert_close(measured.losses, sum(losses) / 4, 1e-12)
            assert_close(measured.gradient_norm, optax.global_norm(mean), 1e-12)

    def test_counts_the_answers_of_the_whole_batch(self):
        whole, cut = (steps(run_of(f"train.accumulation={n}"), 1)[1][1] for n in (1, 2))
        assert whole.correct.shape == cut.correct.shape
        assert (cut.correct <= 16).all()

    @pytest.mark.slow
    def test_several_devices_train_as_one_does(self):
        settings = ("train.accumulation=2", "optimizer.learning_rate=0.001")
        one, many = (
            [measured.losses for _, measured in steps(run_of(*settings, mesh), 3)[1:]]
            for mesh in ("mesh.data=1", "mesh.data=4")
        )
        np.testing.assert_allclose(one, many, rtol=1e-5)

    @pytest.mark.parametrize(("count", "devices"), [(3, 1), (0, 1), (16, 2)])
    def test_refuses_unequal_microbatches(self, count, devices):
        with pytest.raises(ConfigError, match=f"train.accumulation = {count} does not"):
            run_of(f"train.accumulation={count}", f"mesh.data={devices}")


class TestAverages:
    """Averaged weights."""

    def test_are_those_of_numpy_and_are_what_is_evaluated(self):
        found = steps(run_of("train.ema=0.3"), 5)
        want = {"params": found[0][0].params, "batch_stats": found[0][0].batch_stats}
        for t, (state, _) in enumerate(found[1:]):
            decay = min(0.3, (1 + t) / (10 + t))
            newest = {"params": state.params, "batch_stats": state.batch_stats}
            want = jax.tree.map(lambda a, b, d=decay: d * a + (1 - d) * b, want, newest)
            assert_close(state.ema, want, 1e-6)
            assert state.variables is state.ema

    def test_without_them_the_newest_weights_are_evaluated(self):
        ((state, _),) = steps(run_of(), 0)
        assert state.ema is None
        assert state.variables == {"params": state.params, "batch_stats": state.batch_stats}

    def test_training_is_the_same_with_and_without(self):
        with_averages, without = (exact_steps(run_of(f"train.ema={d}"), 3) for d in (0.9, 0.0))
        assert_close(with_averages.params, without.params, 0)


class TestRematerialisation:
    """Segments computed again in the backward pass."""

    def measured(self, rematerialise):
        """Bytes kept from the forward pass for the backward pass, and one update."""
        run = run_of(f"train.rematerialise={rematerialise}", "train.precision=float64")
        (fresh, _), updated = steps(run, 1)
        batch = next(run.data.train.batches(0, placement.batch(run.mesh)))

        def loss(params):
            return summed_loss(
                params, fresh.batch_stats, run.network, batch["image"], batch["label"]
            )

        _, backward, _ = jax.eval_shape(lambda p: jax.vjp(loss, p, has_aux=True), fresh.params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward)), updated

    def test_gives_the_same_update_and_keeps_less(self):
        with jax.enable_x64(True):
            (kept, want), (less, found) = self.measured(False), self.measured(True)
        assert_close(found, want, 1e-12)
        assert less < 0.6 * kept


class TestBfloat16:
    """Computation in bfloat16."""

    def test_products_are_bfloat16_and_what_lasts_is_float32(self):
        run = run_of("train.precision=bfloat16")
        (fresh, _), (found, measured) = steps(run, 1)
        for leaf in jax.tree.leaves((found.params, found.batch_stats, found.opt_state)):
            assert leaf.dtype in (np.float32, np.int32)
        assert measured.losses.dtype == np.float32
        batch = next(run.data.train.batches(0, None))
        text = str(jax.make_jaxpr(make_train_step(run))(fresh, batch))
        kinds = ("conv_general_dilated[", "dot_general[")
        products = [line for line in text.splitlines() if any(kind in line for kind in kinds)]
        assert products
        assert all("bf16[" in line for line in products)

    def test_losses_are_those_of_float32_to_its_precision(self):
        runs = (run_of(f"train.precision={p}") for p in ("float32", "bfloat16"))
        exact, rough = (steps(run, 1)[1][1].losses for run in runs)
        np.testing.assert_allclose(rough, exact, rtol=0.02)
        assert (rough != exact).any()


class TestFsdp:
    """Parameters and optimizer state in parts."""

    WIDE = ("model.name=vgg7_cifar100", "model.options.widths=((16,),(16,))")

    def measured(self, mesh, optimizer):
        settings = (f"optimizer.name={optimizer}", "optimizer.learning_rate=0.001")
        run = run_of(*mesh, *settings, network=self.WIDE)
        state, step = initial_state(run), make_train_step(run)
        sizes = [placement.bytes_per_device(x) for x in (state.params, state.opt_state)]
        batches, losses = run.data.train.batches(0, placement.batch(run.mesh)), []
        for _ in range(5):
            state, measured = step(state, next(batches))
            losses.append(jax.device_get(measured.losses))
        assert sizes == [placement.bytes_per_device(x) for x in (state.params, state.opt_state)]
        return np.array(sizes), np.array(losses), jax.device_get(state.params)

    @pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=pytest.mark.slow), "adamw"])
    def test_two_devices_hold_half_each_and_train_alike(self, optimizer):
        whole, losses, params = self.measured(("mesh.data=2",), optimizer)
        half, found, spread = self.measured(("mesh.data=1", "mesh.fsdp=2"), optimizer)
        print(f"{optimizer}: parameters and state {whole} bytes a device, with fsdp=2 {half}")
        assert (half <= 0.51 * whole).all()
        np.testing.assert_allclose(found, losses, rtol=0, atol=1e-5)
        assert_close(spread, params, 1e-5)
