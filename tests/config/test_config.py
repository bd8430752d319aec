import json
import re
from pathlib import Path

import pytest

from dfs_jax import config, gradients, models
from dfs_jax.config import ConfigError
from dfs_jax.objectives import Objective
from dfs_jax.surgery import Surgery

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = str(CONFIGS / "digits.py")


def presets():
    """FILE[:preset] of every configuration, its default and each of its preset words."""
    for file in sorted(CONFIGS.glob("*.py")):
        yield str(file)
        with pytest.raises(ConfigError) as refused:
            config.load(f"{file}:?")
        known = re.findall(r"(?:networks|sizes|methods): ([^;]*)", str(refused.value))
        yield from (f"{file}:{word}" for words in known for word in words.split(", ") if word)


@pytest.fixture
def written(tmp_path):
    """Makes a configuration file of one statement."""

    def make(statement):
        file = tmp_path / "own.py"
        file.write_text(
            "from dfs_jax import config as base\n\n\ndef get_config(preset=None):\n"
            f"    c = base.default()\n    {statement}\n    return c\n"
        )
        return str(file)

    return make


@pytest.mark.parametrize("spec", presets(), ids=lambda s: Path(s).name)
def test_every_preset_survives_its_json(spec):
    c = config.load(spec)
    text = config.to_json(c)
    assert config.from_json(text) == c
    assert config.to_json(config.from_json(text)) == text
    assert c.is_locked
    assert c.model.options.is_locked


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("boost", ("vgg7_cifar100", 0.5, "equilibrium", False)),
        ("boost,full,resnet18", ("resnet18_cifar100", 0.5, "equilibrium", False)),
        ("msdnet,boost,small", ("msdnet_cifar100", 0.5, "equilibrium", False)),
        ("cgt,msdnet", ("msdnet_cifar100", 0.0, "confidence_gated", False)),
        ("dfs", ("vgg7_cifar100", 0.0, "joint", True)),
    ],
)
def test_method_words_hold_for_the_network_that_was_chosen(words, expected):
    c = config.load(f"{CONFIGS}/fashion_mnist.py:{words}")
    boosting, method = c.model.options.boosting, c.gradients.name
    assert (c.model.name, boosting, method, c.surgery.partition) == expected
    assert c.gradients.options.get("gate", "soft") == "soft"


@pytest.mark.parametrize("name", models.names())
def test_options_of_every_network_survive_their_json(name):
    c = config.load(DIGITS, [f"model.name={name}", "model.options.dropout_rate=0.25"])
    back = config.from_json(config.to_json(c))
    assert back.to_dict() == c.to_dict()  # nested tuples stay tuples
    assert back == c


@pytest.mark.parametrize("name", gradients.names())
def test_options_of_every_method_survive_their_json(name):
    c = config.load(DIGITS, [f"gradients.name={name}"])
    assert config.from_json(config.to_json(c)) == c


def test_sections_that_fill_a_dataclass_have_its_defaults():
    c = config.default()
    assert Surgery(**c.surgery.to_dict()) == Surgery()
    assert Objective(**c.objective.to_dict()) == Objective()


@pytest.mark.parametrize("size", [64, (64, 96)])
def test_sizes_of_images_come_back_from_json(size):
    c = config.load(DIGITS)
    c.data.image_size = size
    again = config.from_json(config.to_json(c))
    assert again.data.image_size == size
    assert config.differences(c, again) == []
    assert config.differences(c, config.load(DIGITS)) == [
        f"data.image_size: {list(size) if isinstance(size, tuple) else size} there, 0 now"
    ]


def test_a_saved_field_that_is_missing_takes_its_default():
    saved = json.loads(config.to_json(config.load(DIGITS)))
    del saved["data"]["cutout"], saved["mesh"]
    c = config.from_json(json.dumps(saved))
    assert (c.data.cutout, c.mesh.data) == (0, -1)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=3", 3),
        ("surgery.beta=0.25", 0.25),
        ("surgery.beta=1", 1.0),
        ("surgery.beta=(0.25,1)", (0.25, 1)),
        ("train.epochs=2", 2.0),
        ("optimizer.learning_rate=1e-3", 1e-3),
        ("data.flip=true", True),
        ("surgery.partition=False", False),
        ("surgery.exit_gradient=all", "all"),
        ("train.compilation_cache=", ""),
        ("data.dir=/some/where=else", "/some/where=else"),
        ("objective.exit_weights=(1,2.5)", (1, 2.5)),
        ("objective.exit_weights=[1,2]", (1, 2)),
        ("model.options.steps=[1,2]", (1, 2)),
        ("optimizer.milestones=30", (30,)),
        ("data.image_size=64", 64),
        ("data.image_size=(64,96)", (64, 96)),
        ("data.image_size=[64,96]", (64, 96)),
        ("model.options.steps=(1,1)", (1, 1)),
        ("model.options.dropout_rate=0", 0.0),
        ("model.options.dropout_rate=None", None),
    ],
)
def test_override_has_the_type_of_its_field(override, value):
    found = config.load(DIGITS, [override])
    for key in override.partition("=")[0].split("."):
        found = found[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "override",
    [
        "seed=x",
        "train.steps=1.5",
        "train.steps=None",
        "data.flip=yes",
        "surgery.beta=nan",
        "surgery.beta='0.5'",
        "optimizer.milestones='30'x",
        "data.image_size=64.5",
        "data.image_size=None",
        "data.image_size='64'",
    ],
)
def test_value_of_another_type_is_refused(override):
    with pytest.raises(ConfigError, match=r"config\.[a-z_.]+: .* is not a value of type"):
        config.load(DIGITS, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learningrate=1", r"config.optimizer.learningrate.*mean 'learning_rate'\?"),
        ("optimiser.learning_rate=1", r"did you mean 'optimizer'\?"),
        ("trian.steps=1", r"did you mean 'train'\?"),
        ("model.options.x=1", r"known: .*growth.*steps"),
        ("model.options.step=1", r"did you mean 'steps'\?"),
        ("gradients.options.x=1", "config.gradients.options.x: there is no such field"),
        ("model=vgg7_cifar100", "config.model is a section; its fields: name, options"),
        ("seed.x=1", "config.seed.x: seed has no fields"),
        ("seed", "give a value as --config.seed=VALUE"),
        ("model.name=vgg8", "config.model.name: unknown network 'vgg8'; known: .*vgg7_cifar100"),
        ("gradients.name=sum", "config.gradients.name: unknown .*'sum'; known: .*joint"),
    ],
)
def test_what_is_no_field_is_refused_with_the_nearest_or_the_known_ones(override, message):
    with pytest.raises(ConfigError, match=message):
        config.load(DIGITS, [override])


def test_a_network_named_in_an_override_brings_its_own_options():
    # In any order: the name is applied first.
    c = config.load(DIGITS, ["model.options.widths=((8,8),(8,8))", "model.name=vgg7_cifar100"])
    every = {"adapters", "boosting", "collaboration", "dropout_rate"}
    assert set(c.model.options) == every | {"split_init", "widths"}
    assert c.model.options.widths == ((8, 8), (8, 8))
    with pytest.raises(ConfigError, match="growth"):
        config.load(DIGITS, ["model.name=vgg7_cifar100", "model.options.growth=4"])


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("c.train.stepz = 3", 'own.py: .*stepz.*"steps" instead of "stepz"'),
        ("c.seed = 1.5", "own.py: .*'seed'.* 1.5 "),
        ("base.set_network(c, 'vgg8')", "unknown network 'vgg8'; known"),
        ("base.set_network(c, 'msdnet_digits', depth=3)", "model.options.depth.*no such option"),
        ("base.set_gradients(c, 'sum')", "unknown gradient method 'sum'; known"),
        ("c.train.steps = 1 / 0", r"own.py: ZeroDivisionError: division by zero \(line 6\)"),
        ("c.train.steps = many", r"own.py: NameError: name 'many' is not defined \(line 6\)"),
        ("c.train.steps = (", r"own.py: SyntaxError: .*line 6"),
        ("import no_such_module", "own.py: ModuleNotFoundError: .*no_such_module"),
        ("raise ValueError('x' * 9000)", "own.py: ValueError: x+…"),
        ("get_config()", "own.py: RecursionError"),
        ("return None", r"own.py: get_config must return .*default\(\).*; it returned None"),
        ("c.seed = True", "config.seed = True must be a whole number"),
        ("c.optimizer.milestones = ('a',)", r"milestones = \('a',\) must be a tuple of numbers"),
    ],
)
def test_a_mistake_in_a_file_names_the_file_or_the_field(written, statement, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(written(statement))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_what_is_no_configuration_file_is_refused(tmp_path):
    empty, text = tmp_path / "empty.py", tmp_path / "text.md"
    empty.write_text("")
    text.write_text("# Title\n")
    for spec, message in [
        (f"{tmp_path}/none.py:dfs", "there is no file '.*none.py'"),
        (str(tmp_path), "there is no file"),
        (str(empty), "no function get_config"),
        (str(text), "is not a Python file"),
    ]:
        with pytest.raises(ConfigError, match=message):
            config.load(spec)


@pytest.fixture
def preset():
    """Applies a preset of two networks, a and b, two sizes, s and t, and two methods, m and n."""

    def append(name):
        return lambda c: c.append(name)

    kinds = {
        "networks": {name: append(name) for name in "ab"},
        "sizes": {name: append(name) for name in "st"},
        "methods": {name: append(name) for name in "mn"},
    }
    return lambda text: config.apply_preset([], text, **kinds)


@pytest.mark.parametrize(
    ("text", "applied"),
    [(None, "asm"), ("", "asm"), ("b", "bsm"), ("n", "asn"), ("b,n", "bsn"), (" n , t,b ", "btn")],
)
def test_preset_words_come_in_any_order_and_are_applied_in_one(preset, text, applied):
    assert "".join(preset(text)) == applied


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("c", "'c' is unknown; networks: a, b; sizes: s, t; methods: m, n"),
        ("a,b", "two networks, 'a' and 'b'"),
        ("t,a,s", "two sizes, 't' and 's'"),
        ("m,a,n", "two methods, 'm' and 'n'"),
        ("a,a", "two networks"),
    ],
)
def test_unknown_and_second_preset_words_are_refused(preset, text, message):
    with pytest.raises(ConfigError, match=message):
        preset(text)


def test_differences_name_fields_with_both_values():
    before = config.load(DIGITS)
    after = config.load(DIGITS, ["surgery.beta=0.25", "mesh.data=2", "data.dir=/x", "seed=1"])
    assert config.differences(before, before) == []
    assert config.differences(before, after, ignored=("mesh", "data.dir")) == [
        "seed: 0 there, 1 now",
        "surgery.beta: 0.5 there, 0.25 now",
    ]
    other = config.load(DIGITS, ["model.name=vgg7_cifar100"])
    lines = config.differences(before, other)
    assert "model.name: 'msdnet_digits' there, 'vgg7_cifar100' now" in lines
    assert "model.options.growth: 16 there, None now" in lines


@pytest.mark.parametrize(
    ("file", "overrides", "epochs", "steps"),
    [
        ("digits", ["train.steps=300"], 0.0, 300),
        ("digits", ["train.epochs=3"], 3.0, 0),
        ("double_digits", ["train.epochs=3"], 3.0, 0),
        ("double_digits", ["train.steps=300"], 0.0, 300),
        ("digits", ["train.steps=0"], 60.0, 0),  # "not by steps" is what the file says
        ("digits", ["train.steps=300", "train.epochs=0"], 0.0, 300),
        ("digits", ["train.steps=300", "train.epochs=3"], 3.0, 300),  # refused by `prepare`
        ("digits", ["train.steps=-3"], 0.0, -3),  # this too
    ],
)
def test_a_length_that_is_given_takes_the_place_of_the_files(file, overrides, epochs, steps):
    c = config.load(str(CONFIGS / f"{file}.py"), overrides)
    assert (c.train.epochs, c.train.steps) == (epochs, steps)
    assert type(c.train.epochs) is float


def test_places_may_begin_with_the_home_folder(monkeypatch, written):
    monkeypatch.setenv("HOME", "/home/me")
    c = config.load(written("c.data.dir = '~/a'"), ["train.init_from=~/b"])
    assert (c.data.dir, c.train.init_from) == ("/home/me/a", "/home/me/b")
