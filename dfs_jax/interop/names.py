"""Names of the official PyTorch repositories for the parameters of every network.

One translation per network family, as rules that rewrite the paths of the parameter tree; no
layer is listed. How the arrays themselves are laid out is `torch.py`'s business.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dfs_jax.models.msdnet import MSDNet
from dfs_jax.models.multi_exit import MultiExit
from dfs_jax.models.resnet import ResNet
from dfs_jax.models.vgg import VGG
from dfs_jax.models.vit import ViT

Rule = tuple[str, str | Callable[[re.Match], str]]
Shapes = Mapping[str, tuple[int, ...]]

# The last part of a path, by the collection it lies in. What is missing keeps its name.
LEAVES = {
    "params": {"kernel": "weight", "scale": "weight", "bias": "bias"},
    "batch_stats": {"mean": "running_mean", "var": "running_var"},
}


@dataclasses.dataclass(frozen=True)
class Translation:
    """How the module paths `a/b/c` of one network become the names `x.y.z` of PyTorch.

    Attributes:
      rules: (pattern, replacement) as in `re.sub`, applied one after the other. A result that
        ends in `_*` stands for two kernels, `_p` on the shared and `_s` on the other input
        channels, as surgery cuts them.
      exits: pattern of the PyTorch names that belong to exits, which a checkpoint of the
        backbone alone lacks or has for other classes.
      stem: the kernel that reads the images, (out, image channels, …).
      head: the kernel of the deepest exit, (classes, in).
      image_side: side of the images, in pixels, for which the entries have the given shapes;
        None where no shape depends on it.
    """

    rules: tuple[Rule, ...]
    exits: str
    stem: str
    head: str
    image_side: Callable[[Shapes], int | None] = lambda shapes: None

    def module(self, path: str) -> str:
        """The PyTorch name of the module at `path`; raises KeyError where no rule applies."""
        name, applied = path, 0
        for pattern, replacement in self.rules:
            name, count = re.subn(pattern, replacement, name)
            applied += count
        if "/" in name or not applied:
            raise KeyError(path)
        return name

    def is_exit(self, name: str) -> bool:
        return re.match(self.exits, name) is not None


def translation(network: MultiExit, modules: Collection[str]) -> Translation:
    """The translation for `network`, whose tree has the modules `modules` at its top level."""
    for kind, build in _FAMILIES.items():
        if isinstance(network, kind):
            return build(network, modules)
    known = ", ".join(sorted(kind.__name__ for kind in _FAMILIES))
    raise TypeError(f"no PyTorch names for {type(network).__name__}; there are some for: {known}")


def _vgg(network: VGG, modules: Collection[str]) -> Translation:
    def image_side(shapes: Shapes) -> int | None:
        # An adapter's output has the size of the last map, C·h·h.
        name = "adaptation_layers.0.2.weight"
        if not shapes.get(name):
            return None
        elements = shapes[name][0] // network.widths[-1][-1]
        return math.isqrt(elements) * 2 ** len(network.widths)

    return Translation(
        rules=(
            (r"^convs_0$", "feature_extractors.0.0"),
            (r"^norms_0$", "feature_extractors.0.2"),
            (r"^convs_(\d+)$", r"feature_extractors.\1.conv_*"),
            (r"^norms_(\d+)$", r"feature_extractors.\1.bn"),
            (r"^heads_(\d+)$", r"classifers.\1.fc_*"),  # the official spelling
            (r"^adapter_layers_(\d+)/dense$", r"adaptation_layers.\1.2"),
        ),
        exits=r"(classifers|adaptation_layers)\.",
        stem="feature_extractors.0.0.weight",
        head=f"classifers.{network.num_exits - 1}.fc_p.weight",
        image_side=image_side,
    )


def _msdnet(network: MSDNet, modules: Collection[str]) -> Translation:
    def position(block: str, layer: str) -> int:
        """Where a layer stands in its block, after the stem and earlier layers and transitions."""
        earlier = sum(f"transitions_{block}_{j}" in modules for j in range(int(layer)))
        return (block == "0") + int(layer) + earlier

    def layer(m: re.Match) -> str:
        block, j, kind, k = m.groups()
        return f"blocks.{block}.{position(block, j)}.layers.{k}.conv_{kind}.net"

    def transition(m: re.Match) -> str:
        block, j, k = m.groups()
        return f"blocks.{block}.{position(block, j) + 1}.m.{k}.net"

    # Only this module of the official code is not wrapped in another one called `net`.
    first = "blocks.0.0.layers.0" + ("" if network.imagenet_stem else ".net")
    return Translation(
        rules=(
            (r"^stem/scale_0", first),
            (r"^stem/scale_(\d+)", r"blocks.0.0.layers.\1.net"),
            (r"^layers_(\d+)_(\d+)/(down|normal)_(\d+)", layer),
            (r"^transitions_(\d+)_(\d+)/scale_(\d+)", transition),
            (r"^exits_(\d+)/conv_(\d+)", r"classifier.\1.m.\2.net"),
            (r"^exits_(\d+)/dense$", r"classifier.\1.linear.1"),
            (r"^adapter_layers_(\d+)$", r"adaptation_layer.\1"),  # ours
            (r"/grow/conv$", ".3"),
            (r"/grow/bn$", ".4"),
            (r"(/reduce)?/conv$", ".0"),
            (r"(/reduce)?/bn$", ".1"),
        ),
        exits=r"(classifier|adaptation_layer)\.",
        stem=f"{first}.0.weight",
        head=f"classifier.{network.num_exits - 1}.linear.1.weight",
    )


def _resnet(network: ResNet, modules: Collection[str]) -> Translation:
    # By their places; 3 is a ReLU.
    separable = ("depthwise1", "pointwise1", "bn1", None, "depthwise2", "pointwise2", "bn2")

    def numbered(template: str) -> Callable[[re.Match], str]:
        """The first number counted from 1, as torchvision and the official code count."""
        return lambda m: template.format(int(m[1]) + 1, *m.groups()[1:])

    return Translation(
        rules=(
            (r"^(conv1|bn1)$", r"\1"),
            (r"^layers_(\d+)_(\d+)/(conv\d|bn\d)$", numbered("layer{}.{}.{}")),
            (r"^layers_(\d+)_(\d+)/downsample_conv$", numbered("layer{}.{}.downsample.0")),
            (r"^layers_(\d+)_(\d+)/downsample_bn$", numbered("layer{}.{}.downsample.1")),
            (r"^exits_(\d+)/attention/sep", numbered("attention{}.0.op")),
            (r"^exits_(\d+)/attention/bn$", numbered("attention{}.1")),
            (r"^exits_(\d+)/scala_(\d+)", numbered("scala{}.{}.op")),
            (r"^exits_(\d+)/fc$", numbered("fc{}")),
            (r"^adapter_layers_(\d+)$", numbered("adaptation_layer{}")),
            (r"op/(\w+)$", lambda m: f"op.{separable.index(m[1])}"),
        ),
        exits=r"(attention|scala|fc|adaptation_layer)\d*\.",
        stem="conv1.weight",
        head=f"fc{network.num_exits}.weight",
    )


def _vit(network: ViT, modules: Collection[str]) -> Translation:
    """timm's names; the exits before its own head extend them."""

    def image_side(shapes: Shapes) -> int | None:
        shape = shapes.get("pos_embed", ())  # (1, 1 + patches, width)
        if len(shape) != 3 or shape[1] < 2:
            return None
        return network.patch_size * math.isqrt(shape[1] - 1)

    last = network.num_exits - 1
    return Translation(
        rules=(
            (r"^patch_embed$", ""),  # of cls_token and pos_embed
            (r"^patch_embed/proj$", "patch_embed.proj"),
            (r"^blocks_(\d+)/(norm\d)$", r"blocks.\1.\2"),
            (r"^blocks_(\d+)/(attn|mlp)/(\w+)$", r"blocks.\1.\2.\3"),
            (rf"^exits_{last}/(norm|head)$", r"\1"),
            (r"^exits_(\d+)/(norm|head)$", r"exits.\1.\2"),
            (r"^adapter_layers_(\d+)$", r"adaptation_layer.\1"),
        ),
        exits=r"(exits|head|adaptation_layer)\.",
        stem="patch_embed.proj.weight",
        head="head.weight",
        image_side=image_side,
    )


_FAMILIES: dict[type, Callable[[Any, Collection[str]], Translation]] = {
    MSDNet: _msdnet,
    ResNet: _resnet,
    VGG: _vgg,
    ViT: _vit,
}
