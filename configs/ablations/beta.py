"""The share of channels that deeper exits train: the sweep of the paper (section 4.3).

    python -m dfs_jax.ablate --config configs/ablations/beta.py --workdir runs/beta

Three seeds each on the `clean` double digits; a job array spreads it with --shard K/N.
"""

from dfs_jax.sweeps.grid import Grid


def get_grid() -> Grid:
    """beta from 0 (every exit trains its own segment) to 1 (deeper exits train everything)."""
    betas = {
        f"{beta}": ["preset=dfs", f"surgery.beta={beta}"] for beta in (0.1, 0.3, 0.5, 0.7, 0.9)
    }
    return Grid(
        base="../double_digits.py",
        axes={"beta": {"joint": ["preset=joint"], **betas}, "seeds": range(3)},
        baseline={"beta": "joint"},
    )
