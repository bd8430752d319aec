"""The joint loss of a network, written without the package's objectives and gradients."""

import jax
import jax.numpy as jnp
import optax


def summed_loss(params, batch_stats, network, images, labels):
    """(sum of the exits' mean cross-entropies, (new statistics, each exit's)), in training mode."""
    outputs, updates = network.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(0)},
    )
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        for logits in outputs.logits
    ]
    return sum(losses), (updates.get("batch_stats", {}), jnp.stack(losses))
