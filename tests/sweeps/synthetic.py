"""Records of runs that never were: numbers are drawn, and the tests compute with them again."""

import numpy as np

from dfs_jax.evaluation import conflict
from dfs_jax.sweeps.records import Record

COSTS = (10e6, 20e6, 40e6)


def record(number, labels, rng, config=None, baseline=None, costs=COSTS):
    """The record of a run with as many exits as `costs`, everything in it that a run can have."""
    exits = range(1, len(costs) + 1)
    top1 = np.sort(rng.uniform(0.5, 0.9, len(costs)))
    scores = {f"test/exit{i}/top1": float(top1[i - 1]) for i in exits}
    scores |= {f"test/exit{i}/cost": costs[i - 1] for i in exits}
    steps = [100, 200, 300]
    curves = {f"exit{i}": (top1[i - 1] * np.array([0.5, 0.8, 1.0])).tolist() for i in exits}
    lines = [
        {
            "step": step,
            **{
                f"conflict/exit{i}_exit{j}": rng.uniform(-1, 1)
                for i in exits
                for j in exits
                if i < j
            },
        }
        for step in steps
    ]
    ratios = np.arange(1, 11) / 5
    return Record(
        labels,
        {**scores, "test/ensemble/top1": float(top1.mean())},
        seconds=float(rng.integers(10, 100)),
        conflict=conflict.history(lines),
        number=number,
        baseline=baseline or {},
        config=config or {},
        curves={
            "step": steps,
            **curves,
            "ensemble": curves["exit1"],
            "mean": np.mean([*curves.values()], axis=0).tolist(),
        },
        speed={
            "train/images_per_second": float(rng.integers(1000, 2000)),
            "train/step_seconds": float(rng.uniform(0.01, 0.02)),
        },
        step=300,
        step_flops=3e9,
        budgeted=[
            {
                "ratio": r,
                "cost": costs[0] + r / 2 * (costs[-1] - costs[0]),
                "top1": 0.5 + r / 10 + float(rng.uniform(0, 0.05)),
            }
            for r in ratios.tolist()
        ],
    )


def grid(methods=("joint", "dfs", "ge"), seeds=3, config_of=None, baseline=None):
    """A record of every method and seed, each of its own numbers."""
    rng = np.random.default_rng(0)
    found = []
    for method in methods:
        for seed in range(seeds):
            labels = {"method": method, "seeds": str(seed)}
            config = {} if config_of is None else config_of(method, seed)
            found.append(record(len(found), labels, rng, config, baseline))
    return found
