"""Does Deep Feature Surgery help an MSDNet on the handwritten digits, of all or of few examples?

    python -m dfs_jax.ablate --config configs/ablations/regions_digits.py --workdir runs/few_digits

Three seeds each. docs/results.md has what came of it.
"""

from dfs_jax.sweeps.grid import Grid


def get_grid() -> Grid:
    """The same test split for both settings; fewer examples are seen more often."""
    settings = {
        "1,197 examples": [],
        "237 examples": ["data.validation_size=1200", "train.epochs=300"],
    }
    methods = {word: [f"preset={word}"] for word in ("joint", "dfs", "dfs_all")}
    return Grid(
        base="../digits.py",
        axes={"setting": settings, "method": methods, "seeds": range(3)},
        baseline={"method": "joint"},
        overrides=("train.eval_every=1000", "train.checkpoint_every=1000"),
    )
