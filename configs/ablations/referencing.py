"""What referencing adds to partitioning: none, the paper's definition, the official MSDNet code's.

python -m dfs_jax.ablate --config configs/ablations/referencing.py --workdir runs/referencing
"""

from dfs_jax.sweeps.grid import Grid


def get_grid() -> Grid:
    """Joint training, zeros for the other part, and both ways of seeing it."""
    return Grid(
        base="../double_digits.py",
        axes={
            "referencing": {
                "joint": ["preset=joint"],
                "none": ["preset=dfs", "surgery.referencing=false"],
                "own": ["preset=dfs"],
                "all": ["preset=dfs_all"],
            },
            "seeds": range(3),
        },
        baseline={"referencing": "joint"},
    )
