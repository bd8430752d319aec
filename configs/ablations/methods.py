"""Every method word on one recipe, two seeds each: the published CIFAR-100 table, and later ones.

    python -m dfs_jax.ablate --config configs/ablations/methods.py --workdir runs/methods

On the `clean` double digits, which need no download; the same axes with `base="../cifar100.py"` are
the published table's own setting, without the overrides (300 epochs a run: spread them with --shard
K/N).

A cycle of Meta-GF is a phase for each exit and one to fuse them: N + 1 of its steps do the work of
one, in the paper too. Here it has seven times 1,200 steps. L2W-DEN (`wpn`) has the ε of its paper's
ImageNet runs: with that of CIFAR-100, 0.8, the deep exits stay far behind (docs/results.md).
"""

from dfs_jax.config import presets
from dfs_jax.sweeps.grid import Grid

_OWN = {
    "meta_gf": ("gradients.options.phase_steps=10", "train.steps=8400", "train.eval_every=2100"),
    "wpn": ("gradients.options.epsilon=0.3",),
}


def get_grid() -> Grid:
    """One axis: the method words of `dfs_jax/presets.py`."""
    return Grid(
        base="../double_digits.py",
        axes={
            "method": {word: [f"preset={word}", *_OWN.get(word, ())] for word in presets.METHODS},
            "seeds": range(2),
        },
        baseline={"method": "joint"},
        overrides=(
            "train.steps=2400",
            "train.batch_size=64",
            "optimizer.learning_rate=0.05",
            "train.eval_every=600",
        ),
    )
