"""Fashion-MNIST: 70,000 photographs of clothes, 28×28 grey pixels, ten classes.

    apt-get install dataset-fashion-mnist
    python -m dfs_jax.main --config configs/fashion_mnist.py --workdir runs/fashion_mnist

Without that package the four published files can lie in a folder that `data.dir` names, or TFDS
can have prepared them. Presets, as a comma list of at most one network, one size and one method, in
any order:

    vgg7 (default)     VGG7, six exits
    msdnet             MSDNet for CIFAR, five exits
    resnet18           ResNet18, four exits
    small (default)    vgg7 and resnet18 at a quarter of their widths, msdnet at growth 8 and with
                       one layer a segment, 2,400 steps: for CPUs
    full               the published widths, seven exits of MSDNet, 300 epochs
    dfs (default)      Deep Feature Surgery; joint, ge, imta and all other method words are told
                       in dfs_jax/config/presets.py

5,000 of the 60,000 training images are held out to choose thresholds and the best checkpoint.
"""

from dfs_jax import config as base
from dfs_jax.config.presets import METHODS, SECOND_STAGES


def get_config(preset: str | None = None):
    """The configuration for `preset`, for instance "joint" or "msdnet,full,dfs_all"."""
    c = base.default()

    c.data.name = "fashion_mnist"
    c.data.validation_size = 5_000
    c.data.crop_padding = 2
    c.data.flip = True
    c.data.cutout = 8

    c.optimizer.learning_rate = 0.1
    c.optimizer.weight_decay = 5e-4
    c.optimizer.schedule = "cosine"

    c.train.batch_size = 128
    c.train.eval_batch_size = 500
    methods = {**METHODS, **SECOND_STAGES}
    return base.apply_preset(c, preset, networks=_NETWORKS, sizes=_SIZES, methods=methods)


_SMALL = {
    "vgg7": {"widths": ((16, 16), (32, 32), (64, 64))},
    "msdnet": {"steps": (2, 1, 1, 1, 1), "initial": 8, "growth": 8},
    "resnet18": {"width": 16},
}
_NETWORKS = {word: lambda c, word=word: base.set_network(c, f"{word}_cifar100") for word in _SMALL}


def _small(c):
    word = c.model.name.removesuffix("_cifar100")
    base.set_network(c, c.model.name, **_SMALL[word])
    c.train.steps = 2_400
    c.train.eval_every = 400
    c.train.checkpoint_every = 400
    c.train.log_every = 50


def _full(c):
    c.train.epochs = 300.0


_SIZES = {"small": _small, "full": _full}
