"""CIFAR-100 with the recipes that Deep Feature Surgery (arXiv 2407.13986) was published with.

    python -m dfs_jax.main --config configs/cifar100.py --workdir runs/cifar100
    python -m dfs_jax.main --config configs/cifar100.py:resnet18,dfs --workdir runs/resnet18

300 epochs of batch 500: hours on one GPU. `configs/digits.py` and `configs/double_digits.py` are
for trying things out without one. Presets, as a comma list of at most one network and one
method, in any order:

    msdnet (default)   MSDNet, 7 exits: crops and flips
    resnet18           ResNet18, 4 exits: AutoAugment, Cutout, distillation from the last exit
    vgg7               VGG7, 6 exits: AutoAugment, Cutout
    dfs (default)      Deep Feature Surgery, beta 0.5, every exit training its own channels
    dfs_all            the same, every exit training all of its channels: what the published
                       numbers of MSDNet come from
    joint              deep supervision: the summed cross-entropy of all exits, nothing else
    byot               joint training with distillation from the last exit (arXiv 1905.08094)
    ge, boost, cgt, …  the other methods, see dfs_jax/config/presets.py
    imta               frozen backbone of a run with ge, which train.init_from names; exits see
                       the previous exit's answer (arXiv 1908.06294)

5,000 training images are held out to choose thresholds and the best checkpoint. What differs from
the official code, and how to have it as there:

    --config.data.validation_size=0                     train on all 50,000 images
    --config.data.normalization=cifar10                 CIFAR-10's statistics
    --config.objective.feature_reduction=batch_norm     feature distance of a batch as one norm
    --config.model.options.split_init=true              vgg7: each kernel drawn as two, by beta
"""

from dfs_jax import config as base
from dfs_jax.config.presets import METHODS, SECOND_STAGES


def get_config(preset: str | None = None):
    """The configuration for `preset`, for instance "resnet18,joint" or "dfs_all"."""
    c = base.default()

    c.data.name = "cifar100"
    c.data.validation_size = 5000
    c.data.crop_padding = 4
    c.data.crop_fill = 128
    c.data.flip = True

    c.optimizer.learning_rate = 0.1
    c.optimizer.momentum = 0.9
    c.optimizer.schedule = "multistep"
    c.optimizer.decay_rate = 0.1

    c.train.epochs = 300.0
    c.train.batch_size = 500
    c.train.eval_batch_size = 500
    return base.apply_preset(c, preset, networks=_NETWORKS, methods=_METHODS)


def _msdnet(c):
    base.set_network(c, "msdnet_cifar100")
    c.optimizer.milestones = (250.0, 280.0, 295.0)
    c.optimizer.weight_decay = 5e-4


def _resnet18(c):
    base.set_network(c, "resnet18_cifar100", adapters=True)
    c.optimizer.milestones = (250.0, 280.0, 295.0)
    c.optimizer.weight_decay = 5e-4
    _strong_augmentation(c)
    c.objective.logit_weight = 0.3
    c.objective.temperature = 3.0
    c.objective.feature_weight = 0.03


def _vgg7(c):
    base.set_network(c, "vgg7_cifar100")
    c.optimizer.milestones = (270.0, 280.0, 295.0)
    c.optimizer.weight_decay = 1e-4
    _strong_augmentation(c)


def _strong_augmentation(c):
    c.data.autoaugment = "cifar10"
    c.data.cutout = 16


def _byot(c):
    METHODS["joint"](c)
    c.model.options.adapters = True
    c.objective.logit_weight = 0.3
    c.objective.temperature = 3.0
    c.objective.feature_weight = 0.03


def _without_distillation(method):
    """`method` on the cross-entropy alone; nothing would train the adapters."""

    def apply(c):
        method(c)
        c.model.options.adapters = False
        c.objective.logit_weight = 0.0
        c.objective.feature_weight = 0.0

    return apply


_NETWORKS = {"msdnet": _msdnet, "resnet18": _resnet18, "vgg7": _vgg7}
_METHODS = {
    "dfs": METHODS["dfs"],
    "dfs_all": METHODS["dfs_all"],
    "byot": _byot,
    **{
        word: _without_distillation(method)
        for word, method in METHODS.items()
        if not word.startswith("dfs")
    },
    **SECOND_STAGES,
}
