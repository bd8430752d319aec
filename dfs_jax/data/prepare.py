"""The command that prepares a TFDS data set on disk, once, before the first run that streams it.

    python -m dfs_jax.data.prepare NAME [--data_dir DIR] [--manual_dir DIR]
        [--file_format tfrecord|array_record] [--partial]

Archives are looked for in the manual directory first, by name, and verified; what is missing is
downloaded. An interruption leaves nothing that could be taken for prepared data.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from dfs_jax.config import command
from dfs_jax.data.pipeline import DataError
from dfs_jax.data.sets import archives


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command with arguments `argv`."""
    parser = command.parser(__doc__)
    parser.add_argument("name", metavar="NAME", help="a TFDS data set, for instance imagenet2012")
    parser.add_argument("--data_dir", metavar="DIR", help="where prepared data go; default: TFDS's")
    parser.add_argument(
        "--manual_dir",
        metavar="DIR",
        help="imagenet2012: where its archives are; default, and for others: "
        "DATA_DIR/downloads/manual",
    )
    parser.add_argument("--file_format", choices=("tfrecord", "array_record"), default="tfrecord")
    parser.add_argument(
        "--partial", action="store_true", help="imagenet2012: take archives of some of the images"
    )
    return command.run(parser, argv, lambda arguments, config: _prepare(arguments))


def _prepare(arguments: argparse.Namespace) -> None:
    import tensorflow_datasets as tfds

    from dfs_jax.data.sets import builders, imagenet

    data_dir = arguments.data_dir or tfds.core.constants.DATA_DIR
    data_dir = os.path.abspath(os.path.expanduser(data_dir))
    by_hand = arguments.manual_dir or archives.manual_dir(data_dir)
    try:
        builder = tfds.builder(
            arguments.name, data_dir=data_dir, file_format=arguments.file_format, try_gcs=False
        )
    except tfds.core.registered.DatasetNotFoundError:
        raise DataError(f"TFDS has no data set {arguments.name!r}") from None
    except ValueError as error:
        raise DataError(f"{error}; give another --data_dir") from error
    if not builder.data_path.exists():
        if builder.name == imagenet.NAME:
            imagenet.verify(by_hand, partial=arguments.partial)
        else:
            archives.check_available(builder, data_dir, by_hand)
        builders.hide_accelerators()
        manual = by_hand if os.path.isdir(by_hand) else None
        with builders.preparing(builder):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(
                    manual_dir=manual, try_download_gcs=False
                )
            )
    sizes = ", ".join(f"{k} {v.num_examples:,}" for k, v in builder.info.splits.items())
    print(f"{builder.info.full_name} is prepared in {builder.data_path}: {sizes}")


if __name__ == "__main__":
    sys.exit(main())
