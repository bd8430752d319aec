"""bfloat16 beside float32 on the digits, five paired seeds.

python -m dfs_jax.ablate --config configs/ablations/precision.py --workdir runs/precision
"""

from dfs_jax.sweeps.grid import Grid


def get_grid() -> Grid:
    """Parameters and losses are float32 in both; `train.precision` is that of the layers."""
    return Grid(
        base="../digits.py",
        axes={"train.precision": ("float32", "bfloat16"), "seeds": range(5)},
        baseline={"train.precision": "float32"},
    )
