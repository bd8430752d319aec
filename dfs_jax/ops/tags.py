"""Names on layers, by which `models/cost.py` counts them in a traced computation.

A tagged function is one equation `layer:<tag>` of the jaxpr, whose operands show the shapes;
the cost of a layer is read from those, so a faster implementation inside never changes it.
The tags and what their operands are:

    conv[:L]  (x (B, H, W, C), kernel (h, w, C / groups, O)) -> (B, H', W', O)
    dense[:L] (x (..., C), kernel (C, O)[, bias (O,)]) -> (..., O)
    relu      (x,) -> same shape
    pool:N    (x (B, H, W, C),) -> (B, H', W', C), each output over a window of N inputs

L is the number of input channels that get a gradient; without it all of them do.

The compiler inlines the call: a tag costs nothing at run time.
"""

from collections.abc import Callable

import jax

PREFIX = "layer:"


def tagged(tag: str, fun: Callable) -> Callable:
    """`fun(*arrays)`, traced as one equation named by `tag`.

    Make it once (at module level, or in a cached factory when something static is bound), so
    that JAX finds its earlier traces and compilations again.
    """

    def call(*arrays):
        return fun(*arrays)

    call.__name__ = call.__qualname__ = PREFIX + tag
    return jax.jit(call)
