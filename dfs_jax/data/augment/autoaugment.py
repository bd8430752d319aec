"""Which image operations are applied: AutoAugment's policy for CIFAR-10, and RandAugment.

A policy becomes a table of operations (`image_ops.tabulate`) and a draw of rows from it, one
row for each operation in turn. What the operations do to the pixels is in `image_ops.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax.data.augment import image_ops

Action = tuple[str, float]  # an operation and its magnitude, sign included

# What sub-policies index: the magnitude at each of ten levels (arXiv 1805.09501, table 6).
_ENHANCE = np.linspace(0, 0.9, 10)
MAGNITUDES: dict[str, np.ndarray] = {
    "shearX": np.linspace(0, 0.3, 10),
    "shearY": np.linspace(0, 0.3, 10),
    "translateX": np.linspace(0, 150 / 331, 10),
    "translateY": np.linspace(0, 150 / 331, 10),
    "rotate": np.linspace(0, 30, 10),
    "color": _ENHANCE,
    "posterize": np.round(np.linspace(8, 4, 10)),
    "solarize": np.linspace(256, 0, 10),
    "contrast": _ENHANCE,
    "sharpness": _ENHANCE,
    "brightness": _ENHANCE,
    "autocontrast": np.zeros(10),
    "equalize": np.zeros(10),
    "invert": np.zeros(10),
}

# (probability, operation, level) twice, as published (arXiv 1805.09501, table 7) and as the
# usual PyTorch recipes have them.
POLICIES: dict[str, tuple[tuple[float, str, int, float, str, int], ...]] = {
    "cifar10": (
        (0.1, "invert", 7, 0.2, "contrast", 6),
        (0.7, "rotate", 2, 0.3, "translateX", 9),
        (0.8, "sharpness", 1, 0.9, "sharpness", 3),
        (0.5, "shearY", 8, 0.7, "translateY", 9),
        (0.5, "autocontrast", 8, 0.9, "equalize", 2),
        (0.2, "shearY", 7, 0.3, "posterize", 7),
        (0.4, "color", 3, 0.6, "brightness", 7),
        (0.3, "sharpness", 9, 0.7, "brightness", 9),
        (0.6, "equalize", 5, 0.5, "equalize", 1),
        (0.6, "contrast", 7, 0.6, "sharpness", 5),
        (0.7, "color", 7, 0.5, "translateX", 8),
        (0.3, "equalize", 7, 0.4, "autocontrast", 8),
        (0.4, "translateY", 3, 0.2, "sharpness", 6),
        (0.9, "brightness", 6, 0.2, "color", 8),
        (0.5, "solarize", 2, 0.0, "invert", 3),
        (0.2, "equalize", 0, 0.6, "autocontrast", 0),
        (0.2, "equalize", 8, 0.6, "equalize", 4),
        (0.9, "color", 9, 0.6, "equalize", 6),
        (0.8, "autocontrast", 4, 0.2, "solarize", 8),
        (0.1, "brightness", 3, 0.7, "color", 0),
        (0.4, "solarize", 5, 0.9, "autocontrast", 3),
        (0.9, "translateY", 9, 0.7, "translateY", 9),
        (0.9, "autocontrast", 2, 0.8, "solarize", 3),
        (0.8, "equalize", 8, 0.1, "invert", 3),
        (0.7, "translateY", 9, 0.9, "autocontrast", 1),
    ),
}

# Operations whose magnitude takes either sign. AutoAugment's rotation never does.
_ENHANCEMENTS = {"color", "contrast", "sharpness", "brightness"}
_MIRRORED = {"shearX", "shearY", "translateX", "translateY"} | _ENHANCEMENTS

# RandAugment's fourteen (arXiv 1909.13719, section 3): the identity in the place of invert.
_RANDAUGMENT = ("identity", *(name for name in MAGNITUDES if name != "invert"))
RANDAUGMENT_MAX = 10.0  # the magnitude at which operations are as strong as level 9 above


@functools.cache
def policy_actions(name: str) -> tuple[Action, ...]:
    """What policy `name` may do to an image, in the order that `draw_policy` numbers them.

    Action 0 is the identity. Then come, for each sub-policy, its first operation with positive
    and with negative magnitude, and its second one likewise; the two are the same where an
    operation has no sign.
    """
    actions: list[Action] = [("identity", 0.0)]
    for sub_policy in POLICIES[name]:
        for operation, level in (sub_policy[1:3], sub_policy[4:6]):
            actions += _signed(operation, float(MAGNITUDES[operation][level]), _MIRRORED)
    return tuple(actions)


def draw_policy(key: jax.Array, name: str) -> jax.Array:
    """Two actions (2,) int32 of `policy_actions(name)`, to be applied in this order.

    A sub-policy is chosen uniformly; each of its operations is applied with its own
    probability and a fair coin for its sign, independently.
    """
    policy = POLICIES[name]
    probabilities = jnp.array([(row[0], row[3]) for row in policy], jnp.float32)
    which, applied, negative = jax.random.split(key, 3)
    chosen = jax.random.randint(which, (), 0, len(policy), dtype=jnp.int32)
    applied = jax.random.uniform(applied, (2,), jnp.float32) < probabilities[chosen]
    negative = jax.random.randint(negative, (2,), 0, 2, dtype=jnp.int32)
    first = 1 + 4 * chosen + jnp.array([0, 2], jnp.int32)
    return jnp.where(applied, first + negative, 0)


def policy(image: jax.Array, rows: jax.Array, name: str) -> jax.Array:
    """`image` (H, W, 3) uint8 after actions `rows` (2,) of `policy_actions(name)`."""
    return _in_turn(policy_actions(name), rows, image)


@functools.cache
def randaugment_actions(magnitude: float) -> tuple[Action, ...]:
    """What RandAugment may do to an image at `magnitude`, in [0, RANDAUGMENT_MAX].

    Each of its fourteen operations with positive and then with negative magnitude; the two are
    the same where an operation has no sign.
    """
    share = magnitude / RANDAUGMENT_MAX
    actions: list[Action] = []
    for operation in _RANDAUGMENT:
        weakest, strongest = MAGNITUDES.get(operation, np.zeros(1))[[0, -1]]
        strength = float(weakest + share * (strongest - weakest))
        if operation == "posterize":
            strength = float(round(strength))
        actions += _signed(operation, strength, _MIRRORED | {"rotate"})
    return tuple(actions)


def draw_randaugment(key: jax.Array, layers: int) -> jax.Array:
    """`layers` actions (layers,) int32 of `randaugment_actions`, independent and uniform."""
    return jax.random.randint(key, (layers,), 0, 2 * len(_RANDAUGMENT), dtype=jnp.int32)


def randaugment(image: jax.Array, rows: jax.Array, magnitude: float) -> jax.Array:
    """`image` (H, W, 3) uint8 after actions `rows` of `randaugment_actions(magnitude)`."""
    return _in_turn(randaugment_actions(magnitude), rows, image)


def _signed(operation: str, magnitude: float, mirrored: set[str]) -> list[Action]:
    return [(operation, magnitude), (operation, -magnitude if operation in mirrored else magnitude)]


def _in_turn(actions: tuple[Action, ...], rows: jax.Array, image: jax.Array) -> jax.Array:
    table = _tabulated(actions, *image.shape[:2])

    def step(image: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        return image_ops.operate(table, row, image), None

    image, _ = jax.lax.scan(step, image, rows)
    return image


_tabulated = functools.cache(image_ops.tabulate)
