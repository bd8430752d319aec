"""The files and tables of a benchmark: JSON with every raw time, CSV, Markdown, a chart.

What the numbers are is said in `step_cost.py`.
"""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from dfs_jax.evaluation import plots
from dfs_jax.profiling.step_cost import BASELINE, PHASES, StepCost
from dfs_jax.profiling.timing import Spread
from dfs_jax.training.run import Run
from dfs_jax.writing.files import json_text, write_whole
from dfs_jax.writing.tables import csv_table, markdown_table

_PACKAGES = ("dfs_jax", "jax", "jaxlib", "flax", "optax", "numpy")


def write(out: Path, heading: Mapping[str, Any], costs: Sequence[StepCost]) -> list[Path]:
    """Write OUT.json, OUT.csv, OUT.md and OUT.png, each whole or not at all; their paths.

    If one of these suffixes is on `out` already, it is dropped first.
    """
    files: dict[str, str | bytes] = {
        ".json": json_text(as_json(heading, costs), indent=2),
        ".csv": csv_table(_csv_rows(costs)),
        ".md": markdown(heading, costs),
        ".png": _chart(heading, costs),
    }
    base = out.with_suffix("") if out.suffix in files else out
    paths = [base.with_name(base.name + suffix) for suffix in files]
    for path, content in zip(paths, files.values(), strict=True):
        write_whole(path, content)
    return paths


def heading(spec: str, overrides: Sequence[str], run: Run) -> dict[str, Any]:
    """What figures of `run` are figures of; `spec` and `overrides` are its command line's."""
    return {
        "config": spec,
        "overrides": list(overrides),
        "network": run.config.model.name,
        "image_shape": list(run.data.spec.inputs["image"].shape),
        "num_classes": run.data.spec.num_classes,
        "precision": run.config.train.precision,
        "machine": machine(),
        "versions": versions(),
    }


def machine() -> dict[str, Any]:
    """What the figures depend on besides the program."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "cores": _cores(),
        "processor": _processor(),
        "system": platform.platform(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def versions() -> dict[str, str]:
    """Python and the packages that compute."""
    packages = {name: metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages}


def as_json(heading: Mapping[str, Any], costs: Sequence[StepCost]) -> dict[str, Any]:
    """Everything, as JSON takes it: bytes, FLOPs and seconds, unrounded."""
    return {**heading, "results": [_result(cost, _baseline(cost, costs)) for cost in costs]}


def _result(cost: StepCost, baseline: StepCost) -> dict[str, Any]:
    gradients = cost.input_gradients
    result: dict[str, Any] = {
        "method": cost.method,
        "batch_size": cost.batch_size,
        "config_sha256": cost.config_sha256,
        "images_per_second": cost.images_per_second,
        "median_seconds": cost.seconds,
        "least_flops_ratio": cost.least_flops,
        "phases": {
            phase: {
                **cost.costs[phase]._asdict(),
                "seconds": list(cost.times[phase].own),
                "baseline_seconds": list(cost.times[phase].baseline),
                **_against(cost, baseline, phase),
            }
            for phase in PHASES
        },
        "bound": None,
    }
    if gradients is not None:
        result["bound"] = {
            "gain": cost.bound,
            "share_reached": _gain(cost) / cost.bound if cost.bound else None,
            "input_gradient_seconds": gradients.full_seconds,
            "live_input_gradient_seconds": gradients.live_seconds,
            "dead_input_gradient_seconds": gradients.dead_seconds,
            "layers": [layer._asdict() for layer in gradients.layers],
        }
    return result


def _against(cost: StepCost, baseline: StepCost, phase: str) -> dict[str, Any]:
    times = cost.times[phase]
    if not times.baseline:
        return {"flops_ratio": 1.0, "time_ratio": None}
    return {
        "flops_ratio": cost.costs[phase].flops / baseline.costs[phase].flops,
        "time_ratio": Spread.of(times.ratios)._asdict(),
    }


def _baseline(cost: StepCost, costs: Sequence[StepCost]) -> StepCost:
    """The baseline at the batch size of `cost`."""
    return next(c for c in costs if (c.method, c.batch_size) == (BASELINE, cost.batch_size))


def _gain(cost: StepCost) -> float:
    """Images per second more than the baseline's: of the median pair."""
    return 1 / Spread.of(cost.times["step"].ratios).median - 1


def markdown(heading: Mapping[str, Any], costs: Sequence[StepCost]) -> str:
    """Two tables: what each method costs, and what it saves against the baseline."""
    lines = [f"# Cost of a training step: {heading['network']}", "", _setting(heading), ""]
    lines.append(_table([_cost_row(cost) for cost in costs]))
    against = [_saving_row(c, _baseline(c, costs)) for c in costs if c.method != BASELINE]
    if against:
        lines += ["", f"Against {BASELINE}, pair by pair: median [quartiles].", ""]
        lines.append(_table(against))
    lines += ["", _notes(costs), ""]
    return "\n".join(lines)


def _setting(heading: Mapping[str, Any]) -> str:
    of, names = heading["machine"], heading["versions"]
    height, width, channels = heading["image_shape"]
    return (
        f"`{heading['config']}` on random images {height}x{width}x{channels}, "
        f"{heading['precision']}; {of['processor'] or of['system']}, {of['cores']} cores, "
        f"{of['devices']} x {of['device_kind']} ({of['platform']}); jax {names['jax']}; "
        f"{heading['pairs']} pairs of {heading['calls']} calls."
    )


def _cost_row(cost: StepCost) -> dict[str, str]:
    seconds, step = cost.seconds, cost.costs["step"]
    return {
        "method": cost.method,
        "batch": str(cost.batch_size),
        **{f"{name} (ms)": f"{1e3 * value:.1f}" for name, value in seconds.items()},
        "images/s": f"{cost.images_per_second:.1f}",
        **{
            f"{phase.replace('_', '+')} (GFLOP)": f"{cost.costs[phase].flops / 1e9:.4g}"
            for phase in PHASES
        },
        "accessed (GB)": f"{step.bytes_accessed / 1e9:.3g}",
        "peak memory (MB)": f"{step.peak_bytes / 1e6:.3g}",
        "trace (s)": f"{step.trace_seconds:.1f}",
        "compile (s)": f"{step.compile_seconds:.1f}",
    }


def _saving_row(cost: StepCost, baseline: StepCost) -> dict[str, str]:
    ratio = Spread.of(cost.times["step"].ratios)
    flops = _against(cost, baseline, "step")["flops_ratio"]
    least, bound = cost.least_flops, cost.bound
    return {
        "method": cost.method,
        "batch": str(cost.batch_size),
        "step time": f"{ratio.median:.3f} [{ratio.lower:.3f}, {ratio.upper:.3f}]",
        "more images/s": f"{_gain(cost):+.1%}",
        "bound of this run": f"{bound:+.1%}" if bound is not None else "-",
        "of the bound": f"{_gain(cost) / bound:.0%}" if bound else "-",
        "step FLOPs": f"{flops:.4f}",
        "smallest FLOPs": f"{least:.4f}" if least else "-",
        "at these FLOPs": f"{1 / least - 1:+.1%}" if least else "-",
    }


def _notes(costs: Sequence[StepCost]) -> str:
    lines = [
        "Backward is forward+backward less forward, other the step less forward+backward (the "
        "optimizer, and what is measured). FLOPs, bytes and memory are the compiler's, of one "
        "device; memory is that of arguments, temporaries and results."
    ]
    for cost in costs:
        if cost.input_gradients is None:
            continue
        full, live = cost.input_gradients.full_seconds, cost.input_gradients.live_seconds
        step = Spread.of(cost.times["step"].baseline).median
        lines.append(
            f"Bound of {cost.method} at {cost.batch_size}: the input gradients of layers that read "
            f"a partitioned feature, each alone, take {1e3 * full:.1f} ms, {full / step:.1%} of "
            f"the step of {BASELINE}, and {1e3 * cost.input_gradients.dead_seconds:.1f} ms of it "
            f"are for dead channels; those of the live channels alone take {1e3 * live:.1f} ms."
        )
    return "\n\n".join(lines)


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    return markdown_table([list(row.values()) for row in rows], list(rows[0]), aligned=True)


def _csv_rows(costs: Sequence[StepCost]) -> list[dict[str, Any]]:
    """One line a method and batch size, with the medians; SI units."""
    rows = []
    for cost in costs:
        against = _result(cost, _baseline(cost, costs))
        ratio, bound = against["phases"]["step"]["time_ratio"] or {}, against["bound"] or {}
        row = {"method": cost.method, "batch_size": cost.batch_size}
        row |= {f"{name}_seconds": value for name, value in cost.seconds.items()}
        row["images_per_second"] = cost.images_per_second
        for phase in PHASES:
            row |= {f"{phase}_{name}": value for name, value in cost.costs[phase]._asdict().items()}
        row |= {f"step_ratio_{name}": ratio.get(name) for name in Spread._fields}
        row["step_flops_ratio"] = against["phases"]["step"]["flops_ratio"]
        row["least_flops_ratio"] = cost.least_flops
        row["bound_gain"] = bound.get("gain")
        row["input_gradient_seconds"] = bound.get("input_gradient_seconds")
        rows.append(row)
    return rows


def _chart(heading: Mapping[str, Any], costs: Sequence[StepCost]) -> bytes:
    groups: dict[int, dict[str, dict[str, float]]] = {}
    for cost in costs:
        parts = {name: cost.seconds[name] for name in ("forward", "backward", "other")}
        groups.setdefault(cost.batch_size, {})[cost.method] = parts
    of = heading["machine"]
    title = f"{heading['network']}, {heading['precision']}, {of['device_kind']}"
    return plots.step_times(title, groups)


def _cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    """The processor's name; on Linux `platform` does not tell it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor()
