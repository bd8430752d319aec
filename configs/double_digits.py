"""Double digits: 100 classes that need depth, 32×32 pixels, drawn here, no download.

    python -m dfs_jax.main --config configs/double_digits.py --workdir runs/double_digits

draws the data set on first use. It has two variants, told apart in docs/double_digits.md: `clean`
as above, and `hard`, which starts to learn later:

    python -m dfs_jax.main --config configs/double_digits.py --workdir runs/double_digits_hard \\
        --config.data.name=double_digits/hard --config.train.steps=6000

`double_digits/units` is the `clean` pictures with one digit as the class: ten classes.

Presets, as a comma list of at most one network and one method, in any order:

    vgg7 (default)     VGG7 at a quarter of its published widths, six exits
    msdnet             MSDNet for CIFAR at growth 8 and with one layer a segment, five exits
    resnet18           ResNet18 at a quarter of its published width, four exits
    dfs (default)      Deep Feature Surgery, beta 0.5, every exit training its own channels
    dfs_all            the same, every exit training all of its channels (official MSDNet code)
    joint              the summed loss of all exits
    ge, boost, cgt, …  the other methods, see dfs_jax/config/presets.py
    imta               frozen backbone of a run with ge, which train.init_from names; exits see
                       the previous exit's answer (arXiv 1908.06294)
"""

from dfs_jax import config as base
from dfs_jax.config.presets import METHODS, SECOND_STAGES


def get_config(preset: str | None = None):
    """The configuration for `preset`, for instance "joint" or "msdnet,dfs_all"."""
    c = base.default()

    c.data.name = "double_digits/clean"
    c.data.validation_size = 5_000  # with 45,000 to train on and 10,000 to test
    # Nothing is augmented: a flipped digit is none, and pictures vary in place already.

    c.optimizer.learning_rate = 0.1
    c.optimizer.weight_decay = 5e-4
    c.optimizer.schedule = "cosine"

    c.train.steps = 1_500  # a little over four epochs
    c.train.batch_size = 128
    c.train.eval_batch_size = 512
    c.train.eval_every = 250
    c.train.checkpoint_every = 250
    c.train.log_every = 50
    methods = {**METHODS, **SECOND_STAGES}
    return base.apply_preset(c, preset, networks=_NETWORKS, methods=methods)


def _vgg7(c):
    base.set_network(c, "vgg7_cifar100", widths=((16, 16), (32, 32), (64, 64)))


def _msdnet(c):
    base.set_network(c, "msdnet_cifar100", steps=(2, 1, 1, 1, 1), initial=8, growth=8)


def _resnet18(c):
    base.set_network(c, "resnet18_cifar100", width=16)


_NETWORKS = {"vgg7": _vgg7, "msdnet": _msdnet, "resnet18": _resnet18}
