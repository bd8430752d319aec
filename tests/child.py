"""`python tests/child.py -m PROGRAM ARGS…`: a command of dfs_jax as cheap as tests want it.

The digits are those of the tiny run, and TensorFlow is missing: importing it takes longer than all
the rest, and without it nothing but TensorBoard's events is left out.
"""

import runpy
import sys

sys.modules["tensorflow"] = sys.modules["clu.metric_writers"] = None

import tiny_run  # noqa: E402

from dfs_jax import data  # noqa: E402

data._LOADERS["digits"] = tiny_run.load
del sys.argv[:2]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
