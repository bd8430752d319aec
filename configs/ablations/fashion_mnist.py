"""When does Deep Feature Surgery win? Real photographs, paired seeds, every method.

    apt-get install dataset-fashion-mnist
    python -m dfs_jax.ablate --config configs/ablations/fashion_mnist.py --workdir runs/fashion \\
        --shard 1/2 & \\
    python -m dfs_jax.ablate --config configs/ablations/fashion_mnist.py --workdir runs/fashion \\
        --shard 2/2

The list of runs was committed before the first of them began, and none is dropped. Three seeds
each; one process a core, some 36 hours of one. `short` is the recipe of
`configs/fashion_mnist.py`, 2,400 steps; `long` has 8,000. A cycle of Meta-GF takes N + 1 steps for
the work of one: it has seven times the steps.
"""

from collections.abc import Mapping

from dfs_jax.config import presets
from dfs_jax.sweeps.grid import Grid

_SETTINGS = {
    "vgg7 short": ["preset=vgg7"],
    "msdnet short": ["preset=msdnet"],
    "vgg7 long": ["preset=vgg7", "train.steps=8000", "train.eval_every=1000"],
    "msdnet long": ["preset=msdnet", "train.steps=8000", "train.eval_every=1000"],
    "resnet18 short": ["preset=resnet18"],
    "resnet18 short, distilled": [
        "preset=resnet18",
        "model.options.adapters=True",
        "objective.logit_weight=0.3",
        "objective.feature_weight=0.03",
    ],
}
_OWN = {
    "meta_gf": ("gradients.options.phase_steps=10", "train.steps=16800", "train.eval_every=2800"),
}
_VARIANTS = {
    **{
        f"{word}, beta {beta}": [f"preset={word}", f"surgery.beta={beta}"]
        for word in ("dfs", "dfs_all")
        for beta in (0.25, 0.75)
    },
    **{f"dfs, from exit {i}": ["preset=dfs", f"surgery.first_exit={i}"] for i in (2, 3)},
    "dfs, beta grows": ["preset=dfs", "surgery.beta=(0.3,0.4,0.5,0.6,0.7)"],
}
_EVERYWHERE = ("joint", "dfs", "dfs_all", "ge")


def get_grid() -> Grid:
    """Methods are compared within a setting; the first has all of them."""
    words = {word: [f"preset={word}", *_OWN.get(word, ())] for word in presets.METHODS}
    ordered = {word: words[word] for word in (*_EVERYWHERE, *words)}

    def has(labels: Mapping[str, str]) -> bool:
        if labels["setting"].startswith("resnet18"):
            return labels["method"] in ("joint", "dfs")
        return labels["setting"] == "vgg7 short" or labels["method"] in _EVERYWHERE

    return Grid(
        base="../fashion_mnist.py",
        axes={"setting": _SETTINGS, "method": ordered | _VARIANTS, "seeds": range(3)},
        baseline={"method": "joint"},
        has=has,
    )
