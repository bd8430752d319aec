"""A small grid that shows how an ablation works: 2 methods × 2 betas × 2 seeds on the digits.

    python -m dfs_jax.ablate --config configs/ablations/digits_smoke.py --workdir runs/smoke

Under five minutes on two CPU cores. The digits are too easy to tell methods apart.
"""

from dfs_jax.sweeps.grid import Grid


def get_grid() -> Grid:
    """Joint training ignores beta: the report shows its two cells once."""
    return Grid(
        base="../digits.py",
        axes={
            "method": {"joint": ["preset=joint"], "dfs": ["preset=dfs"]},
            "surgery.beta": (0.25, 0.5),
            "seeds": range(2),
        },
        baseline={"method": "joint"},
        overrides=("train.epochs=10.0",),
    )
