"""Where modules stand and what they may import: the map of CONTRIBUTING.md as a test.

All imports count, those inside functions and under TYPE_CHECKING too.
"""

import ast
import functools
import graphlib
import sys
from pathlib import Path

import pytest

import dfs_jax

ROOT = Path(dfs_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# From the bottom up: a module imports its own package and rooms of lower floors, nothing else.
FLOORS = (
    {"ops", "writing"},
    {"surgery"},
    {"objectives", "models"},
    {"gradients"},
    {"config"},
    {"data", "distributed"},
    {"training", "early_exit"},
    {"evaluation"},
    {"sweeps", "profiling", "interop"},
    {"commands"},
)
COMMANDS = {"early_exit.export", "early_exit.onnx", "early_exit.throughput"}
COMMANDS |= {"data.prepare", "data.double_digits"}

# What these rooms may import outside functions, besides the standard library.
LIGHT = {"jax", "flax", "optax", "numpy", "dfs_jax"}
LIGHT_ROOMS = {"writing", "ops", "surgery", "objectives", "models", "gradients", "early_exit"}
HEAVY = {"tensorflow", "tensorflow_datasets", "clu", "matplotlib", "scipy", "torch", "sklearn"}
HEAVY |= {"plotly", "jinja2"}
# A data set of TFDS is a subclass of its builders, so these files need it to be defined at all.
TFDS_SETS = {"data.sets.cifar", "data.sets.digits", "data.sets.double_digits"}


def name_of(file: Path) -> str:
    """`models.vgg` for dfs_jax/models/vgg.py, `models` for its __init__, "" for dfs_jax's own."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    top = module.partition(".")[0]
    if module in COMMANDS or module.endswith("__main__"):
        return "commands"
    return top if any(top in floor for floor in FLOORS) else "commands"


def floor_of(module: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if room_of(module) in floor)


@functools.cache
def imports() -> dict[str, set[str]]:
    """For every module of dfs_jax those of dfs_jax that it imports anywhere."""
    known = {name_of(file) for file in FILES}
    return {name_of(file): set(_imported(file, known)) - {name_of(file)} for file in FILES}


def _imported(file: Path, known: set[str]):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            assert not any(a.name.startswith("dfs_jax.") for a in node.names), f"{file}: use from"
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: a relative import"
            if node.module.partition(".")[0] == "dfs_jax":
                package = node.module.partition(".")[2]
                for alias in node.names:
                    inner = f"{package}.{alias.name}".lstrip(".")
                    yield inner if inner in known else package


def outside(file: Path) -> set[str]:
    """Top-level names of the packages that `file` imports when it is itself imported."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found


def uses_linen(file: Path) -> bool:
    return any(
        isinstance(node, ast.ImportFrom) and f"{node.module}.{alias.name}".startswith("flax.linen")
        for node in ast.walk(ast.parse(file.read_text()))
        for alias in getattr(node, "names", ())
    )


@pytest.mark.parametrize("module", sorted(imports()))
def test_arrows_point_down(module):
    for target in imports()[module]:
        if room_of(target) != room_of(module):
            assert floor_of(target) < floor_of(module), (
                f"{module} ({room_of(module)}) imports {target} ({room_of(target)}), which does "
                "not stand on a lower floor"
            )


def test_a_command_is_imported_by_nobody():
    for module, targets in imports().items():
        wrong = {t for t in targets if room_of(t) == "commands"}
        assert not wrong, f"{module} imports {', '.join(wrong)}: move what it needs to a lower room"


def test_no_circle_between_modules():
    # A package's __init__ runs before its modules anyhow, so these may not lean on it.
    graph = {
        module: {t for t in targets if not module.startswith(f"{t}.")}
        for module, targets in imports().items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which shows the circle


def test_the_top_level_holds_the_ideas_and_the_commands():
    assert len([f for f in ROOT.glob("*.py") if f.name != "__init__.py"]) <= 12
    assert not ast.parse((ROOT / "__init__.py").read_text()).body[1:], "dfs_jax imports nothing"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_file_is_short_and_imports_what_its_room_may(file):
    module = name_of(file)
    assert len(file.read_text().splitlines()) <= 500
    assert "utils" not in module
    found = outside(file) - set(sys.stdlib_module_names)
    if room_of(module) in LIGHT_ROOMS:
        assert found <= LIGHT, f"{module} may import {found - LIGHT} inside functions alone"
    allowed = {"tensorflow_datasets"} if module in TFDS_SETS else set()
    assert not found & HEAVY - allowed, f"{module} imports {found & HEAVY} when it is imported"
    assert room_of(module) == "models" or not uses_linen(file), f"{module} imports linen"
