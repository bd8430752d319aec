"""The fields of a configuration, with their defaults and meaning.

One tree of fields serves every file under `configs/`; it is locked, so a misspelt field is an error
that names the nearest one. Fields that fill a dataclass come from it, with its defaults; what they
mean is said there. Which values make sense together is checked by the module that uses them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from dfs_jax.config.errors import ConfigError, refusals, unknown


def default() -> ml_collections.ConfigDict:
    """The configuration with every field at its default. Files under `configs/` start here."""
    from dfs_jax.objectives import Objective
    from dfs_jax.surgery import Surgery

    c = ml_collections.ConfigDict()
    c.seed = 0  # initial weights, dropout and everything random that is not data

    c.model = ml_collections.ConfigDict()
    c.model.name = "msdnet_digits"  # one of dfs_jax.models.names()
    c.model.options = ml_collections.ConfigDict()  # the network's own; see models.options(name)

    # What deeper exits share of a feature; the fields are those of `surgery.Surgery`.
    c.surgery = ml_collections.ConfigDict(dataclasses.asdict(Surgery()))
    c.surgery.beta = config_dict.FieldReference(c.surgery.beta, field_type=object)
    # The exits' losses; the fields are those of `objectives.Objective`.
    c.objective = ml_collections.ConfigDict(dataclasses.asdict(Objective()))

    c.gradients = ml_collections.ConfigDict()
    c.gradients.name = "joint"  # one of dfs_jax.gradients.names()
    c.gradients.options = ml_collections.ConfigDict()  # the method's own

    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.name = "sgd"  # or "adamw", "lamb", "lars"
    c.optimizer.learning_rate = 0.1  # at the peak of the schedule
    c.optimizer.momentum = 0.9  # AdamW: decay of the first moment
    c.optimizer.nesterov = False
    c.optimizer.weight_decay = 5e-4  # on every parameter; SGD: coupled (added to the gradient)
    c.optimizer.clip_norm = 0.0  # gradients of a larger global norm are scaled down to it; 0: off
    c.optimizer.schedule = "multistep"  # "multistep", "cosine" or "constant"
    c.optimizer.milestones = ()  # multistep: epochs at which the rate is multiplied by decay_rate
    c.optimizer.decay_rate = 0.1
    c.optimizer.warmup_epochs = 0.0  # from 0 to the peak
    c.optimizer.warmup = "linear"  # its shape: "linear" or "cosine"

    c.data = ml_collections.ConfigDict()
    c.data.name = "digits"  # one of dfs_jax.data.names()
    c.data.dir = config_dict.placeholder(str)  # prepared data; None: TFDS's own place
    c.data.seed = 0  # order and augmentation of the training examples
    c.data.validation_size = 240  # examples held out of training; 0: no validation split; -1: the
    # data set's own one, where there is one beside the test split
    # Resize images to this many pixels a side, or to (height, width); 0: as they are.
    c.data.image_size = config_dict.FieldReference(0, field_type=object)
    c.data.channels = 0  # 1: grey, 3: colours; 0: as they are, and colours where each file differs
    c.data.crop_padding = 0  # random crop after padding by this many pixels
    c.data.crop_fill = 0  # grey level of that padding, 0-255
    c.data.flip = False  # random horizontal flip
    c.data.cutout = 0  # side of a square that is blacked out; 0: off
    c.data.autoaugment = ""  # learned policy of image operations: "cifar10"; "": none
    c.data.randaugment_layers = 0  # random image operations per image (RandAugment's N); 0: off
    c.data.randaugment_magnitude = 9.0  # their strength (RandAugment's M), 0 to 10
    c.data.mixup = 0.0  # blend images: a of Beta(a, a), from which shares are drawn; 0: off
    c.data.cutmix = 0.0  # paste rectangles: a of Beta(a, a), from which areas are drawn; 0: off
    c.data.mix_probability = 1.0  # share of the batches that are mixed
    c.data.normalization = "own"  # the data set's own statistics, or a name in STATISTICS; of a
    # folder and tfds:NAME they are measured once, on up to 4,096 training images
    # Sets that are read in streams from disk (imagenet2012, tfds:NAME, folder):
    c.data.streams = 64  # the order is cut into so many, on any number of hosts; divides the batch
    c.data.backend = "tf"  # reads TFRECORD files; "grain" reads ARRAY_RECORD files
    c.data.shuffle_buffer = 64  # records that a stream of TFRECORD files keeps to draw from
    c.data.crop_area = 0.08  # smallest share of an image that its random crop covers
    c.data.antialias = False  # when images are made smaller; as PyTorch does it, at half the speed
    c.data.on_error = "raise"  # at a damaged record, or "skip": replace it, count and tell

    c.train = ml_collections.ConfigDict()
    c.train.epochs = 0.0  # length of the run in passes over the training split ...
    c.train.steps = 0  # ... or in updates; exactly one of the two is set
    c.train.batch_size = 64  # over all devices
    c.train.eval_batch_size = 256  # over all devices
    c.train.eval_every = 0  # steps between evaluations; 0: once per epoch
    c.train.checkpoint_every = 0  # steps between checkpoints; 0: once per epoch
    c.train.log_every = 10  # steps between lines of training metrics
    c.train.conflict_every = 100  # steps between measurements of the angles between the exits'
    # gradients, which take a gradient tree per exit of memory; 0: off
    c.train.best_metric = "eval/mean/top1"  # the checkpoint with its highest value is kept
    c.train.init_from = config_dict.placeholder(str)  # workdir whose weights the run starts from
    c.train.freeze = ()  # patterns of parameter paths that keep their weights; see `freeze`
    c.train.phases = ()  # parts of the run that train other things; dictionaries of the fields of
    # `training.phases.Phase`, whose shares of the steps add up to 1
    c.train.accumulation = 1  # microbatches per update; batch statistics are each one's own
    c.train.rematerialise = False  # recompute segments in the backward pass, to save memory
    c.train.ema = 0.0  # decay of averaged parameters and statistics, then evaluated; 0: none
    c.train.checkpoint_minutes = 0.0  # also save when so many minutes have passed; 0: off
    c.train.profile_steps = ()  # (first, last): a profiler trace of these steps, in profile/
    c.train.peak_flops = 0.0  # of one device, per second, for train/mfu; 0: not reported
    c.train.precision = "float32"  # of the computation: "float32", "bfloat16" or "float64"
    c.train.compilation_cache = "~/.cache/dfs_jax"  # compiled programs kept on disk; "": nowhere

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1  # devices that cut the batch only; -1: all that are left
    c.mesh.fsdp = 1  # devices that also spread parameters and optimizer state among them
    return c.lock()


def set_network(c: ml_collections.ConfigDict, name: str, **options: Any) -> None:
    """Choose network `name` and some of its options; raises ConfigError for an unknown one."""
    from dfs_jax import models

    _choose(c, "model", name, models.options, options)


def set_gradients(c: ml_collections.ConfigDict, name: str, **options: Any) -> None:
    """Choose gradient method `name` and some of its options; raises ConfigError likewise."""
    from dfs_jax import gradients

    _choose(c, "gradients", name, gradients.options, options)


def _choose(c, section: str, name: str, options_of: Callable, chosen: Mapping[str, Any]) -> None:
    c[section].name = name
    with refusals(f"config.{section}.name"):
        known = options_of(name)
    options = ml_collections.ConfigDict()
    for key, value in known.items():
        options[key] = config_dict.placeholder(float) if value is None else value
    for key, value in chosen.items():
        if key not in known:
            raise ConfigError(f"config.{section}.options.{key}: {unknown(key, known, 'option')}")
        options[key] = value
    c[section].options = options.lock()


def scale_learning_rate(c: ml_collections.ConfigDict, reference_batch_size: int) -> None:
    """Linear scaling rule: multiply the learning rate by batch size / `reference_batch_size`.

    For a configuration file whose batch size is not the one that its recipe's rate was found
    for; warm up over a few epochs with it (arXiv 1706.02677, sections 2.1 and 2.2).
    """
    if reference_batch_size < 1:
        raise ConfigError(f"the reference batch size must be positive, got {reference_batch_size}")
    c.optimizer.learning_rate *= c.train.batch_size / reference_batch_size
