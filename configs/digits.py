"""Handwritten digits: 1,797 real 8×8 images that ship inside scikit-learn, no download.

    python -m dfs_jax.main --config configs/digits.py --workdir runs/digits

Under three minutes on two CPU cores. Presets, as a comma list of at most one network and one
method, in any order:

    msdnet (default)   a small MSDNet for 8×8 images, four exits
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

    c.data.name = "digits"
    c.data.validation_size = 240  # with 1,197 to train on and 360 to test
    c.data.crop_padding = 1  # shifts by up to a pixel

    c.optimizer.learning_rate = 0.1
    c.optimizer.weight_decay = 5e-4
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_epochs = 1.0

    c.train.epochs = 60.0
    c.train.batch_size = 64
    c.train.eval_batch_size = 240  # the validation split in one batch
    c.train.eval_every = 100
    c.train.checkpoint_every = 100
    c.train.log_every = 50
    c.train.conflict_every = 0  # compiling the measurement takes as long as half of this run
    methods = {**METHODS, **SECOND_STAGES}
    return base.apply_preset(c, preset, networks=_NETWORKS, methods=methods)


def _msdnet(c):
    base.set_network(c, "msdnet_digits")


_NETWORKS = {"msdnet": _msdnet}
