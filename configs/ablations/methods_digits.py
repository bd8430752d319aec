"""Every method on the handwritten digits: do they all train? One seed each.

    python -m dfs_jax.ablate --config configs/ablations/methods_digits.py --workdir runs/all_digits

The digits are too easy to tell methods apart; `methods.py` is for that.
"""

from dfs_jax.config import presets
from dfs_jax.sweeps.grid import Grid


def get_grid() -> Grid:
    """One axis: the method words of `dfs_jax/presets.py`."""
    return Grid(
        base="../digits.py",
        axes={"method": {word: [f"preset={word}"] for word in presets.METHODS}, "seeds": range(1)},
        baseline={"method": "joint"},
    )
