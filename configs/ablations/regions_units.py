"""Where Deep Feature Surgery wins on ten classes, for networks that read one double digit only.

    python -m dfs_jax.ablate --config configs/ablations/regions_units.py --workdir runs/units

Three seeds each, in batches of 64. On the 100 classes of `regions.py` MSDNet and ResNet18 learn one
digit of the two and stay there; here that digit is the class and the other one distracts.
docs/results.md has what came of it.
"""

from dfs_jax.sweeps.grid import Grid

_DISTILLATION = [
    "model.options.adapters=True",
    "objective.logit_weight=0.3",
    "objective.feature_weight=0.03",
]


def get_grid() -> Grid:
    """Short and long runs of each network; methods are compared within a setting."""
    networks = {
        "vgg7": (["preset=vgg7"], 300, 1200),
        "msdnet": (["preset=msdnet", "optimizer.learning_rate=0.1"], 400, 1200),
        "resnet18 with distillation": (["preset=resnet18", *_DISTILLATION], 300, 900),
    }
    settings = {
        f"{name}, {steps} steps": [*overrides, f"train.steps={steps}"]
        for name, (overrides, *lengths) in networks.items()
        for steps in lengths
    }
    methods = {word: [f"preset={word}"] for word in ("joint", "dfs", "dfs_all")}
    return Grid(
        base="../double_digits.py",
        axes={"setting": settings, "method": methods, "seeds": range(3)},
        baseline={"method": "joint"},
        overrides=(
            "data.name=double_digits/units",
            "train.batch_size=64",
            "optimizer.learning_rate=0.05",
            "train.eval_every=300",
            "train.conflict_every=0",
        ),
    )
