"""The network of `tiny.py` and its loss written out, in NumPy or in JAX, without the package.

Dropout is left out. `tests/gradients` compare gradient methods with formulas applied to this.
"""

import jax.numpy as jnp
import numpy as np


def depth(params) -> int:
    return sum(name.startswith("heads_") for name in params)


def logits(params, images, cross=lambda i, y: (y, y), xp=jnp):
    """Logits (B, K) of every exit for images (B, H, W, C), with the batch's own statistics.

    `cross(i, y)` makes of the cut feature (B, C) what the next segment and what exit i see.
    """

    def dense(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    def normalised(layer, x):
        mean = x.mean(0)
        deviation = xp.sqrt(((x - mean) ** 2).mean(0) + 1e-5)
        return (x - mean) / deviation * layer["scale"] + layer["bias"]

    count = depth(params)
    answers = []
    side = y = images.reshape(len(images), -1)
    for i in range(count):
        y = dense(params[f"mains_{i}"], y)
        if "sides_0" in params:
            y = y + dense(params[f"joins_{i}"], side)
            side = xp.tanh(dense(params[f"sides_{i}"], side))
        y = normalised(params[f"norms_{i}"], xp.tanh(y))
        y, seen = cross(i, y) if i < count - 1 else (y, y)
        answers.append(dense(params[f"heads_{i}"], seen))
    return answers


def example_losses(answers, labels, xp=jnp):
    """Cross-entropies (B, N) of every exit's logits."""
    columns = []
    for z in answers:
        columns.append(xp.log(xp.exp(z).sum(1)) - z[xp.arange(len(z)), labels])
    return xp.stack(columns, 1)


def losses(params, batch, xp=jnp):
    """Loss (N,) of every exit on the whole features."""
    return example_losses(logits(params, batch["image"], xp=xp), batch["label"], xp).mean(0)


def slopes(function, params: dict, step: float = 1e-5) -> dict:
    """Central differences of `function(params) -> ()` in every number of NumPy `params`."""
    found = {layer: {} for layer in params}
    for layer, tensors in params.items():
        for name, tensor in tensors.items():
            slope = np.zeros_like(tensor)
            for at in np.ndindex(tensor.shape):
                ends = []
                for sign in (1, -1):
                    moved = tensor.copy()
                    moved[at] += sign * step
                    changed = {**params, layer: {**tensors, name: moved}}
                    ends.append(function(changed))
                slope[at] = (ends[0] - ends[1]) / (2 * step)
            found[layer][name] = slope
    return found
