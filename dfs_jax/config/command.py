"""What the commands share: flags, logging, and errors told in one sentence.

Exit status 0 is success, 2 a request that cannot be carried out (nothing was changed), 1 a
run that had to end, or that answered a part only. Anything else that is raised is a defect here,
and shows its traceback.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

from dfs_jax.config.errors import ConfigError
from dfs_jax.config.loader import load

_OVERRIDE = "--config."


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


def add_workdir(parser: argparse.ArgumentParser) -> None:
    """Add `--workdir DIR`."""
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="directory of the run (local or gs://)"
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
    try:
        config = None
        if getattr(arguments, "config", None) is not None:
            config = load(arguments.config, overrides)
            configure_jax(config)
        elif overrides:
            raise ConfigError(f"--config.{overrides[0]} needs --config FILE")
        return body(arguments, config) or 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a disk, not a defect
        print(f"error: {error.filename or 'files'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if type(error).__module__.split(".")[0] != "dfs_jax":
            raise
        print(f"error: {error}", file=sys.stderr)
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
            rest.append(argument)
        elif "=" not in argument and argv:  # --config.a.b VALUE
            overrides.append(f"{argument[len(_OVERRIDE) :]}={argv.pop(0)}")
        else:
            overrides.append(argument[len(_OVERRIDE) :])
    return parser.parse_args(rest), overrides
