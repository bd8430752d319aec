"""L2W-DEN (also WPN): a small network learns how much each example counts at each exit.

Learning to Weight Samples for Dynamic Early-Exiting Networks (ECCV 2022, arXiv 2209.08310). With
ℓ (B, N) the examples' losses and h an MLP of their N losses, tanh at its end,

    weights = 1 + ε (h(ℓ) - mean of h(ℓ) over the exits),     L = Σ_j mean_b weights_bj ℓ_bj

h learns what helps early exiting: after a virtual SGD step w' = w - η ∇L on one half of the
batch, the other half is handed out as a budget would, the quota ∝ q^k of most confident
examples to exit k = 1..N, the rest to the last, and each exit is scored on the mean loss of its
own examples. The halves then swap roles. h takes one Adam step for each, and the network its
ordinary step on the whole batch.

The official code updates the network after each half; its virtual step follows the schedule,
momentum and weight decay of the optimizer, where ours is plain with a fixed η (Adam does not see
the scale of its gradient). One exit is plain training. Cost about 5×; memory that of gradients of
gradients.
"""

import math

import jax
import jax.numpy as jnp
import optax

from dfs_jax.gradients.method import GradientMethod, Update, weighting_examples


def l2w_den(
    num_exits: int,
    *,
    epsilon: float = 0.8,
    quota: float = 0.75,
    hidden: int = 500,
    learning_rate: float = 1e-4,
    weight_decay: float = 1e-4,
    virtual_rate: float = 0.1,
) -> GradientMethod:
    """The gradient of the weighted losses; the state is h's parameters and Adam's moments.

    Args:
      num_exits: N.
      epsilon: ε in [0, 1), 0.8 for CIFAR-100 and 0.3 for ImageNet.
      quota: q, below 1 for more examples at early exits.
      hidden: width of h's hidden layer.
      learning_rate: of Adam, for h.
      weight_decay: of h, added to its gradient.
      virtual_rate: η.

    Raises:
      ValueError: for values out of range.
    """
    if not 0 <= epsilon < 1:
        raise ValueError(f"gradients.options.epsilon must lie in [0, 1), got {epsilon}")
    for name, value in (("quota", quota), ("virtual_rate", virtual_rate), ("hidden", hidden)):
        if not value > 0:
            raise ValueError(f"gradients.options.{name} must be positive, got {value}")
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"gradients.options.{name} must be 0 or more, got {value}")
    if num_exits * abs(math.log10(quota)) > 300:
        raise ValueError(
            f"gradients.options.quota, to the power of {num_exits} exits, must stay within 1e300 "
            f"and 1e-300, got {quota}"
        )
    adam = optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate))

    def init(params):
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
        mlp = initial_mlp(num_exits, hidden, dtype)
        return mlp, adam.init(mlp)

    def apply(problem, params, state, rng):

        def learn(state, batches):
            mlp, moments = state
            train, held_out = batches
            meta = jax.grad(meta_loss)(
                mlp, problem, params, train, held_out, epsilon, quota, virtual_rate
            )
            updates, moments = adam.update(meta, moments, mlp)
            return (optax.apply_updates(mlp, updates), moments), None

        # A loop over the two roles, which halves the time to compile.
        halves = _halves(problem.batch)
        roles = jax.tree.map(lambda a, b: jnp.stack([a, b]), halves, halves[::-1])
        (mlp, moments), _ = jax.lax.scan(learn, state, roles)

        def total(params):
            losses, aux = problem.forward(params)
            return weighted_loss(mlp, losses, epsilon), aux

        gradients, aux = jax.grad(total, has_aux=True)(params)
        return Update(gradients), aux, (mlp, moments)

    check = weighting_examples("l2w_den")
    return GradientMethod(init, apply, check, smallest_batch=2)


def initial_mlp(num_exits: int, hidden: int, dtype) -> dict[str, jax.Array]:
    """h's parameters, uniform in ±1/sqrt(inputs) as in the official code, always the same ones."""
    keys = jax.random.split(jax.random.key(0), 4)

    def draw(key, shape, inputs):
        bound = 1 / math.sqrt(inputs)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return {
        "hidden_kernel": draw(keys[0], (num_exits, hidden), num_exits),
        "hidden_bias": draw(keys[1], (hidden,), num_exits),
        "output_kernel": draw(keys[2], (hidden, num_exits), hidden),
        "output_bias": draw(keys[3], (num_exits,), hidden),
    }


def weighted_loss(mlp: dict[str, jax.Array], losses: jax.Array, epsilon: float) -> jax.Array:
    """L () of the losses (B, N); no gradient flows through h's input."""
    x = jax.lax.stop_gradient(losses)
    x = jax.nn.relu(x @ mlp["hidden_kernel"] + mlp["hidden_bias"])
    answer = jnp.tanh(x @ mlp["output_kernel"] + mlp["output_bias"])
    weights = 1 + epsilon * (answer - jnp.mean(answer, axis=1, keepdims=True))
    return jnp.sum(jnp.mean(weights * losses, axis=0))


def meta_loss(mlp, problem, params, train, held_out, epsilon, quota, rate) -> jax.Array:
    """Loss () of the batch `held_out` after the virtual step on the batch `train`."""

    def virtual(params):
        return weighted_loss(mlp, problem.example_losses(params, batch=train), epsilon)

    gradients = jax.grad(virtual)(params)
    moved = jax.tree.map(lambda w, g: w - rate * g, params, gradients)
    losses, aux = problem.forward(moved, batch=held_out)
    confidences = jnp.stack([jnp.max(jax.nn.softmax(z), axis=1) for z in aux.logits], axis=1)
    leaves = assigned(jax.lax.stop_gradient(confidences), quota)
    return jnp.sum(jnp.sum(leaves * losses, axis=0) / jnp.maximum(jnp.sum(leaves, axis=0), 1))


def assigned(confidences: jax.Array, quota: float) -> jax.Array:
    """Which exit each example leaves at, (B, N) bool, from the exits' confidences (B, N).

    Exit k of N takes the ⌊B p_k⌋ most confident of those that are left, p_k ∝ quota^k, and the
    last exit what remains.
    """
    size, count = confidences.shape
    total = sum(quota**k for k in range(1, count + 1))
    numbers = [math.floor(size * quota**k / total) for k in range(1, count)]
    here = jnp.ones(size, bool)
    columns = []
    for i, number in enumerate(numbers):
        ranked = jnp.argsort(jnp.where(here, -confidences[:, i], jnp.inf))
        taken = jnp.zeros(size, bool).at[ranked[:number]].set(True)
        columns.append(taken)
        here = here & ~taken
    return jnp.stack([*columns, here], axis=1)


def _halves(batch):
    """The batch's even and its odd examples, so that a device that holds a part halves that.

    An example left over takes no part in learning h.
    """
    half = len(batch["label"]) // 2
    if half == 0:
        raise ValueError("gradients l2w_den halves the batch, which has one example")
    return tuple({name: x[k : 2 * half : 2] for name, x in batch.items()} for k in (0, 1))
