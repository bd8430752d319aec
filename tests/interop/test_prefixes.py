"""What stands before the names of a state dict is taken off; averaged weights are preferred."""

import pytest

from dfs_jax.interop.prefixes import common, taken

NAMES = ("conv1.weight", "layer1.0.conv1.weight", "fc.weight", "fc.bias", "norm.weight")


def _under(prefix, names=NAMES):
    return {f"{prefix}{name}": f"{prefix}{name}" for name in names}


@pytest.mark.parametrize(
    ("entries", "prefix", "left_out"),
    [
        (_under(""), "", ()),
        (_under("model."), "model.", ()),  # Lightning
        (_under("module.") | {"n_averaged": 0}, "module.", ("n_averaged",)),
        (_under("net._orig_mod.") | {"loss.weight": 0}, "net._orig_mod.", ("loss.weight",)),
        (_under("model.") | _under("ema_model.module."), "ema_model.module.", 5),
        (_under("") | _under("swa."), "swa.", 5),
        (_under("model.") | _under("teacher.", NAMES[:3]), "model.", 3),
        (_under("model.", NAMES[:2]), "model.", ()),  # a backbone
        (_under("") | {"extra": 0}, "", ()),  # whoever wants names sees that it is unknown
        ({"a.b": 0, "encoder.fc.bias": 0, "encoder.x": 0, "encoder.y": 0}, "", ()),
        (_under("net_"), "", ()),  # not "net_layer1.0.", after which there is a conv1, too
        ({}, "", ()),
    ],
)
def test_the_prefix_that_fits_the_network(entries, prefix, left_out):
    found = taken(entries, NAMES)
    assert found.prefix == prefix
    assert found.entries == {
        n.removeprefix(prefix): v for n, v in entries.items() if n.startswith(prefix)
    }
    assert (len(found.left_out) if isinstance(left_out, int) else found.left_out) == left_out


def test_what_names_have_in_common():
    assert common(["model.a.b", "model.a.c"]) == "model.a."
    assert common(["model1.a", "model2.a"]) == ""
    assert common(["model.a"]) == "model."
    assert common(["a", "b.c"]) == common(["a"]) == ""
