"""ImageNet (ILSVRC 2012): 1,281,167 training images, tested on the official validation set.

Read in streams from what TFDS prepares. The archives are only given to those who register, so
they cannot be downloaded here; `verify` makes sure that they are the published ones.
"""

import os
import re
import tarfile

import ml_collections

from dfs_jax.data.input import streamed
from dfs_jax.data.pipeline import Data, DataError
from dfs_jax.data.record import Record
from dfs_jax.data.sets import builders
from dfs_jax.data.sets.archives import manual_dir, sha256

NAME = "imagenet2012"

# Bytes and SHA-256, as TFDS 4.9.10 has them (datasets/imagenet2012/checksums.tsv).
ARCHIVES = {
    "ILSVRC2012_img_train.tar": (
        147_897_477_120,
        "b08200a27a8e34218a0e58fde36b0fe8f73bc377f4acea2d91602057c3ca45bb",
    ),
    "ILSVRC2012_img_val.tar": (
        6_744_924_160,
        "c7e06a6c0baccf06d8dbeb6577d71efff84673a5dbdd50633ab44f8ea0456ae0",
    ),
}
_REGISTRATION = "https://image-net.org/download-images"
_VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


def load(config: ml_collections.ConfigDict, known: Record | None = None) -> Data:
    """ImageNet as `config` says; `known` is what the run has noted of it.

    Raises DataError, saying what to do, where it is not prepared.
    """
    streamed.check_config(config)
    builder = builders.open_prepared(NAME, config, instructions)
    for split in ("train", "validation"):
        if split not in builder.info.splits:
            raise DataError(f"the ImageNet in {builder.data_path} has no split {split!r}")
    return streamed.from_records(
        config,
        name=NAME,
        train=builders.records_of(builder, "train", config),
        test=builders.records_of(builder, "validation", config),
        class_names=builder.info.features["label"].names,
        statistics="imagenet",
        record=builders.record_of(builder, config, test="validation"),
        known=known,
    )


def instructions(data_dir: str, file_format: str) -> str:
    """What to download, its size and checksum, where to put it, and the command to run."""
    archives = " and ".join(
        f"{name} ({size:,} bytes, SHA-256 {checksum})"
        for name, (size, checksum) in ARCHIVES.items()
    )
    option = f" --file_format={file_format}" if file_format != "tfrecord" else ""
    return (
        f"ImageNet is not prepared in {data_dir}; download {archives} from {_REGISTRATION} (which "
        f"asks to register), put them in {manual_dir(data_dir)} and run "
        f"python -m dfs_jax.data.prepare {NAME} --data_dir={data_dir}{option}"
    )


def verify(directory: str, *, partial: bool) -> None:
    """Raises DataError unless the archives in `directory` are the published ones, byte for byte.

    `partial` takes archives of some of the images, for a trial. Then validation images must be
    the first ones without a gap, for TFDS labels them by their place among the sorted names.
    """
    for name, (size, checksum) in ARCHIVES.items():
        path = os.path.join(directory, name)
        if not os.path.isfile(path):
            raise DataError(
                f"{path} is missing; download it ({size:,} bytes, SHA-256 {checksum}) from "
                f"{_REGISTRATION}"
            )
        if partial:
            _check_whole(path)
        elif os.path.getsize(path) != size:
            raise DataError(
                f"{path} has {os.path.getsize(path):,} bytes instead of {size:,}; download it "
                "again, or give --partial if it holds a part of the images on purpose"
            )
    if partial:
        _check_validation_names(os.path.join(directory, "ILSVRC2012_img_val.tar"))
        return
    for name, (_, checksum) in ARCHIVES.items():
        path = os.path.join(directory, name)
        print(f"verifying {path}", flush=True)
        if sha256(path) != checksum:
            raise DataError(f"{path} has another SHA-256 than {checksum}; download it again")


def _check_whole(path: str) -> None:
    try:
        with tarfile.open(path, "r:") as archive:
            members = archive.getmembers()
    except tarfile.TarError as error:
        raise DataError(f"{path} is damaged: {error}; download it again") from error
    # Two blocks of zeros end an archive; tarfile itself is content without them.
    end = max((m.offset_data + -(-m.size // 512) * 512 for m in members), default=0)
    if not members or os.path.getsize(path) < end + 1024:
        raise DataError(f"{path} is not complete; download it again")


def _check_validation_names(path: str) -> None:
    with tarfile.open(path, "r:") as archive:
        names = sorted(archive.getnames())
    for number, name in enumerate(names, 1):
        match = _VALIDATION_IMAGE.fullmatch(name)
        if match is None or int(match[1]) != number:
            raise DataError(
                f"{path} has {name} where image {number} of the validation set should be: with a "
                "gap in their numbers all later images would get wrong labels"
            )
