"""Where Deep Feature Surgery wins and where it loses: length, beta, width and network varied.

    python -m dfs_jax.ablate --config configs/ablations/regions.py --workdir runs/regions

Two seeds each on the `clean` double digits, in batches of 64. docs/results.md has what came of it.
"""

from dfs_jax.sweeps.grid import Grid

_STEPS = "train.steps={}"


def get_grid() -> Grid:
    """The settings differ from `base` as they say; methods are compared within a setting."""
    settings = {
        "base": [],
        "400 steps": [_STEPS.format(400)],
        "msdnet, 2400 steps": ["preset=msdnet", _STEPS.format(2400)],
        "resnet18 with distillation, 2400 steps": [
            "preset=resnet18",
            _STEPS.format(2400),
            "model.options.adapters=True",
            "objective.logit_weight=0.3",
            "objective.feature_weight=0.03",
        ],
        "width 8, 2400 steps": [
            "model.options.widths=((8,8),(16,16),(32,32))",
            _STEPS.format(2400),
        ],
        "width 32": ["model.options.widths=((32,32),(64,64),(128,128))"],
        "2400 steps, beta 0.25": [_STEPS.format(2400), "surgery.beta=0.25"],
        "2400 steps, beta 0.75": [_STEPS.format(2400), "surgery.beta=0.75"],
        "3600 steps": [_STEPS.format(3600)],
    }
    methods = {word: [f"preset={word}"] for word in ("joint", "dfs", "dfs_all")}
    return Grid(
        base="../double_digits.py",
        axes={"setting": settings, "method": methods, "seeds": range(2)},
        baseline={"method": "joint"},
        overrides=(
            "train.steps=1200",
            "train.batch_size=64",
            "optimizer.learning_rate=0.05",
            "train.eval_every=400",
        ),
    )
