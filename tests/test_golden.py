"""The networks, their gradients and surgery against numbers of the official PyTorch code.

In float64 they agree to 1e-8 and better. See golden/README.md for what was recorded.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_networks import QUICK, THOROUGH, Case, read_json, stats

from dfs_jax.surgery import Surgery

# What is held to the recorded numbers, in the fast run and in the slow one. A compilation of a
# training pass takes seconds and so does one gradient of an MSDNet in float64.
ALL = ("outputs", "losses", "exits", "trajectories")
FAST = {
    "msdnet_cifar100__fr_strict__r0.5": ("outputs", "losses"),
    "resnet18__fr_strict__r0.5": ("outputs", "losses"),
    "vgg7_64_cifar100_distill__fr_strict__r0.5": ("outputs", "losses"),
    "vgg7_64_cifar100_nodistill__fr_strict__r0.5": ALL,
    "vgg7_64_cifar100_nodistill__partition__r0.5": ALL,
    "vgg7_64_cifar100_nodistill__plain__r0.5": ALL,
}
SLOW = {
    "msdnet_cifar100__fr_full__r0.5": ALL,
    "msdnet_cifar100__fr_strict__r0.5": ("exits", "trajectories"),
    "msdnet_cifar100__partition__r0.5": ALL,
    "msdnet_cifar100__plain": ALL,
    "msdnet_imagenet__fr_full__r0.5": ("outputs", "losses", "exits"),
    "resnet18__fr_strict__r0.5": ("exits", "trajectories"),
    "sdn_resnet18__plain": ALL,
    "vgg7_64_cifar100_distill__fr_strict__r0.5": ("exits", "trajectories"),
    "vgg16_64_imagenet_nodistill__fr_strict__r0.5": ("outputs", "losses", "exits"),
}
_PARAMETERS = [
    *(pytest.param(case, parts, QUICK, id=case) for case, parts in FAST.items()),
    *(
        pytest.param(case, parts, THOROUGH, id=f"{case}-rest", marks=pytest.mark.slow)
        for case, parts in SLOW.items()
    ),
]


@pytest.mark.parametrize(("name", "parts", "options"), _PARAMETERS)
def test_float64(name, parts, options):
    differences = Differences()
    checks = {
        "outputs": _outputs,
        "losses": _losses,
        "exits": _exits,
        "trajectories": _trajectories,
    }
    with jax.enable_x64(True):
        case = Case(name, options=options)
        for part in parts:
            checks[part](case, differences)
    assert not differences.lines, "\n".join(differences.lines[:20])


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("msdnet_cifar100__fr_strict__r0.5", "train"),
        ("resnet18__fr_strict__r0.5", "train"),
        ("vgg7_64_cifar100_distill__fr_strict__r0.5", "train"),
        ("vgg7_64_cifar100_distill__fr_strict__r0.5", "eval"),
        *(
            pytest.param(name, mode, marks=pytest.mark.slow)
            for name, mode in [
                ("msdnet_cifar100__fr_strict__r0.5", "eval"),
                ("resnet18__fr_strict__r0.5", "eval"),
                ("msdnet_imagenet__fr_full__r0.5", "train"),
                ("msdnet_imagenet__fr_full__r0.5", "eval"),
                ("vgg16_64_imagenet_nodistill__fr_strict__r0.5", "train"),
                ("vgg16_64_imagenet_nodistill__fr_strict__r0.5", "eval"),
            ]
        ),
    ],
)
def test_float32(name, mode):
    case = Case(name, np.float32)
    logits, ce, _ = case.forward(train=mode == "train")
    assert logits.dtype == np.float32
    # PyTorch's own float32 deviates this much from its float64.
    measured = case.meta["f32_vs_f64"][f"{mode}_logits_abs_max"]
    want = case.golden[f"{mode}_logits"]
    np.testing.assert_allclose(logits[..., : want.shape[-1]], want, rtol=0, atol=8 * measured)
    np.testing.assert_allclose(ce, case.golden[f"{mode}_exit_ce"], rtol=2e-5)


class Differences:
    """Collects what differs, so that one run shows all of it."""

    def __init__(self):
        self.lines: list[str] = []

    def check(self, what, got, want, tolerance=1e-8):
        """Largest difference over the largest recorded value."""
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        if got.shape != want.shape:
            self.lines.append(f"{what}: shape {got.shape}, recorded {want.shape}")
            return
        scale = max(np.nanmax(np.abs(want), initial=0.0), 1e-6)
        apart = np.abs(got - want)
        if np.any(np.isnan(got) != np.isnan(want)) or np.nanmax(apart) > tolerance * scale:
            self.lines.append(f"{what}: off by {np.nanmax(apart) / scale:.1e}, relative")

    def require(self, what, condition):
        if not condition:
            self.lines.append(what)


def _outputs(case: Case, differences: Differences):
    g = case.golden
    logits, ce, features = case.forward(train=False)
    differences.check("eval logits", logits[..., : g["eval_logits"].shape[-1]], g["eval_logits"])
    differences.check("eval cross-entropy", ce, g["eval_exit_ce"])
    for i, feature in enumerate(features):
        differences.check(f"eval feature {i}", stats(feature), g["eval_feature_stats"][i])
    at = case.at_start()
    differences.check("logits", at.logits[..., : g["train_logits"].shape[-1]], g["train_logits"])
    differences.check("cross-entropy", at.exit_ce, g["train_exit_ce"])
    for i, feature in enumerate(at.features):
        differences.check(f"feature {i}", stats(feature), g["train_feature_stats"][i])
    for name, want in zip(case.buffer_names, g["bn_buffers_after_stats"], strict=True):
        differences.check(f"{name} after a pass", stats(at.buffers[name]), want)


def _losses(case: Case, differences: Differences):
    g = case.golden
    for loss in case.meta["losses"]:
        at = case.at_start(loss)
        differences.check(loss, at.loss, g[f"train_{loss}_loss"])
        recorded = zip(
            case.names, g[f"train_{loss}_grad_stats"], g[f"train_{loss}_grad_none"], strict=True
        )
        for name, want, none in recorded:
            got = at.gradients[name]
            if none:
                differences.require(f"{loss}: {name} has a gradient", not np.any(got))
            elif name in case.meta["noise"]:  # 0 but for rounding
                differences.require(f"{loss}: {name} is not 0", np.abs(got).max() < 1e-10)
            else:
                differences.check(f"{loss}: gradient of {name}", stats(got), want)
        want = g[f"train_{loss}_input_grad_stats"]
        differences.check(f"{loss}: gradient of the images", stats(at.input_gradient), want)


def _exits(case: Case, differences: Differences):
    g = case.golden
    for i, at in enumerate(case.exit_gradients()):
        norm = np.linalg.norm(at.input_gradient)
        differences.check(f"exit {i}: images", norm, g["exit_input_grad_norm"][i])
        for p, name in enumerate(case.names):
            got, what = at.gradients[name], f"exit {i}: gradient of {name}"
            if g["exit_grad_none"][p, i]:
                differences.require(f"{what} is not 0", not np.any(got))
            elif name not in case.meta["noise"]:
                differences.check(what, np.linalg.norm(got), g["exit_grad_norm"][p, i])
                zeros = g["exit_grad_zero_fraction"][p, i]
                # Recorded in float32: one element of the largest kernel is 2e-7.
                apart = abs(np.mean(got == 0) - zeros)
                differences.require(f"{what}: zeros off by {apart:.1e}", apart < 1e-7)
        for key in g:
            if key.startswith("channel_grad__"):
                name = key.removeprefix("channel_grad__")
                differences.check(f"exit {i}: channels of {name}", at.gradients[name], g[key][i])


def _trajectories(case: Case, differences: Differences):
    runs = [(f"sgd_{loss}", loss, 0.1) for loss in case.meta["losses"]]
    for key, loss, learning_rate in [*runs, ("sgd_lr0.01_ce", "ce", 0.01)]:
        g = case.golden
        losses, exit_ce, state = case.trajectory(loss, learning_rate)
        differences.check(f"{key}: losses", losses, g[f"{key}_losses"], 1e-5)
        differences.check(f"{key}: cross-entropies", exit_ce, g[f"{key}_exit_ce"], 1e-5)
        for name, want in zip(case.names, g[f"{key}_param_stats_after5"], strict=True):
            differences.check(f"{key}: {name} after 5 steps", stats(state[name]), want, 1e-5)


def test_number_of_shared_channels():
    for channels, by_percent in read_json("feature_num1_table").items():
        for percent, want in by_percent.items():
            assert Surgery(beta=int(percent) / 100).cut(int(channels)) == want


def test_what_surgery_passes_on_and_what_it_trains():
    rows = read_json("feature_reroute")["rows"]
    for channels in {row["channels"] for row in rows}:
        chosen = [row for row in rows if row["channels"] == channels]
        received = jax.jit(lambda x, rows=chosen: [_received(row, x) for row in rows])
        for row, masks in zip(chosen, received(np.ones(channels, np.float32)), strict=True):
            want = {key: _mask(row[key]) for key in masks}
            if (
                row["use_dns"]
                and row["use_fr"]
                and row["reference"] == "full"
                and row["ratio"] >= 1
            ):
                # The official code takes the exit's gradient away at 1 and nowhere below; here
                # "all" means all.
                want["x_sub_grad"] = np.ones(channels)
            for key, mask in masks.items():
                np.testing.assert_array_equal(mask, want[key], err_msg=f"{key} of {row}")


def _received(row, x: jax.Array) -> dict[str, jax.Array]:
    """Masks over the channels of x, which is 1: passed on or zero, trained or not."""
    surgery = Surgery(
        beta=min(max(row["ratio"], 0), 1),
        partition=bool(row["use_dns"]),
        referencing=bool(row["use_fr"]),
        exit_gradient={"full": "all", "strict": "own"}[row["reference"]],
    )
    result = {}
    for key, part in (("x_plus", surgery.to_next), ("x_sub", surgery.to_exit)):
        result[f"{key}_value"], pullback = jax.vjp(lambda x, part=part: part(x).stopped(), x)
        (result[f"{key}_grad"],) = pullback(jnp.ones_like(x))
    return result


def _mask(text: str) -> np.ndarray:
    """'1x32 0x16' is 32 ones and 16 zeros."""
    runs = (run.split("x") for run in text.split())
    return np.concatenate([np.full(int(n), float(value)) for value, n in runs])
