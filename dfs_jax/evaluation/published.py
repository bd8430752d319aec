"""Published results of multi-exit networks, to lay over one's own curves.

Top-1 accuracies in percent as printed, shallow to deep, against cumulative cost in multiply-adds
(the "published" convention of `models/cost.py`). Rows of one table do not share a recipe: most
baselines were quoted from papers that trained in another way, some with smaller networks.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Published:
    """One published table."""

    title: str
    costs: tuple[float, ...]  # (N,) multiply-adds per image
    top1: Mapping[str, tuple[float, ...]]  # (N,) percent, by method
    ensemble: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of all exits
    # Points (mean cost per image, percent) of budgeted batch evaluation.
    budgeted: Mapping[str, tuple[tuple[float, float], ...]] = dataclasses.field(
        default_factory=dict
    )


def results(name: str) -> Published:
    """The table `name`. Raises ValueError for an unknown name, listing the known ones."""
    if name not in _TABLES:
        raise ValueError(f"unknown published results {name!r}; known: {', '.join(names())}")
    return _TABLES[name]


def names() -> tuple[str, ...]:
    """The tables that `results` knows."""
    return tuple(sorted(_TABLES))


# All from Deep Feature Surgery (arXiv 2407.13986) and what it quotes, except where noted.
_TABLES = {
    "cifar100_msdnet": Published(
        title="CIFAR-100, MSDNet",
        costs=(56.43e6, 101.00e6, 155.31e6, 198.10e6, 249.53e6, 298.05e6, 340.64e6),
        top1={
            "MSDNet": (64.10, 67.46, 70.34, 72.38, 73.06, 73.81, 73.89),
            "GE": (64.00, 68.41, 71.86, 73.50, 74.46, 75.39, 75.96),
            "CAGrad": (68.78, 72.55, 74.23, 74.97, 75.35, 75.82, 76.08),
            "PCGrad": (67.06, 71.37, 74.86, 75.78, 76.25, 76.95, 76.71),
            "Meta-GF": (67.97, 72.27, 75.06, 75.77, 76.38, 77.11, 77.47),
            "BDL-1": (66.29, 69.31, 71.15, 72.05, 72.61, 73.23, 73.59),
            "BDL-2": (65.81, 68.93, 71.01, 72.45, 72.98, 73.42, 74.27),
            "WPN": (62.26, 67.18, 70.53, 73.10, 74.80, 76.05, 76.31),
            "Nash-MTL": (64.14, 69.23, 72.64, 74.89, 75.32, 75.88, 76.75),
            "DR-MGF": (67.82, 72.45, 74.77, 75.77, 76.56, 76.90, 77.01),
            "DFS": (72.46, 75.64, 77.50, 78.54, 79.20, 79.45, 79.56),
        },
        budgeted={
            "MSDNet": ((148e6, 75.84),),
            "GE": ((165e6, 76.76),),
            "Meta-GF": ((174e6, 77.41),),
            "DFS": ((87e6, 77.3), (146e6, 79.93)),
        },
    ),
    "cifar100_resnet18": Published(
        title="CIFAR-100, ResNet18",
        # The official counter does not run on this network; by its convention these are
        # 165.63, 296.32, 427.20 and 556.03 million.
        costs=(169.62e6, 300.22e6, 431.05e6, 559.75e6),
        top1={
            "DSN": (67.23, 73.80, 77.75, 78.38),
            "BYOT": (67.85, 74.57, 78.23, 78.64),
            "DFS": (74.17, 77.43, 78.82, 79.93),
        },
        ensemble={"DSN": 79.27, "BYOT": 79.67, "DFS": 80.89},
    ),
    "imagenet_msdnet": Published(
        title="ImageNet, MSDNet (step 4)",
        costs=(0.34e9, 0.69e9, 1.01e9, 1.25e9, 1.36e9),
        top1={
            "MSDNet": (56.64, 65.14, 68.42, 69.77, 71.34),
            "GE": (57.28, 66.22, 70.24, 71.71, 72.43),
            "CAGrad": (58.37, 64.21, 66.88, 68.22, 69.42),
            "PCGrad": (57.62, 64.87, 68.93, 71.05, 72.45),
            "Meta-GF": (57.43, 64.82, 69.08, 71.67, 73.27),
            "DFS": (61.80, 68.03, 70.75, 71.79, 72.88),
            # From the paper of L2W-DEN (ECCV 2022), the second with label smoothing.
            "L2W-DEN, 100 epochs": (59.54, 67.22, 71.03, 72.33, 73.93),
            "L2W-DEN, 300 epochs": (61.64, 67.89, 71.61, 73.82, 75.03),
        },
    ),
    # From github.com/LeapLabTHU/L2W-DEN, the second with label smoothing. No costs are printed
    # there; these are counted here (`model.options.steps=(6, 6, 6, 6, 6)`).
    "imagenet_msdnet_step6": Published(
        title="ImageNet, MSDNet (step 6)",
        costs=(514.66e6, 1171.18e6, 1844.52e6, 2501.40e6, 2742.06e6),
        top1={
            "L2W-DEN, 100 epochs": (60.05, 69.13, 73.33, 75.19, 76.30),
            "L2W-DEN, 300 epochs": (61.41, 70.70, 74.38, 75.80, 76.66),
        },
    ),
    # Costs and MSDNet: the released weights, trained without the 50,000 images that are held out,
    # as measured in github.com/kalviny/MSDNet-PyTorch, issue 10. L2W-DEN: as for step 6.
    "imagenet_msdnet_step7": Published(
        title="ImageNet, MSDNet (step 7)",
        costs=(615.69e6, 1436.39e6, 2283.21e6, 2967.42e6, 3253.79e6),
        top1={
            "MSDNet": (62.90, 70.32, 73.00, 73.59, 74.59),
            "L2W-DEN, 100 epochs": (59.24, 69.65, 73.94, 75.66, 76.72),
            "L2W-DEN, 300 epochs": (60.94, 71.88, 75.13, 76.03, 76.82),
        },
    ),
}
