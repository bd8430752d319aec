"""ImageNet (ILSVRC 2012), 1,281,167 images, 224×224: the published recipes of the DFS paper.

    python -m dfs_jax.data.prepare imagenet2012          # once; says what to download first
    python -m dfs_jax.main --config configs/imagenet.py --workdir runs/imagenet
    python -m dfs_jax.benchmark --config configs/imagenet.py --input_only

Arguments, as a comma list of at most one network and one method, in any order:

    msdnet (default)   MSDNet with step 4, five exits (arXiv 1703.09844)
    vgg16              VGG16 with an exit after every convolution; no recipe was published, so it is
                       MSDNet's with the weight decay of the published VGG7; the official initial
                       weights, which depend on beta: --config.model.options.split_init=true
    vit_tiny           ViT-tiny, exits after blocks 7 to 12; meant for pretrained weights: give
                       --config.train.init_from=WORKDIR (dfs_jax.interop makes one)
    dfs (default)      Deep Feature Surgery, beta 0.5, every exit training its own channels
    dfs_all            the same, every exit training all of its channels: what the published
                       numbers of MSDNet and ViT come from
    joint              the summed loss of all exits
    ge, boost, cgt, …  the other methods, see dfs_jax/config/presets.py
    imta               frozen backbone of a run with ge, which train.init_from names; exits see
                       the previous exit's answer (arXiv 1908.06294)

Of the training images 50,000 are held out, to choose checkpoints and exit thresholds; the
official validation set is the test set. Recipes: arXiv 2407.13986 and its official scripts.
"""

from dfs_jax import config as base
from dfs_jax.config.presets import METHODS, SECOND_STAGES


def get_config(preset: str | None = None):
    """The configuration for `preset`, for instance "joint" or "vit_tiny,dfs_all"."""
    c = base.default()

    c.data.name = "imagenet2012"
    c.data.image_size = 224
    c.data.flip = True
    c.data.validation_size = 50_000
    c.data.streams = 64

    c.train.epochs = 90.0
    c.train.batch_size = 256
    c.train.eval_batch_size = 256
    c.train.log_every = 100

    c.optimizer.learning_rate = 0.1
    c.optimizer.schedule = "multistep"
    c.optimizer.milestones = (70, 80, 85)
    c.optimizer.weight_decay = 0.0
    methods = {**METHODS, **SECOND_STAGES}
    return base.apply_preset(c, preset, networks=_NETWORKS, methods=methods)


def _msdnet(c):
    base.set_network(c, "msdnet_imagenet")


def _vgg16(c):
    base.set_network(c, "vgg16_imagenet")
    c.optimizer.weight_decay = 1e-4


def _vit_tiny(c):
    base.set_network(c, "vit_tiny_patch16")
    c.train.epochs = 60.0
    c.train.batch_size = 1024
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 5e-5
    c.optimizer.schedule = "constant"
    c.optimizer.clip_norm = 1.0


_NETWORKS = {"msdnet": _msdnet, "vgg16": _vgg16, "vit_tiny": _vit_tiny}
