"""What the commands share: flags, logging, and errors told in one sentence.

Exit status 0 is success, 2 a request that cannot be carried out (nothing was changed), 1 a
run that had to end, or that answered a part only; 128 + N a command that signal N ended at once
(`signals.py`). Anything else that is raised is a defect here, and shows its traceback.
"""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

from dfs_jax.config import signals
from dfs_jax.config.errors import ConfigError
from dfs_jax.config.loader import load
from dfs_jax.writing.console import say

_OVERRIDE = "--config."

# `python -m dfs_jax.COMMAND` imports for seconds after this; Ctrl-C shows no traceback then either.
_program = getattr(sys.modules["__main__"], "__spec__", None)
_whole_life = contextlib.ExitStack()
if _program is not None and _program.name.startswith("dfs_jax."):
    _whole_life.enter_context(signals.ending_at_once())


def parser(description: str) -> argparse.ArgumentParser:
    """A parser for a command whose module docstring is `description`."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add `--config FILE[:preset]`, which `--config.a.b=value` adjusts."""
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE[:preset]",
        help="configuration; single fields are overridden by --config.SECTION.FIELD=VALUE",
    )


def add_workdir(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add `--workdir DIR`."""
    parser.add_argument(
        "--workdir", required=required, metavar="DIR", help="directory of the run (local or gs://)"
    )


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """Add `--data_dir DIR` to a command that takes a run's configuration from its workdir."""
    parser.add_argument(
        "--data_dir", metavar="DIR", help="where the run's data are now; default: where they were"
    )


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    body: Callable[[argparse.Namespace, ml_collections.ConfigDict | None], int | None],
) -> int:
    """Parse `argv`, load the configuration if one was given, call `body`; the exit status.

    That is what `body` returns, None being success. `arguments.overrides` is what
    `--config.SECTION.FIELD=VALUE` gave, as `config.load` takes it.
    """
    arguments, overrides = _parse(parser, sys.argv[1:] if argv is None else list(argv))
    arguments.overrides = tuple(overrides)
    for variable, quiet in (("TF_CPP_MIN_LOG_LEVEL", "2"), ("TF_ENABLE_ONEDNN_OPTS", "0")):
        os.environ.setdefault(variable, quiet)  # TensorFlow only reads and writes files here
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # absl is Orbax and clu. What goes wrong in a save is raised as well, and told in a sentence;
    # Orbax would add the traceback of every thread, and asyncio those of the tasks left behind.
    quiet = {"jax": logging.WARNING, "absl": logging.CRITICAL, "asyncio": logging.CRITICAL}
    for noisy, level in quiet.items():
        logging.getLogger(noisy).setLevel(level)
    sys.unraisablehook = _unraisable
    with signals.ending_at_once():
        return _status(arguments, overrides, body)


def _status(
    arguments: argparse.Namespace,
    overrides: list[str],
    body: Callable[[argparse.Namespace, ml_collections.ConfigDict | None], int | None],
) -> int:
    try:
        config = None
        if getattr(arguments, "config", None) is not None:
            config = load(arguments.config, overrides)
            configure_jax(config)
        elif overrides:
            raise ConfigError(f"--config.{overrides[0]} needs --config FILE")
        return body(arguments, config) or 0
    except ConfigError as error:
        say(f"error: {error}", error=True)
        return 2
    except OSError as error:  # a disk, not a defect
        say(f"error: {error.filename or 'files'}: {error.strerror or error}", error=True)
        return 1
    except Exception as error:
        from dfs_jax.ops import memory  # it imports JAX, which flags alone do not need

        if memory.is_shortage(error):
            told = memory.SHORTAGE
        elif isinstance(error, RuntimeError) and type(error).__module__.startswith("dfs_jax."):
            told = str(error)
        else:
            raise
        say(f"error: {told}", error=True)
        return 1


def _unraisable(told: Any) -> None:
    # TensorStore reports the futures of a failed save to an event loop that is gone, where
    # nobody waits for them.
    if str(told.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(told)


def configure_jax(config: ml_collections.ConfigDict) -> None:
    """Set what JAX must know before anything is computed: float64, the compilation cache."""
    import jax

    from dfs_jax.config import programs

    if config.train.precision == "float64":
        jax.config.update("jax_enable_x64", True)
    programs.keep(config.train.compilation_cache)


def _parse(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the overrides `a.b=value` among them."""
    overrides, rest = [], []
    while argv:
        argument = argv.pop(0)
        if not argument.startswith(_OVERRIDE):
            rest.append(_with_home(argument))
        elif "=" not in argument and argv:  # --config.a.b VALUE
            overrides.append(f"{argument[len(_OVERRIDE) :]}={argv.pop(0)}")
        else:
            overrides.append(argument[len(_OVERRIDE) :])
    return parser.parse_args(rest), overrides


def _with_home(argument: str) -> str:
    """`--flag=~/x` as `--flag ~/x` would be: shells leave the ~ within a word alone."""
    flag, equals, value = argument.partition("=")
    if not (flag.startswith("--") and value.startswith("~")):
        return argument
    return flag + equals + os.path.expanduser(value)
