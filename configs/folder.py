"""Own images: folders of files, or any image data set of TFDS by name.

    python -m dfs_jax.main --config configs/folder.py --workdir DIR --config.data.dir=IMAGES
    python -m dfs_jax.main --config configs/folder.py --workdir DIR \\
        --config.data.name=tfds:oxford_flowers102

IMAGES holds train/CLASS/*.jpg, and val (also valid, validation) and test likewise; with neither of
these, as many images of train as data.validation_size are held out for testing and as many for
validation. Where both val and test are there, data.validation_size=-1 takes val for validation.
Files end in .jpg, .jpeg, .png, .webp, .bmp, .gif, .tif or .tiff, in letters of any size, and may
lie in folders of a class folder. Hidden files and __MACOSX are left alone; the log counts what is
not used.

Held-out images are chosen by a hash of CLASS/FILE, and a run keeps to those that it began with:
images that come later are trained on. Other classes, or other images to measure on, are refused.

    --config.data.channels=1            grey images stay in one channel
    --config.data.normalization=own     mean and deviation of up to 4,096 training images, measured
                                        once and kept in the workdir

Presets, as a comma list of at most one network and one method, in any order:

    resnet18 (default) ResNet18 for small images, four exits
    msdnet             MSDNet for large images, five exits; sets data.image_size to 224
    dfs (default)      Deep Feature Surgery, beta 0.5, every exit training its own channels
    joint              the summed loss of all exits
    ge, boost, cgt, …  the other methods, see dfs_jax/config/presets.py
    imta               frozen backbone of a run with ge, which train.init_from names; exits see
                       the previous exit's answer (arXiv 1908.06294)
"""

from dfs_jax import config as base
from dfs_jax.config.presets import METHODS, SECOND_STAGES


def get_config(preset: str | None = None):
    """The configuration for `preset`, for instance "msdnet" or "resnet18,joint"."""
    c = base.default()

    c.data.name = "folder"
    c.data.image_size = 64
    c.data.crop_area = 0.25  # small sets: milder crops than ImageNet's
    c.data.flip = True
    c.data.normalization = "imagenet"
    c.data.validation_size = 100
    c.data.streams = 8  # the smallest set has eight training images

    c.train.epochs = 90.0
    c.train.batch_size = 64
    c.train.eval_batch_size = 64

    c.optimizer.learning_rate = 0.05
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_epochs = 2.0
    c.optimizer.weight_decay = 5e-4
    methods = {**METHODS, **SECOND_STAGES}
    return base.apply_preset(c, preset, networks=_NETWORKS, methods=methods)


def _resnet18(c):
    base.set_network(c, "resnet18_cifar100")


def _msdnet(c):
    base.set_network(c, "msdnet_imagenet")
    c.data.image_size = 224


_NETWORKS = {"resnet18": _resnet18, "msdnet": _msdnet}
