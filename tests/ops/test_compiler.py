"""Compiler options, and FLOPs read from compiled programs."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from dfs_jax.ops import compiler

WITHOUT = "--xla_cpu_experimental_ynn_fusion_type="


def _convolve(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _compiled(function, *shapes):
    arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return function.lower(*arrays).compile()


def test_convolutions_on_cpu_run_on_all_cores():
    """Not handed to YNNPACK, which would take one core for 64 channels."""
    text = _compiled(compiler.jit(_convolve), (8, 16, 16, 64), (3, 3, 64, 64)).as_text()
    assert " convolution(" in text
    assert "__ynn_fusion" not in text


def test_within_another_program_it_has_no_options_of_its_own():
    doubled = compiler.jit(lambda x: 2 * x)
    assert float(jax.jit(jax.grad(lambda x: doubled(x) ** 2))(3.0)) == 24
    assert "mul" in str(jax.make_jaxpr(doubled)(3.0))


def test_a_compiler_that_knows_no_such_option_gets_none(monkeypatch):
    monkeypatch.setattr(compiler, "_CPU_OPTIONS", {"xla_cpu_no_such_option": "1"})
    compiler.options.cache_clear()
    assert compiler.options() is None
    monkeypatch.undo()
    compiler.options.cache_clear()
    assert compiler.options()


def test_what_the_user_sets_is_left_alone():
    program = "from dfs_jax.ops import compiler; print(compiler.options())"
    environment = {**os.environ, "XLA_FLAGS": WITHOUT, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


@pytest.mark.parametrize(
    ("function", "shapes", "one"),
    [
        (jnp.matmul, ((32, 32), (32, 32)), 2 * 32**3),
        (_convolve, ((4, 8, 8, 6), (1, 1, 6, 5)), 2 * 4 * 8 * 8 * 6 * 5),
    ],
)
def test_flops_of_loops_count_every_round(function, shapes, one):
    def loop(*arrays):
        out = jax.eval_shape(function, *(a[0] for a in arrays))
        add = lambda total, arrays: (total + function(*arrays), None)  # noqa: E731
        return lax.scan(add, jnp.zeros(out.shape), arrays)[0]

    program = _compiled(compiler.jit(loop), *((7, *shape) for shape in shapes))
    assert compiler.flops(program) == pytest.approx(7 * one, rel=0.05)
